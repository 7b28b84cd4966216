#include "scratch.h"

#include <cstdint>
#include <cstdlib>
#include <new>

namespace qc {
namespace {

constexpr size_t kAlignment = 64;
// More than this is given back after the call instead of being kept by the thread.
constexpr size_t kKeep = size_t{8} << 20;

unsigned char* allocate(size_t bytes) {
  return static_cast<unsigned char*>(::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow));
}

void release(unsigned char* data) { ::operator delete(data, std::align_val_t{kAlignment}); }

// What a thread keeps, a piece of memory for each of the leases that nest in one op.
struct ThreadCache {
  static constexpr int kDepth = 4;
  struct Level {
    unsigned char* data = nullptr;
    size_t size = 0;
  } levels[kDepth];
  int leased = 0;
  ~ThreadCache() {
    for (Level& level : levels) release(level.data);
  }
};

ThreadCache& cache() {
  static thread_local ThreadCache instance;
  return instance;
}

}  // namespace

ScratchLease::ScratchLease(size_t bytes) : data_(nullptr), cached_(false) {
  ThreadCache& own = cache();
  if (own.leased == ThreadCache::kDepth || bytes > kKeep) {
    data_ = allocate(bytes);
    return;
  }
  ThreadCache::Level& level = own.levels[own.leased];
  if (level.size < bytes) {
    release(level.data);
    const size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    level.data = allocate(size);
    level.size = level.data ? size : 0;
  }
  data_ = level.data;
  cached_ = data_ != nullptr;
  own.leased += cached_;
}

ScratchLease::~ScratchLease() {
  if (cached_) {
    --cache().leased;  // leases end in the order in which they nest
  } else {
    release(data_);
  }
}

}  // namespace qc
