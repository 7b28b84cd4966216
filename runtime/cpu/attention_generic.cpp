// The scalar reference, and what a base architecture with fused multiply-add needs.
#include "attention_functions.h"

namespace qc {

extern const AttentionFunctions kGenericAttention = {append, memory, attend, merge};

}  // namespace qc
