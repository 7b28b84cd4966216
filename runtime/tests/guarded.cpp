#include "guarded.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "scratch.h"

Placement placement = Placement::kEnd;

namespace {

constexpr size_t kAround = 1024;  // bytes of pattern that are looked at, at most
constexpr uint8_t kPattern = 0xa5;

size_t page() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

Guarded::~Guarded() {
  if (base_) munmap(base_, inner_ + 2 * page());
}

uint8_t* Guarded::place(size_t bytes, size_t alignment) {
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
  data_ = base_ + page();
  if (placement != Placement::kStart) data_ += inner_ - bytes;
  if (placement == Placement::kOdd) {
    // An odd multiple of the alignment, so that the address is no multiple of twice as much.
    static thread_local size_t turn = 0;
    if (reinterpret_cast<uintptr_t>(data_) / alignment % 2 == 0) data_ -= alignment * (1 + 2 * (turn++ % 8));
  }
  before_ = std::min<size_t>(kAround, size_t(data_ - base_) - page());
  after_ = std::min<size_t>(kAround, size_t(base_ + page() + inner_ - (data_ + bytes)));
  std::memset(data_ - before_, kPattern, before_);
  std::memset(data_ + bytes, kPattern, after_);
  return data_;
}

uint8_t* Guarded::place(const void* data, size_t bytes, size_t alignment) {
  uint8_t* out = place(bytes, alignment);
  if (bytes) std::memcpy(out, data, bytes);
  return out;
}

bool Guarded::intact() const {
  const auto pattern = [](uint8_t byte) { return byte == kPattern; };
  uint8_t* end = data_ + bytes_;
  return std::all_of(data_ - before_, data_, pattern) && std::all_of(end, end + after_, pattern);
}

// The library's working memory (scratch.cpp), guarded too, and never clean: leases nest, so each depth has its own.
namespace qc {

static thread_local Guarded leases[4];
static thread_local int depth = 0;

ScratchLease::ScratchLease(size_t bytes) : data_(nullptr), cached_(false) {
  if (depth == 4) std::abort();
  const size_t size = (bytes + 63) / 64 * 64;
  data_ = leases[depth++].place(size, 64);
  std::memset(data_, 0xff, size);
}

ScratchLease::~ScratchLease() {
  if (!leases[--depth].intact()) {
    std::puts("working memory: written beyond an end");
    std::_Exit(1);
  }
}

}  // namespace qc
