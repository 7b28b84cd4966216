#include "../panel.h"

namespace qc {
namespace avxvnni {

namespace {

const int kPanelRows[] = {Half::kLeastRows, Half::kMostRows, 0};
constexpr int64_t kPanelLeastRows = 16;

}  // namespace

const PanelFunctions kPanel = {kPanelRows, kPanelLeastRows, keep, keep_vq, scales_of_codes, multiply_panel<Half>};

}  // namespace avxvnni
}  // namespace qc
