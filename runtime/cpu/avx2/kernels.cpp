#include "../kernels.h"

#include "isa.h"

namespace qc {

extern const Kernels kAvx2Kernels = {
    "avx2",             avx2::kInt8BlockRows, avx2::kFloatBlockRows, avx2::quantize_row, avx2::linear_int8,
    avx2::linear_float, avx2::vq_int8,        avx2::vq_float,        avx2::add_outliers,
    &kAvx2Edges, &kAvx2Attention};

}  // namespace qc
