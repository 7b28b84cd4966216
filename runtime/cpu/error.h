// Error text of the calling thread: what was found, what was expected.
#ifndef QCOMPILER_ERROR_H
#define QCOMPILER_ERROR_H

#include <cstdint>

namespace qc {

enum ErrorCode : int32_t {
  kOk = 0,
  kInvalidArgument = 1,
  kUnavailable = 2,
  kOutOfMemory = 3,
};

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int32_t fail(ErrorCode code, const char* format, ...);

const char* last_error();

}  // namespace qc
#endif
