#include "../panel.h"

namespace qc {
namespace avx512vl {

namespace {

const int kPanelRows[] = {Half::kLeastRows, Half::kMostRows, 0};
constexpr int64_t kPanelLeastRows = 16;

}  // namespace

const PanelFunctions kPanel = {kPanelRows, kPanelLeastRows, keep, keep_vq, scales_of_codes, multiply_panel<Half>};

}  // namespace avx512vl
}  // namespace qc
