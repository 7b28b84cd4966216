#include "../../kernels.h"

#include "../isa.h"

namespace qc {

extern const Kernels kNeonDotprodKernels = {"neon-dotprod",
                                            neon::dotprod::kInt8BlockRows,
                                            neon::kFloatBlockRows,
                                            neon::quantize_row,
                                            neon::dotprod::linear_int8,
                                            neon::linear_float,
                                            neon::dotprod::vq_int8,
                                            neon::vq_float,
                                            neon::add_outliers};

}  // namespace qc
