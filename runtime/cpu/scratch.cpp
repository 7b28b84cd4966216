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

struct ThreadCache {
  unsigned char* data = nullptr;
  size_t size = 0;
  bool leased = false;
  ~ThreadCache() { release(data); }
};

ThreadCache& cache() {
  static thread_local ThreadCache instance;
  return instance;
}

}  // namespace

ScratchLease::ScratchLease(size_t bytes) : data_(nullptr), cached_(false) {
  ThreadCache& own = cache();
  if (own.leased || bytes > kKeep) {
    data_ = allocate(bytes);
    return;
  }
  if (own.size < bytes) {
    release(own.data);
    const size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    own.data = allocate(size);
    own.size = own.data ? size : 0;
  }
  data_ = own.data;
  cached_ = own.leased = data_ != nullptr;
}

ScratchLease::~ScratchLease() {
  if (cached_) {
    cache().leased = false;
  } else {
    release(data_);
  }
}

}  // namespace qc
