// For the x86 kernels with 256-bit vectors.
#include "attention_functions.h"

namespace qc {

extern const AttentionFunctions kAvx2Attention = {append, memory, attend, merge};

}  // namespace qc
