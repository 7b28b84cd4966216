#include "shape_inference.h"

#include <atomic>
#include <string>
#include <vector>

#include "failure.h"

namespace qc::ort {

void infer_output_shape(const Api& api, const OpDescription& op, OrtShapeInferContext* context) {
  OrtTensorTypeAndShapeInfo* input = nullptr;  // belongs to the context
  size_t rank = 0;
  if (!succeeded(api, api.ShapeInferContext_GetInputTypeShape(context, size_t{0}, &input)) || input == nullptr ||
      !succeeded(api, api.GetDimensionsCount(input, &rank)) || rank == 0)
    return;  // rank 0 also stands for "rank unknown"

  const OrtOpAttr* attribute = nullptr;
  int64_t last = 0;
  size_t bytes = 0;
  if (!succeeded(api, api.ShapeInferContext_GetAttribute(context, op.output_dimension, &attribute)) ||
      !succeeded(api, api.ReadOpAttr(attribute, kAttributeInt, static_cast<void*>(&last), sizeof(last), &bytes)))
    return;

  int64_t gate = 0;
  if (op.gated && succeeded(api, api.ShapeInferContext_GetAttribute(context, "gate", &attribute)) &&
      succeeded(api, api.ReadOpAttr(attribute, kAttributeInt, static_cast<void*>(&gate), sizeof(gate), &bytes)) && gate)
    last /= 2;

  if (op.output_count == 3) {
    OrtTensorTypeAndShapeInfo* past = nullptr;  // [1, heads, capacity, head size]
    int64_t sizes[4];
    size_t past_rank = 0;
    if (!succeeded(api, api.ShapeInferContext_GetInputTypeShape(context, size_t{3}, &past)) || past == nullptr ||
        !succeeded(api, api.GetDimensionsCount(past, &past_rank)) || past_rank != 4 ||
        !succeeded(api, api.GetDimensions(past, sizes, past_rank)) || sizes[3] < 0)
      return;
    last *= sizes[3];
    for (size_t output = 1; output < op.output_count; ++output)
      succeeded(api, api.ShapeInferContext_SetOutputTypeShape(context, output, past));
  }

  std::vector<int64_t> dims(rank);
  std::vector<const char*> names(rank, "");
  if (!succeeded(api, api.GetDimensions(input, dims.data(), rank)) ||
      !succeeded(api, api.GetSymbolicDimensions(input, names.data(), rank)))
    return;
  if (op.replaces_last) {
    dims.pop_back();
    names.pop_back();
  }
  dims.push_back(last);
  names.push_back("");

  // An unknown dimension needs a name, and one that no other dimension has: equal names mean equal sizes.
  static std::atomic<uint64_t> unknowns{0};
  std::vector<std::string> invented(dims.size());
  for (size_t i = 0; i < dims.size(); ++i) {
    if (dims[i] >= 0 || (names[i] != nullptr && names[i][0] != '\0')) continue;
    invented[i] = "ai.qcompiler.unknown_" + std::to_string(unknowns.fetch_add(1, std::memory_order_relaxed));
    names[i] = invented[i].c_str();
  }

  OrtTensorTypeAndShapeInfo* output = nullptr;
  if (!succeeded(api, api.CreateTensorTypeAndShapeInfo(&output))) return;
  const int float_type = kFloat;
  if (succeeded(api, api.SetTensorElementType(output, float_type)) &&
      succeeded(api, api.SetDimensions(output, dims.data(), dims.size())) &&
      succeeded(api, api.SetSymbolicDimensions(output, names.data(), names.size())))
    succeeded(api, api.ShapeInferContext_SetOutputTypeShape(context, size_t{0}, output));
  api.ReleaseTensorTypeAndShapeInfo(output);
}

}  // namespace qc::ort
