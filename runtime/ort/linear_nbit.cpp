// LinearNBit: Y[..., n] = X[..., k] . W^T (+ bias), W packed.
#include <atomic>

#include "arguments.h"
#include "failure.h"
#include "ops.h"

namespace qc::ort {
namespace {

std::atomic<const void*> last_codes{nullptr};

constexpr OpInput kInputs[] = {
    {kFloat, kRequired},    // X
    {kUint8, kRequired},    // codes
    {kFloat16, kRequired},  // scales
    {kUint8, kOptional},    // zeros
    {kFloat, kOptional},    // bias
};

class LinearNBit final : public Kernel {
 public:
  LinearNBit(const Api& api, const OrtKernelInfo* info) : weight_(api, info, 1), bias_(api, info, 4, weight_.n()) {
    const int64_t activation = int_attribute(api, info, "activation");
    if (activation < QC_ACT_FLOAT || activation > QC_ACT_INT8_BLOCK)
      throw Failure{kInvalidGraph, "attribute 'activation' is " + std::to_string(activation) +
                                       ", expected 0 (float), 1 (int8 per token) or 2 (int8 per block of 128)"};
    activation_ = static_cast<int32_t>(activation);
  }

  void compute(const Api& api, OrtKernelContext* context) const override {
    const Tensor x = required_input(api, context, {0, "X"});
    if (x.type != kFloat || x.shape.empty() || x.shape.back() != weight_.k())
      throw Failure{kInvalidArgument, "input 0 (X) has shape " + text(x.shape) + ", expected float [..., " +
                                          std::to_string(weight_.k()) + "]"};
    const qc_weight weight = weight_.resolve(api, context);
    const float* bias = bias_.resolve(api, context);

    Shape shape = x.shape;
    shape.back() = weight.n;
    OrtValue* output = nullptr;
    check(api, api.KernelContext_GetOutput(context, size_t{0}, shape.data(), shape.size(), &output));
    void* y = nullptr;
    check(api, api.GetTensorMutableData(output, &y));

    int64_t rows = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
    if (rows == 0) return;

    last_codes.store(weight.codes, std::memory_order_relaxed);
    SessionPool pool(api, context);
    const qc_context where = pool.context();
    if (qc_linear_nbit(&where, &weight, activation_, rows, static_cast<const float*>(x.data), bias,
                       static_cast<float*>(y)) != 0)
      throw Failure{kFail, qc_last_error()};
  }

 private:
  Weight weight_;
  Bias bias_;
  int32_t activation_;
};

}  // namespace

const OpDescription kLinearNBit = {
    "LinearNBit", kInputs, sizeof(kInputs) / sizeof(kInputs[0]), "n", true,
    [](const Api& api, const OrtKernelInfo* info) -> std::unique_ptr<Kernel> {
      return std::make_unique<LinearNBit>(api, info);
    }};

}  // namespace qc::ort

const void* qc_debug_last_codes_pointer(void) { return qc::ort::last_codes.load(std::memory_order_relaxed); }
