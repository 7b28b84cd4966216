// Memory against pages that no one may touch: a read or write too far kills the program.
#ifndef QCOMPILER_TESTS_GUARDED_H
#define QCOMPILER_TESTS_GUARDED_H

#include <cstddef>
#include <cstdint>

// What of every buffer lies against a page: its last byte, or its first. kOdd: neither, but the buffer begins wherever its type
// may, at another place each time, and not at a multiple of any more.
enum class Placement { kEnd, kStart, kOdd };
extern Placement placement;

// A mapping that is used again and again.
class Guarded {
 public:
  Guarded() = default;
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  // `bytes` of memory, a multiple of `alignment`. What lies between it and a page holds a pattern.
  uint8_t* place(size_t bytes, size_t alignment);
  // The same, filled with a copy.
  uint8_t* place(const void* data, size_t bytes, size_t alignment);
  // False when something was written over the pattern.
  bool intact() const;

 private:
  uint8_t* base_ = nullptr;
  size_t inner_ = 0, bytes_ = 0, after_ = 0, before_ = 0;  // after_, before_: bytes of pattern
  uint8_t* data_ = nullptr;
};

#endif
