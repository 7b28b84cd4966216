// For the kernels with 512-bit vectors.
#include "attention_functions.h"

namespace qc {

extern const AttentionFunctions kAvx512Attention = {append, memory, attend, merge};

}  // namespace qc
