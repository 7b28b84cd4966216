// The ops of domain ai.qcompiler, version 1, as ONNX Runtime sees them.
#ifndef QCOMPILER_ORT_OPS_H
#define QCOMPILER_ORT_OPS_H

#include <memory>

#include "ort_abi.h"
#include "qcompiler_ops.h"

namespace qc::ort {

// One node of a session. compute() may run in several threads at once, so it changes nothing.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(const Api& api, OrtKernelContext* context) const = 0;
};

struct OpInput {
  ElementType type;
  Characteristic characteristic;
};

// An op has one float output (attention: two more, the caches, of the shapes of inputs 3 and 4) whose shape is that of input 0 with the last dimension replaced (`replaces_last`) or with
// one more dimension. That dimension is the attribute `output_dimension`, or half of it (`gated`), or with caches that many heads.
struct OpDescription {
  const char* name;
  const OpInput* inputs;
  size_t input_count;
  const char* output_dimension;
  bool replaces_last;
  std::unique_ptr<Kernel> (*create)(const Api& api, const OrtKernelInfo* info);
  bool gated = false;  // half of that dimension where the attribute `gate` is there and not 0
  size_t output_count = 1;
};

extern const OpDescription kLinearNBit;
extern const OpDescription kLinearMixed;
extern const OpDescription kEmbeddingNBit;
extern const OpDescription kLinearExpertsNBit;
extern const OpDescription kLinearVQ;
extern const OpDescription kEmbeddingVQ;
extern const OpDescription kGroupQueryAttention;

// The kernels' work on the thread pool of the session that calls. Valid during one compute().
class SessionPool {
 public:
  SessionPool(const Api& api, const OrtKernelContext* context) : api_(api), context_(context) {}

  qc_context context();

 private:
  static void parallel_for(void* pool, void (*body)(void* user, size_t index), size_t count, void* user);

  const Api& api_;
  const OrtKernelContext* context_;
};

}  // namespace qc::ort

extern "C" {
// For tests: the codes that the last LinearNBit of this process read, to compare with the map of the weights file.
QC_EXPORT const void* qc_debug_last_codes_pointer(void);
}

#endif
