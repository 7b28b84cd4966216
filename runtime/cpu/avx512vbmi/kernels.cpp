#include "../kernels.h"

#include "../avx512/isa.h"
#include "isa.h"

namespace qc {
namespace {

const PanelFunctions kPanel = {avx512::kPanelRows, avx512::kPanelLeastRows, avx512::keep, avx512vbmi::keep_vq,
                               avx512::keep_scales, avx512::multiply_panel};

}  // namespace

extern const Kernels kAvx512VbmiKernels = {
    "avx512vbmi",        avx512::kInt8BlockRows, avx512::kFloatBlockRows, avx512::quantize_row, avx512::linear_int8,
    avx512::linear_float, avx512vbmi::vq_int8,   avx512vbmi::vq_float,    avx512::add_outliers,
    &kAvx512Edges, &kAvx512Attention,       &kPanel};

}  // namespace qc
