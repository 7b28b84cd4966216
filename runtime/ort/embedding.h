// Y[..., k] = W[indices]: rows of a matrix decoded to float. As in ONNX Gather, -n ... -1 count from the end.
#ifndef QCOMPILER_ORT_EMBEDDING_H
#define QCOMPILER_ORT_EMBEDDING_H

#include "arguments.h"
#include "failure.h"
#include "ops.h"

namespace qc::ort {

// `Weight` has the matrix, from input 1 on; `decode(context, weight, count, rows, y)` is the kernel of its kind.
template <class Weight, auto decode>
class Embedding final : public Kernel {
 public:
  explicit Embedding(Weight weight) : weight_(std::move(weight)) {}

  void compute(const Api& api, OrtKernelContext* context) const override {
    const Tensor indices = required_input(api, context, {0, "indices"});
    if (indices.type != kInt64) throw Failure{kInvalidArgument, "input 0 (indices) is not int64"};
    const auto weight = weight_.resolve(api, context);

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
    if (decode(&where, &weight, count, rows, static_cast<float*>(y)) != 0) throw Failure{kFail, qc_last_error()};
  }

 private:
  Weight weight_;
};

}  // namespace qc::ort

#endif
