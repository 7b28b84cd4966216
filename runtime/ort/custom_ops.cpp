// RegisterCustomOps: what `session_options.register_custom_ops_library(path)` calls.
#include <cstdio>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arguments.h"
#include "failure.h"
#include "ops.h"
#include "shape_inference.h"

namespace qc::ort {
namespace {

constexpr const char* kDomain = "ai.qcompiler";

// ONNX Runtime sees the base; our callbacks find the rest behind it.
struct Op : OrtCustomOp {
  Api api;
  const OpDescription* description;
};

struct Node {
  Api api;
  std::string where;
  std::unique_ptr<Kernel> kernel;
};

const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

OrtStatus* QC_ORT_CALL create(const OrtCustomOp* op, const void*, const OrtKernelInfo* info, void** out) {
  const Api& api = self(op).api;
  const OpDescription& description = *self(op).description;
  std::string where = description.name;
  return guarded(api, where, [&] {
    where = node_text(api, info, description.name);
    auto node = std::make_unique<Node>(Node{api, where, description.create(api, info)});
    *out = node.release();
  });
}

OrtStatus* QC_ORT_CALL compute(void* raw, OrtKernelContext* context) {
  const auto* node = static_cast<const Node*>(raw);
  return guarded(node->api, node->where, [&] { node->kernel->compute(node->api, context); });
}

OrtStatus* QC_ORT_CALL infer(const OrtCustomOp* op, OrtShapeInferContext* context) {
  try {
    infer_output_shape(self(op).api, *self(op).description, context);
  } catch (...) {
    // Out of memory: the shape stays unknown.
  }
  return nullptr;
}

// ONNX Runtime before 1.24 dereferences null in shape inference when a node leaves out an input in the middle, as every
// symmetric layer with a bias does (no zeros). Without our function it does not go there.
bool inference_is_safe(const char* version) {
  int major = 0, minor = 0;
  if (version == nullptr || std::sscanf(version, "%d.%d", &major, &minor) != 2) return false;
  return major > 1 || (major == 1 && minor >= 24);
}

Op make_op(const Api& api, const OpDescription& description, bool with_inference) {
  Op op{};
  op.api = api;
  op.description = &description;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* op) { return self(op).description->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // null: the CPU
  op.GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).description->input_count; };
  op.GetInputType = [](const OrtCustomOp* op, size_t i) -> int { return self(op).description->inputs[i].type; };
  op.GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) -> int {
    return self(op).description->inputs[i].characteristic;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) -> int { return kMemoryDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).description->output_count; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return kFloat; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return kRequired; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* raw) { delete static_cast<Node*>(raw); };
  op.InferOutputShapeFn = with_inference ? infer : nullptr;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return std::numeric_limits<int>::max(); };
  return op;
}

struct Registration {
  Api api;
  Op ops[7];
  OrtCustomOpDomain* domain = nullptr;
};

// One registration for each ONNX Runtime in the process. Never freed: sessions hold pointers into it, and may live
// longer than this library's static objects.
Registration& registration(const Api& api, const char* version) {
  static std::mutex mutex;
  static auto* all = new std::vector<std::unique_ptr<Registration>>;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& existing : *all)
    if (existing->api.table == api.table) return *existing;

  const bool with_inference = inference_is_safe(version);
  auto made = std::make_unique<Registration>(Registration{
      api, {make_op(api, kLinearNBit, with_inference), make_op(api, kEmbeddingNBit, with_inference),
       make_op(api, kLinearExpertsNBit, with_inference), make_op(api, kLinearMixed, with_inference),
       make_op(api, kLinearVQ, with_inference), make_op(api, kEmbeddingVQ, with_inference),
       make_op(api, kGroupQueryAttention, with_inference)},
      nullptr});
  check(api, api.CreateCustomOpDomain(kDomain, &made->domain));
  for (const Op& op : made->ops) check(api, api.CustomOpDomain_Add(made->domain, static_cast<const OrtCustomOp*>(&op)));
  all->push_back(std::move(made));
  return *all->back();
}

}  // namespace
}  // namespace qc::ort

extern "C" QC_EXPORT qc::ort::OrtStatus* QC_ORT_CALL RegisterCustomOps(qc::ort::OrtSessionOptions* options,
                                                                       const qc::ort::OrtApiBase* base) {
  using namespace qc::ort;
  const char* version = base->GetVersionString();
  const Api api{base->GetApi(kApiVersion)};
  if (api.table == nullptr) {
    // CreateStatus has been entry 0 since API version 1.
    const Api oldest{base->GetApi(1)};
    if (oldest.table == nullptr) return nullptr;
    const std::string message = std::string("qcompiler: this is ONNX Runtime ") + (version ? version : "(unknown)") +
                                ", the op library needs 1.17 or later";
    const int code = kNotImplemented;
    return oldest.CreateStatus(code, message.c_str());
  }
  return guarded(api, "qcompiler: registering the ops", [&] {
    check(api, api.AddCustomOpDomain(options, registration(api, version).domain));
  });
}
