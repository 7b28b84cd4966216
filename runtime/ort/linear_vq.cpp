// LinearVQ: Y[..., n] = X[..., k] . W^T (+ bias), W vector-quantized; gate, residual and norm (linear_edges.h).
#include "failure.h"
#include "linear_edges.h"
#include "ops.h"
#include "vq_weight.h"

namespace qc::ort {
namespace {

constexpr OpInput kInputs[] = {
    {kFloat, kRequired},    // X
    {kUint8, kRequired},    // codes
    {kInt8, kRequired},     // codebooks
    {kFloat16, kRequired},  // codebook_scales
    {kFloat16, kRequired},  // scales
    {kFloat, kOptional},    // bias
    {kFloat, kOptional},    // residual
    {kFloat, kOptional},    // norm
};

class LinearVQ final : public Kernel {
 public:
  LinearVQ(const Api& api, const OrtKernelInfo* info)
      : weight_(api, info),
        bias_(api, info, 5, weight_.n()),
        edges_(api, info, 6, weight_.n(), weight_.k()),
        activation_(static_cast<int32_t>(int_attribute(api, info, "activation"))) {
    if (activation_ == QC_ACT_FLOAT || activation_ == QC_ACT_INT8_BLOCK) return;
    const char* name = activation_ == QC_ACT_INT8_TOKEN    ? " (int8 per token)"
                       : activation_ == QC_ACT_INT8_STATIC ? " (static int8)"
                                                           : "";
    throw Failure{kInvalidGraph, "attribute 'activation' is " + std::to_string(activation_) + name +
                                     ", expected 0 (float) or 2 (int8 per block of 128)"};
  }

  void compute(const Api& api, OrtKernelContext* context) const override {
    const Tensor x = required_input(api, context, {0, "X"});
    if (x.type != kFloat || x.shape.empty() || x.shape.back() != weight_.k())
      throw Failure{kInvalidArgument, "input 0 (X) has shape " + text(x.shape) + ", expected float [..., " +
                                          std::to_string(weight_.k()) + "]"};
    const qc_vq_weight weight = weight_.resolve(api, context);
    const float* bias = bias_.resolve(api, context);

    Shape shape = x.shape;
    shape.back() = edges_.columns();
    const qc_linear_edges edges = edges_.resolve(api, context, shape);
    OrtValue* output = nullptr;
    check(api, api.KernelContext_GetOutput(context, size_t{0}, shape.data(), shape.size(), &output));
    void* y = nullptr;
    check(api, api.GetTensorMutableData(output, &y));

    int64_t rows = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
    if (rows == 0) return;

    SessionPool pool(api, context);
    const qc_context where = pool.context();
    const float* in = static_cast<const float*>(x.data);
    if (qc_linear_vq(&where, &weight, activation_, &edges, rows, in, bias, static_cast<float*>(y)) != 0)
      throw Failure{kFail, qc_last_error()};
  }

 private:
  VqWeight weight_;
  Bias bias_;
  LinearEdges edges_;
  int32_t activation_;
};

}  // namespace

const OpDescription kLinearVQ = {
    "LinearVQ", kInputs, sizeof(kInputs) / sizeof(kInputs[0]), "n", true,
    [](const Api& api, const OrtKernelInfo* info) -> std::unique_ptr<Kernel> {
      return std::make_unique<LinearVQ>(api, info);
    },
    true};

}  // namespace qc::ort
