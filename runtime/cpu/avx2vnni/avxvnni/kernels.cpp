#include "../../kernels.h"

#include "../../avx2/isa.h"
#include "../isa.h"

namespace qc {

extern const Kernels kAvxVnniKernels = {
    "avxvnni",            avxvnni::kInt8BlockRows, avx2::kFloatBlockRows, avx2::quantize_row, avxvnni::linear_int8,
    avx2::linear_float, avxvnni::vq_int8,        avx2::vq_float,        avx2::add_outliers,
    &kAvx2Edges, &kAvx2Attention,        &avxvnni::kPanel};

}  // namespace qc
