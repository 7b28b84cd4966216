// LinearNBit:  Y[..., n] = X[..., k] . W^T (+ bias), W packed; gate, residual and norm (linear_edges.h).
// LinearMixed: the same without the outlier columns of X, which meet float weights: + X[..., columns] . outliers^T.
#include <atomic>

#include "arguments.h"
#include "failure.h"
#include "linear_edges.h"
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
    {kFloat, kOptional},    // activation_scale
    {kInt8, kOptional},     // activation_zero
    {kFloat, kOptional},    // activation_offset
    {kFloat, kOptional},    // residual
    {kFloat, kOptional},    // norm
};

constexpr OpInput kMixedInputs[] = {
    {kFloat, kRequired},    // X
    {kUint8, kRequired},    // codes
    {kFloat16, kRequired},  // scales
    {kUint8, kOptional},    // zeros
    {kInt32, kRequired},    // columns
    {kFloat16, kRequired},  // outliers
    {kFloat, kOptional},    // bias
    {kFloat, kOptional},    // activation_scale
    {kInt8, kOptional},     // activation_zero
    {kFloat, kOptional},    // activation_offset
};

// The columns and their float weights, of inputs `first` and the one after it.
qc_outliers resolve_outliers(const Api& api, const OrtKernelContext* context, size_t first, int64_t n, AlignedCopies& copies) {
  const InputName columns_name{first, "columns"}, weights_name{first + 1, "outliers"};
  const Tensor columns = copies.of(required_input(api, context, columns_name));
  const Tensor weights = copies.of(required_input(api, context, weights_name));
  const int64_t count = columns.shape.size() == 1 ? columns.shape[0] : 0;
  expect(columns_name, columns, kInt32, {count}, " (one dimension)");
  expect(weights_name, weights, kFloat16, {(n + 15) / 16, count, 16}, " (n " + std::to_string(n) + ")");
  return {count, static_cast<const int32_t*>(columns.data), static_cast<const uint16_t*>(weights.data)};
}

template <bool Mixed>
class Linear final : public Kernel {
 public:
  Linear(const Api& api, const OrtKernelInfo* info)
      : weight_(api, info, 1),
        activations_(api, info, Mixed ? 7 : 5, weight_.n()),
        bias_(api, info, Mixed ? 6 : 4, weight_.n()) {
    if (!Mixed) edges_ = std::make_unique<LinearEdges>(api, info, 8, weight_.n(), weight_.k());
  }

  void compute(const Api& api, OrtKernelContext* context) const override {
    const Tensor x = required_input(api, context, {0, "X"});
    if (x.type != kFloat || x.shape.empty() || x.shape.back() != weight_.k())
      throw Failure{kInvalidArgument, "input 0 (X) has shape " + text(x.shape) + ", expected float [..., " +
                                          std::to_string(weight_.k()) + "]"};
    const qc_weight weight = weight_.resolve(api, context);
    const float* bias = bias_.resolve(api, context);
    qc_activation_range storage{};
    const qc_activation_range* range = activations_.resolve(api, context, storage);
    qc_outliers outliers{};
    AlignedCopies copies;
    if (Mixed) outliers = resolve_outliers(api, context, 4, weight.n, copies);

    Shape shape = x.shape;
    shape.back() = Mixed ? weight.n : edges_->columns();
    qc_linear_edges edges{};
    if (!Mixed) edges = edges_->resolve(api, context, shape);
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
    const float* in = static_cast<const float*>(x.data);
    float* out = static_cast<float*>(y);
    const int32_t kind = activations_.kind();
    const int32_t code = Mixed ? qc_linear_mixed(&where, &weight, kind, range, &outliers, rows, in, bias, out)
                               : qc_linear_nbit(&where, &weight, kind, range, &edges, rows, in, bias, out);
    if (code != 0) throw Failure{kFail, qc_last_error()};
  }

 private:
  Weight weight_;
  Activations activations_;
  Bias bias_;
  std::unique_ptr<LinearEdges> edges_;  // LinearNBit alone
};

template <bool Mixed>
std::unique_ptr<Kernel> create(const Api& api, const OrtKernelInfo* info) {
  return std::make_unique<Linear<Mixed>>(api, info);
}

}  // namespace

const OpDescription kLinearNBit = {"LinearNBit", kInputs, sizeof(kInputs) / sizeof(kInputs[0]), "n", true, create<false>, true};

const OpDescription kLinearMixed = {
    "LinearMixed", kMixedInputs, sizeof(kMixedInputs) / sizeof(kMixedInputs[0]), "n", true, create<true>};

}  // namespace qc::ort

const void* qc_debug_last_codes_pointer(void) { return qc::ort::last_codes.load(std::memory_order_relaxed); }
