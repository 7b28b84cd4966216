#include "../../kernels.h"

#include "../isa.h"

namespace qc {

extern const Kernels kNeonI8mmKernels = {"neon-i8mm",
                                         neon::dotprod::kInt8BlockRows,
                                         neon::kFloatBlockRows,
                                         neon::quantize_row,
                                         neon::i8mm::linear_int8,
                                         neon::linear_float,
                                         neon::i8mm::vq_int8,
                                         neon::vq_float,
                                         neon::add_outliers};

}  // namespace qc
