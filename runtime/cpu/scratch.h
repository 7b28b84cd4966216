// Aligned working memory that a thread keeps between calls, so that decoding a token does not visit the allocator.
#ifndef QCOMPILER_SCRATCH_H
#define QCOMPILER_SCRATCH_H

#include <cstddef>

namespace qc {

// Holds `bytes` of 64-byte aligned memory while it lives; data() is null when memory ran out. Leases of one thread may
// nest (a caller's parallel_for may run another op on the waiting thread): each gets memory of its own.
class ScratchLease {
 public:
  explicit ScratchLease(size_t bytes);
  ~ScratchLease();
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;

  unsigned char* data() const { return data_; }

 private:
  unsigned char* data_;
  bool cached_;
};

}  // namespace qc
#endif
