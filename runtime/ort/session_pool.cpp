#include <algorithm>
#include <cstdlib>
#include <thread>

#include "failure.h"
#include "ops.h"

namespace qc::ort {
namespace {

struct Job {
  void (*body)(void* user, size_t index);
  void* user;
};

// ONNX Runtime tells nobody how many threads a session has. The number only decides into how many pieces the work is
// cut (pieces are claimed one at a time), so too many costs little, and the result does not depend on it.
int32_t thread_hint() {
  static const int32_t hint = [] {
    constexpr int32_t kMost = 64;
    const char* wish = std::getenv("QCOMPILER_THREADS");
    const int32_t wished = wish ? std::atoi(wish) : 0;
    const int32_t found = wished > 0 ? wished : static_cast<int32_t>(std::thread::hardware_concurrency());
    return std::clamp(found, int32_t{1}, kMost);
  }();
  return hint;
}

}  // namespace

qc_context SessionPool::context() { return {&SessionPool::parallel_for, this, thread_hint(), nullptr}; }

void SessionPool::parallel_for(void* pool, void (*body)(void* user, size_t index), size_t count, void* user) {
  if (count > 1) {
    const auto* self = static_cast<const SessionPool*>(pool);
    // Early versions refuse null user data, so ours is never null. No batches: one index is claimed at a time.
    Job job{body, user};
    auto run = [](void* raw, size_t index) {
      const auto* job = static_cast<const Job*>(raw);
      job->body(job->user, index);
    };
    void (*function)(void*, size_t) = run;
    if (succeeded(self->api_, self->api_.KernelContext_ParallelFor(self->context_, function, count, size_t{0},
                                                                   static_cast<void*>(&job))))
      return;
  }
  for (size_t index = 0; index < count; ++index) body(user, index);
}

}  // namespace qc::ort
