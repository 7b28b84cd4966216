#include "../../kernels.h"

#include "../../avx2/isa.h"
#include "../isa.h"

namespace qc {

extern const Kernels kAvx512VlKernels = {
    "avx512vl",            avx512vl::kInt8BlockRows, avx2::kFloatBlockRows, avx2::quantize_row, avx512vl::linear_int8,
    avx2::linear_float, avx512vl::vq_int8,        avx2::vq_float,        avx2::add_outliers,
    &kAvx2Edges, &kAvx2Attention,        &avx512vl::kPanel};

}  // namespace qc
