// The library's own thread pool, behind qc_pool_parallel_for.
//
// Callers put a job on a list; the caller and the workers claim its indices from an atomic counter. Several callers may
// be at work at once, each takes part in its own job. Workers spin briefly for the next job, then sleep. The threads
// and the pool live until the process ends; a forked child starts with a new pool (its parent's threads do not exist
// there).
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#include "qcompiler_ops.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace {

constexpr int kMaxThreads = 256;
constexpr int kSpins = 2000;  // tens of microseconds: the gap between two ops of a model

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  __asm__ volatile("yield");
#endif
}

struct Job {
  void (*body)(void*, size_t);
  void* user;
  size_t count;
  std::atomic<size_t> next{0};
  std::atomic<int> workers{0};  // changed only under the pool's mutex when rising
  Job* following = nullptr;

  void run() {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(user, i);
  }
  bool open() const { return next.load(std::memory_order_relaxed) < count; }
};

class Pool {
 public:
  explicit Pool(int threads) : wanted_(threads) {}

  void set_threads(int threads) { wanted_.store(threads, std::memory_order_relaxed); }

  void run(Job& job) {
    const int helpers = wanted_.load(std::memory_order_relaxed) - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start_workers(helpers);
      job.following = jobs_;
      jobs_ = &job;
      posted_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    job.run();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Job** link = &jobs_;
      while (*link != &job) link = &(*link)->following;
      *link = job.following;
    }
    // No worker can join any more. Those inside are in their last piece.
    for (int spin = 0; job.workers.load(std::memory_order_acquire) > 0; ++spin) {
      if (spin < kSpins) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  void start_workers(int helpers) {
    try {
      while (started_ < helpers) {
        std::thread(&Pool::work, this, started_).detach();
        ++started_;
      }
    } catch (const std::exception&) {
      // No more threads to be had: those there are do the work.
    }
  }

  void work(int index) {
    // Spinning would only steal time when there are more threads than CPUs.
    const int spins = index + 1 < int(std::thread::hardware_concurrency()) ? kSpins : 0;
    unsigned seen = 0;
    for (;;) {
      for (int spin = 0; spin < spins && posted_.load(std::memory_order_acquire) == seen; ++spin) relax();
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        while (!(job = open_job(index))) {
          if (posted_.load(std::memory_order_relaxed) != seen) {
            seen = posted_.load(std::memory_order_relaxed);
            break;  // all that was posted is taken: spin for the next
          }
          sleeping_.fetch_add(1);
          wake_.wait(lock);
          sleeping_.fetch_sub(1);
        }
        if (!job) continue;
        job->workers.fetch_add(1, std::memory_order_relaxed);
      }
      job->run();
      job->workers.fetch_sub(1, std::memory_order_release);
    }
  }

  Job* open_job(int index) const {
    if (index + 1 >= wanted_.load(std::memory_order_relaxed)) return nullptr;
    Job* job = jobs_;
    while (job && !job->open()) job = job->following;
    return job;
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  Job* jobs_ = nullptr;
  int started_ = 0;
  std::atomic<int> wanted_;
  std::atomic<int> sleeping_{0};
  std::atomic<unsigned> posted_{0};
};

int clamp_threads(int threads) {
  if (threads < 1) threads = int(std::thread::hardware_concurrency());
  return threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads;
}

std::atomic<int>& requested_threads() {
  static std::atomic<int> threads{0};
  return threads;
}

std::atomic<Pool*>& pool_slot() {
  static std::atomic<Pool*> slot{nullptr};
  return slot;
}

// Null when memory ran out. Never freed: workers of a dead pool could not be told apart from live ones.
Pool* pool() {
  Pool* current = pool_slot().load(std::memory_order_acquire);
  if (current) return current;
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool_slot().store(nullptr); });
  (void)registered;
#endif
  Pool* made = new (std::nothrow) Pool(clamp_threads(requested_threads().load()));
  if (made && !pool_slot().compare_exchange_strong(current, made)) {
    delete made;
    made = current;
  }
  return made;
}

}  // namespace

extern "C" void qc_pool_set_threads(int32_t threads) {
  requested_threads().store(threads);
  if (Pool* current = pool_slot().load(std::memory_order_acquire)) current->set_threads(clamp_threads(threads));
}

extern "C" void qc_pool_parallel_for(void*, void (*body)(void* user, size_t index), size_t count, void* user) {
  Pool* shared = count > 1 ? pool() : nullptr;
  Job job{body, user, count};
  if (shared) {
    shared->run(job);
  } else {
    job.run();
  }
}
