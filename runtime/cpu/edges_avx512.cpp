// For the kernels with 512-bit vectors.
#include "edges_functions.h"

namespace qc {

extern const EdgeFunctions kAvx512Edges = {normalize, gate, add};

}  // namespace qc
