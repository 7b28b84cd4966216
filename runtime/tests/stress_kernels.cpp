// The library under load, with its own working memory (compare_kernels has that of guarded.cpp).
//
//   stress_kernels threads [ROUNDS]   callers at once that share weights, on a thread pool of this program and on the library's,
//                                     with different numbers of threads, which another thread keeps changing; every result is
//                                     that of one thread, bit for bit. For -fsanitize=thread.
//   stress_kernels heap CASES         generated calls on every ISA, every array an allocation of its own. For -fsanitize=address
//   stress_kernels soak RUNS [LEAK]   calls one after another: anonymous memory must not grow. LEAK: bytes that each run leaks
//
// Exit code 1: a difference, or growth.
#if defined(__linux__)
#include <malloc.h>
#endif

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "calls.h"

namespace {

// ── Threads ──

// A thread pool as a host has one: callers wait for their own job and help with it.
class HostPool {
 public:
  explicit HostPool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~HostPool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  static void parallel_for(void* pool, void (*body)(void* user, size_t index), size_t count, void* user) {
    static_cast<HostPool*>(pool)->run({body, user, count, 0, 0});
  }

 private:
  struct Job {
    void (*body)(void*, size_t);
    void* user;
    size_t count, next, done;
  };

  void run(Job job) {
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.push_back(&job);
    wake_.notify_all();
    while (job.next < job.count) one(job, lock);
    done_.wait(lock, [&] { return job.done == job.count; });
  }

  // Takes one index; a job leaves the list with its last.
  void one(Job& job, std::unique_lock<std::mutex>& lock) {
    const size_t index = job.next++;
    if (job.next == job.count) {
      for (auto it = jobs_.begin(); it != jobs_.end(); ++it) {
        if (*it == &job) {
          jobs_.erase(it);
          break;
        }
      }
    }
    lock.unlock();
    job.body(job.user, index);
    lock.lock();
    if (++job.done == job.count) done_.notify_all();
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
      if (stopping_) return;
      one(*jobs_.front(), lock);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Job*> jobs_;
  std::vector<std::thread> threads_;
  bool stopping_ = false;
};

// Matrices large enough to be cut into pieces, and one that is not.
std::vector<Case> shared_cases() {
  std::vector<Case> out;
  Random random(7);
  const auto add = [&](const Form& form, int64_t n, int64_t k, int64_t rows) {
    out.push_back(make_case(form, n, k, rows, random));
  };
  add({Form::kLinear, QC_ACT_INT8_BLOCK, 32, 4, true, 0, 0, 0, 0}, 1101, 1030, 3);
  add({Form::kLinear, QC_ACT_INT8_TOKEN, 0, 8, false, 0, 0, 0, 0}, 1101, 600, 1);
  add({Form::kLinear, QC_ACT_FLOAT, 64, 3, false, 0, 0, 0, 0}, 700, 600, 17);
  add({Form::kLinear, QC_ACT_INT8_STATIC, 128, 2, true, 0, 0, 0, 0}, 150, 900, 190);
  add({Form::kMixed, QC_ACT_INT8_BLOCK, 64, 8, false, 0, 0, 0, 0}, 1101, 600, 5);
  add({Form::kExperts, QC_ACT_INT8_BLOCK, 128, 8, false, 0, 0, 0, 0}, 1101, 600, 9);
  add({Form::kVq, QC_ACT_INT8_BLOCK, 128, 8, false, 2, 64, 32, 256}, 3001, 600, 1);
  add({Form::kVq, QC_ACT_FLOAT, 32, 8, false, 2, 16, 0, 0}, 4001, 600, 1);
  add({Form::kLinear, QC_ACT_INT8_BLOCK, 64, 4, false, 0, 0, 0, 0}, 40, 130, 2);
  // Gate and up, after a normalization and before an addition.
  add({Form::kLinear, QC_ACT_INT8_BLOCK, 64, 4, false, 0, 0, 0, 0}, 2048, 640, 3);
  Case& gated = out.back();
  gated.gate = QC_GATE_SILU, gated.epsilon = 1e-5f;
  gated.norm.assign(640, 0.75f);
  gated.residual.assign(3 * 1024, 0.5f);
  return out;
}

std::vector<float> result(const Case& c, const qc_context& context) {
  std::vector<float> y(static_cast<size_t>(values_of(c, false)));
  if (call(c, Arrays::of(c), context, false, y.data())) {
    std::printf("%s: %s\n", c.name().c_str(), qc_last_error());
    std::exit(1);
  }
  return y;
}

int threads(int64_t rounds) {
  constexpr int kCallers = 4;
  constexpr int kThreads[] = {1, 2, 3, 7};
  const std::vector<Case> cases = shared_cases();
  std::vector<std::vector<float>> first[kCallers];
  std::atomic<bool> running{true};
  std::atomic<int64_t> calls{0}, wrong{0};
  HostPool host(3);
  std::vector<std::thread> callers;
  // The very first call, where the library looks at the CPU and starts its pool, is one of several at once.
  for (int i = 0; i < kCallers; ++i) {
    callers.emplace_back([&, i] {
      for (int64_t round = 0; round < rounds; ++round) {
        for (size_t at = 0; at < cases.size(); ++at) {
          const int64_t turn = i + round + int64_t(at);
          const bool own = turn % 2 != 0;
          const qc_context context = {own ? HostPool::parallel_for : qc_pool_parallel_for, own ? &host : nullptr,
                                      kThreads[turn / 2 % 4], nullptr};
          std::vector<float> y = result(cases[at], context);
          ++calls;
          if (round == 0) {
            first[i].push_back(std::move(y));
          } else if (std::memcmp(y.data(), first[i][at].data(), y.size() * sizeof(float))) {
            ++wrong;
          }
        }
      }
    });
  }
  std::thread changing([&] {
    for (int32_t count = 1; running; count = count % 5 + 1) {
      qc_pool_set_threads(count);
      std::this_thread::yield();
    }
  });
  for (std::thread& caller : callers) caller.join();
  running = false;
  changing.join();
  for (size_t at = 0; at < cases.size(); ++at) {
    const std::vector<float> want = result(cases[at], {nullptr, nullptr, 1, "generic"});
    for (const auto& results : first) {
      if (std::memcmp(results[at].data(), want.data(), want.size() * sizeof(float)) == 0) continue;
      std::printf("%s: several threads give other values\n", cases[at].name().c_str());
      ++wrong;
    }
  }
  std::printf("%" PRId64 " calls by %d callers at once (%s), %" PRId64 " different\n", calls.load(), kCallers, qc_isa(),
              wrong.load());
  return wrong ? 1 : 0;
}

// ── Memory ──

int heap(int64_t count) {
  const std::vector<Form> forms = all_forms();
  for (int64_t i = 0; i < count; ++i) {
    Random random(uint64_t(i) + 77);
    Case c = random_case(forms[size_t(i) % forms.size()], some_rows(i / int64_t(forms.size()), random), random);
    // An allocation may be larger than what its vector holds.
    c.codebooks.shrink_to_fit();
    c.columns.shrink_to_fit();
    c.indices.shrink_to_fit();
    const std::vector<float> want = result(c, {nullptr, nullptr, 1, "generic"});
    for (const std::string& isa : isas()) {
      const std::vector<float> got = result(c, {nullptr, nullptr, 1, isa.c_str()});
      if (want.empty() || std::memcmp(got.data(), want.data(), want.size() * sizeof(float)) == 0) continue;
      std::printf("%s: %s differs from generic\n", c.name().c_str(), isa.c_str());
      return 1;
    }
  }
  std::printf("%" PRId64 " cases (%s)\n", count, qc_isas());
  return 0;
}

// KiB of memory that no file stands behind.
int64_t anonymous_kib() {
  int64_t kib = -1;
  char line[256];
  if (FILE* status = std::fopen("/proc/self/status", "r")) {
    while (std::fgets(line, sizeof line, status)) std::sscanf(line, "RssAnon: %" SCNd64, &kib);
    std::fclose(status);
  }
  if (kib < 0) {
    std::puts("/proc/self/status has no RssAnon");
    std::exit(2);
  }
  return kib;
}

constexpr int kSoakThreads = 3;

// The library's pool, but that each thread takes a piece before any takes another.
void by_every_thread(void*, void (*body)(void* user, size_t index), size_t count, void* user) {
  struct Shared {
    void (*body)(void*, size_t);
    void* user;
    int wanted;
    std::atomic<int> come{0};
  } shared{body, user, int(std::min<size_t>(count, kSoakThreads))};
  const auto piece = [](void* own, size_t index) {
    Shared& all = *static_cast<Shared*>(own);
    if (all.come.fetch_add(1) < all.wanted) {
      while (all.come.load() < all.wanted) std::this_thread::yield();
    }
    all.body(all.user, index);
  };
  qc_pool_parallel_for(nullptr, piece, count, &shared);
}

int soak(int64_t runs, int64_t leak) {
  // Some pages of a stack that grows late: a byte in 15 runs of the long form, three a run in the short one.
  constexpr int64_t kAllowedKib = 64;
  const std::vector<std::string> names = isas();
  std::vector<Case> cases;
  Random random(3);
  size_t largest = 0;
  for (const Form& form : all_forms()) cases.push_back(random_case(form, random.from(1, 5), random));
  for (Case& c : special_cases(random)) {
    if (c.threads > 1) cases.push_back(c);
  }
  for (const Case& c : cases) {
    largest = std::max({largest, size_t(values_of(c, false)), size_t(values_of(c, true))});
  }
  std::vector<float> y(largest);
  qc_pool_set_threads(kSoakThreads);
  // Not all of the forms have an embedding. One run of the large ones in as many as there are others.
  const int64_t small = int64_t(all_forms().size());
  const auto one = [&](int64_t run) {
    const int64_t round = run / small, large = int64_t(cases.size()) - small;
    const bool cut = run % small == 0;
    const Case& c = cases[size_t(cut ? small + round % large : run % small)];
    const bool embedding = c.form.op != Form::kExperts && c.form.op != Form::kMixed && round % 3 == 2;
    const qc_context context = {cut ? qc_pool_parallel_for : nullptr, nullptr, cut ? kSoakThreads : 1,
                                names[size_t(round) % names.size()].c_str()};
    if (call(c, Arrays::of(c), context, embedding, y.data())) {
      std::printf("%s: %s\n", c.name().c_str(), qc_last_error());
      std::exit(1);
    }
  };
  // Once through everything that keeps working memory, and what comes with the first runs.
  const int64_t warm = small * int64_t(std::max(names.size(), cases.size() - size_t(small)));
  for (int64_t run = 0; run < warm; ++run) one(run);
  // A thread that came too late for a piece of a large case would take its memory for one later.
  for (const std::string& name : names) {
    const qc_context context = {by_every_thread, nullptr, kSoakThreads, name.c_str()};
    for (size_t i = size_t(small); i < cases.size(); ++i) {
      if (call(cases[i], Arrays::of(cases[i]), context, false, y.data())) std::exit(1);
    }
  }
#if defined(__GLIBC__)
  malloc_trim(0);  // or what was freed before would hide what is lost from here on
#endif
  const int64_t before = anonymous_kib();
  int64_t grown = 0;
  for (int64_t run = 0; run < runs; ++run) {
    one(run);
    if (leak) {
      static void* volatile lost;  // volatile: no compiler may drop it
      lost = std::malloc(size_t(leak));
      std::memset(lost, 1, size_t(leak));
    }
    if ((run + 1) % std::max<int64_t>(1, runs / 10) == 0) {
      grown = anonymous_kib() - before;
      std::printf("%" PRId64 " runs: %" PRId64 " KiB anonymous, %+" PRId64 "\n", run + 1, before + grown, grown);
      std::fflush(stdout);
    }
  }
  if (grown <= kAllowedKib) return 0;
  std::printf("anonymous memory grew by %" PRId64 " KiB, expected at most %" PRId64 "\n", grown, kAllowedKib);
  return 1;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  const int64_t number = count > 2 ? std::atoll(arguments[2]) : 3;
  if (mode == "threads" && number > 0) return threads(number);
  if (mode == "heap" && count > 2 && number > 0) return heap(number);
  if (mode == "soak" && count > 2 && number > 0) return soak(number, count > 3 ? std::atoll(arguments[3]) : 0);
  std::fputs("stress_kernels threads [ROUNDS] | heap CASES | soak RUNS [LEAK]\n", stderr);
  return 2;
}
