#include "../kernels.h"

#include "isa.h"

namespace qc {
namespace {

const PanelFunctions kPanel = {avx512::kPanelRows, avx512::kPanelLeastRows, avx512::keep, avx512::keep_vq,
                               avx512::keep_scales, avx512::multiply_panel};

}  // namespace

extern const Kernels kAvx512VnniKernels = {
    "avx512vnni",         avx512::kInt8BlockRows, avx512::kFloatBlockRows, avx512::quantize_row, avx512::linear_int8,
    avx512::linear_float, avx512::vq_int8,        avx512::vq_float,        avx512::add_outliers,
    &kAvx512Edges, &kAvx512Attention,       &kPanel};

}  // namespace qc
