#include "linear_edges.h"

#include <cmath>

#include "failure.h"

namespace qc::ort {
namespace {

int32_t gate_attribute(const Api& api, const OrtKernelInfo* info, int64_t n) {
  const int64_t gate = int_attribute(api, info, "gate", QC_GATE_NONE);
  if (gate < QC_GATE_NONE || gate > QC_GATE_GELU)
    throw Failure{kInvalidGraph, "attribute 'gate' is " + std::to_string(gate) +
                                     ", expected 0 (none), 1 (silu), 2 (gelu_tanh) or 3 (gelu)"};
  if (gate != QC_GATE_NONE && n % 32 != 0)
    throw Failure{kInvalidGraph, "attribute 'n' is " + std::to_string(n) + " with gate " + std::to_string(gate) +
                                     ", expected two halves of a multiple of 16 rows"};
  return static_cast<int32_t>(gate);
}

}  // namespace

LinearEdges::LinearEdges(const Api& api, const OrtKernelInfo* info, size_t first, int64_t n, int64_t k)
    : n_(n),
      k_(k),
      first_(first),
      gate_(gate_attribute(api, info, n)),
      epsilon_(float_attribute(api, info, "epsilon", 0)) {
  if (!(epsilon_ >= 0) || !std::isfinite(epsilon_))
    throw Failure{kInvalidGraph, "attribute 'epsilon' is " + std::to_string(epsilon_) +
                                     ", expected a finite number of at least 0"};
  if (const OrtValue* value = constant_input(api, info, first_ + 1)) constant_norm_ = checked_norm(copies_.of(tensor(api, value)));
}

const float* LinearEdges::checked_norm(const Tensor& found) const {
  expect({first_ + 1, "norm"}, found, kFloat, {k_}, " (k " + std::to_string(k_) + ")");
  return static_cast<const float*>(found.data);
}

qc_linear_edges LinearEdges::resolve(const Api& api, const OrtKernelContext* context, const Shape& shape) const {
  qc_linear_edges out{constant_norm_, epsilon_, nullptr, gate_};
  if (out.norm == nullptr)
    if (const OrtValue* value = find_input(api, context, first_ + 1)) out.norm = checked_norm(tensor(api, value));
  if (out.norm == nullptr && epsilon_ != 0)
    throw Failure{kInvalidArgument, name_text({first_ + 1, "norm"}) + " is missing, and attribute 'epsilon' is " +
                                        std::to_string(epsilon_) + ", expected 0 without it"};
  if (const OrtValue* value = find_input(api, context, first_)) {
    const Tensor residual = tensor(api, value);
    expect({first_, "residual"}, residual, kFloat, shape, ", the shape of the output");
    out.residual = static_cast<const float*>(residual.data);
  }
  return out;
}

}  // namespace qc::ort
