// The scalar reference, and what a base architecture with fused multiply-add needs.
#include "edges_functions.h"

namespace qc {

extern const EdgeFunctions kGenericEdges = {normalize, gate, add};

}  // namespace qc
