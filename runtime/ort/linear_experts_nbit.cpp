// LinearExpertsNBit: Y[i] = X[i] . W[expert[i]]^T (+ bias[expert[i]]): a packed matrix for each expert, one after another.
#include "arguments.h"
#include "failure.h"
#include "ops.h"

namespace qc::ort {
namespace {

constexpr OpInput kInputs[] = {
    {kFloat, kRequired},    // X
    {kInt64, kRequired},    // expert
    {kUint8, kRequired},    // codes
    {kFloat16, kRequired},  // scales
    {kUint8, kOptional},    // zeros
    {kFloat, kOptional},    // bias
};

int64_t expert_count(const Api& api, const OrtKernelInfo* info) {
  const int64_t experts = int_attribute(api, info, "experts");
  constexpr int64_t kLimit = int64_t{1} << 24;
  if (experts < 1 || experts >= kLimit)
    throw Failure{kInvalidGraph, "attribute 'experts' is " + std::to_string(experts) + ", expected 1 to " +
                                     std::to_string(kLimit - 1)};
  return experts;
}

class LinearExpertsNBit final : public Kernel {
 public:
  LinearExpertsNBit(const Api& api, const OrtKernelInfo* info)
      : experts_(expert_count(api, info)), weight_(api, info, 2, experts_), bias_(api, info, 5, weight_.n(), experts_) {
    const int64_t activation = int_attribute(api, info, "activation");
    if (activation < QC_ACT_FLOAT || activation > QC_ACT_INT8_BLOCK)
      throw Failure{kInvalidGraph, "attribute 'activation' is " + std::to_string(activation) +
                                       ", expected 0 (float), 1 (int8 per token) or 2 (int8 per block of 128)"};
    activation_ = static_cast<int32_t>(activation);
  }

  void compute(const Api& api, OrtKernelContext* context) const override {
    const Tensor x = required_input(api, context, {0, "X"});
    if (x.type != kFloat || x.shape.size() != 2 || x.shape.back() != weight_.k())
      throw Failure{kInvalidArgument, "input 0 (X) has shape " + text(x.shape) + ", expected float [rows, " +
                                          std::to_string(weight_.k()) + "]"};
    const int64_t rows = x.shape[0];
    const Tensor expert = required_input(api, context, {1, "expert"});
    if (expert.type != kInt64 || expert.shape != Shape{rows})
      throw Failure{kInvalidArgument, "input 1 (expert) has shape " + text(expert.shape) + ", expected int64 [" +
                                          std::to_string(rows) + "], one for each row of X"};
    const qc_weight weight = weight_.resolve(api, context);
    const float* bias = bias_.resolve(api, context);

    const Shape shape = {rows, weight.n};
    OrtValue* output = nullptr;
    check(api, api.KernelContext_GetOutput(context, size_t{0}, shape.data(), shape.size(), &output));
    void* y = nullptr;
    check(api, api.GetTensorMutableData(output, &y));
    if (rows == 0) return;

    SessionPool pool(api, context);
    const qc_context where = pool.context();
    if (qc_linear_experts_nbit(&where, &weight, experts_, activation_, rows, static_cast<const float*>(x.data),
                               static_cast<const int64_t*>(expert.data), bias, static_cast<float*>(y)) != 0)
      throw Failure{kFail, qc_last_error()};
  }

 private:
  int64_t experts_;
  Weight weight_;
  Bias bias_;
  int32_t activation_;
};

}  // namespace

const OpDescription kLinearExpertsNBit = {
    "LinearExpertsNBit", kInputs, sizeof(kInputs) / sizeof(kInputs[0]), "n", true,
    [](const Api& api, const OrtKernelInfo* info) -> std::unique_ptr<Kernel> {
      return std::make_unique<LinearExpertsNBit>(api, info);
    }};

}  // namespace qc::ort
