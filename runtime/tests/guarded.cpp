#include "guarded.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "scratch.h"

bool guard_at_end = true;

namespace {

constexpr size_t kAround = 256;  // bytes of pattern that are looked at
constexpr uint8_t kPattern = 0xa5;

size_t page() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

Guarded::~Guarded() {
  if (base_) munmap(base_, inner_ + 2 * page());
}

uint8_t* Guarded::place(size_t bytes) {
  const size_t needed = (bytes + kAround + page() - 1) / page() * page();
  if (needed > inner_) {
    if (base_) munmap(base_, inner_ + 2 * page());
    inner_ = needed;
    void* mapped = mmap(nullptr, inner_ + 2 * page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    base_ = static_cast<uint8_t*>(mapped);
    if (mapped == MAP_FAILED || mprotect(base_, page(), PROT_NONE) ||
        mprotect(base_ + page() + inner_, page(), PROT_NONE)) {
      std::perror("guarded memory");
      std::exit(2);
    }
  }
  bytes_ = bytes;
  data_ = base_ + page() + (guard_at_end ? inner_ - bytes : 0);
  std::memset(guard_at_end ? data_ - kAround : data_ + bytes, kPattern, kAround);
  return data_;
}

uint8_t* Guarded::place(const void* data, size_t bytes) {
  uint8_t* out = place(bytes);
  if (bytes) std::memcpy(out, data, bytes);
  return out;
}

bool Guarded::intact() const {
  const uint8_t* around = guard_at_end ? data_ - kAround : data_ + bytes_;
  return std::all_of(around, around + kAround, [](uint8_t byte) { return byte == kPattern; });
}

// The library's working memory (scratch.cpp), guarded too, and never clean: leases nest, so each depth has its own.
namespace qc {

static thread_local Guarded leases[4];
static thread_local int depth = 0;

ScratchLease::ScratchLease(size_t bytes) : data_(nullptr), cached_(false) {
  if (depth == 4) std::abort();
  const size_t size = (bytes + 63) / 64 * 64;
  data_ = leases[depth++].place(size);
  std::memset(data_, 0xff, size);
}

ScratchLease::~ScratchLease() {
  if (!leases[--depth].intact()) {
    std::puts("working memory: written beyond its end");
    std::_Exit(1);
  }
}

}  // namespace qc
