// Memory against pages that no one may touch: a read or write too far kills the program.
#ifndef QCOMPILER_TESTS_GUARDED_H
#define QCOMPILER_TESTS_GUARDED_H

#include <cstddef>
#include <cstdint>

// Which end of every buffer lies against a page: its last byte, or its first.
extern bool guard_at_end;

// A mapping that is used again and again.
class Guarded {
 public:
  Guarded() = default;
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  // `bytes` of memory (a multiple of the alignment of what it holds). What lies beyond its other end holds a pattern.
  uint8_t* place(size_t bytes);
  // The same, filled with a copy.
  uint8_t* place(const void* data, size_t bytes);
  // False when something was written beyond the other end.
  bool intact() const;

 private:
  uint8_t* base_ = nullptr;
  size_t inner_ = 0, bytes_ = 0;
  uint8_t* data_ = nullptr;
};

#endif
