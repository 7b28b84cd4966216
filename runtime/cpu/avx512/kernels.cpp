#include "../kernels.h"

#include "isa.h"

namespace qc {

extern const Kernels kAvx512VnniKernels = {
    "avx512vnni",         avx512::kInt8BlockRows, avx512::kFloatBlockRows, avx512::quantize_row, avx512::linear_int8,
    avx512::linear_float, avx512::vq_int8,        avx512::vq_float,        avx512::add_outliers,
    &kAvx512Edges};

}  // namespace qc
