// For the x86 kernels with 256-bit vectors.
#include "edges_functions.h"

namespace qc {

extern const EdgeFunctions kAvx2Edges = {normalize, gate, add};

}  // namespace qc
