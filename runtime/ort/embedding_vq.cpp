// EmbeddingVQ: Y[..., k] = W[indices], W vector-quantized, rows decoded to float. As in ONNX Gather, -n ... -1 count from the end.
#include "failure.h"
#include "ops.h"
#include "vq_weight.h"

namespace qc::ort {
namespace {

constexpr OpInput kInputs[] = {
    {kInt64, kRequired},    // indices
    {kUint8, kRequired},    // codes
    {kInt8, kRequired},     // codebooks
    {kFloat16, kRequired},  // codebook_scales
    {kFloat16, kRequired},  // scales
};

class EmbeddingVQ final : public Kernel {
 public:
  EmbeddingVQ(const Api& api, const OrtKernelInfo* info) : weight_(api, info) {}

  void compute(const Api& api, OrtKernelContext* context) const override {
    const Tensor indices = required_input(api, context, {0, "indices"});
    if (indices.type != kInt64) throw Failure{kInvalidArgument, "input 0 (indices) is not int64"};
    const qc_vq_weight weight = weight_.resolve(api, context);

    int64_t count = 1;
    for (int64_t dimension : indices.shape) count *= dimension;
    std::vector<int64_t> storage;
    const int64_t* rows = normalized(static_cast<const int64_t*>(indices.data), count, weight.n, storage);

    Shape shape = indices.shape;
    shape.push_back(weight.k);
    OrtValue* output = nullptr;
    check(api, api.KernelContext_GetOutput(context, size_t{0}, shape.data(), shape.size(), &output));
    void* y = nullptr;
    check(api, api.GetTensorMutableData(output, &y));
    if (count == 0) return;

    SessionPool pool(api, context);
    const qc_context where = pool.context();
    if (qc_embedding_vq(&where, &weight, count, rows, static_cast<float*>(y)) != 0)
      throw Failure{kFail, qc_last_error()};
  }

 private:
  VqWeight weight_;
};

}  // namespace

const OpDescription kEmbeddingVQ = {
    "EmbeddingVQ", kInputs, sizeof(kInputs) / sizeof(kInputs[0]), "k", false,
    [](const Api& api, const OrtKernelInfo* info) -> std::unique_ptr<Kernel> {
      return std::make_unique<EmbeddingVQ>(api, info);
    }};

}  // namespace qc::ort
