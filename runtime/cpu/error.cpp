#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace qc {
namespace {

// A fixed buffer: reporting that memory ran out must not allocate.
char* buffer() {
  static thread_local char text[512] = "";
  return text;
}

}  // namespace

int32_t fail(ErrorCode code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer(), 512, format, arguments);
  va_end(arguments);
  return code;
}

const char* last_error() { return buffer(); }

}  // namespace qc
