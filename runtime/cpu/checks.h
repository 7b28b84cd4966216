// Checks of arguments that several functions of the C interface share. A check returns kOk, or the code of the error that it
// has reported; `op` stands before its text.
#ifndef QCOMPILER_CHECKS_H
#define QCOMPILER_CHECKS_H

#include <cstddef>
#include <cstdint>

#include "linear.h"
#include "qcompiler_ops.h"

namespace qc {

// a * b, or 0 when that does not fit (or a factor is 0).
int64_t product(int64_t a, int64_t b);

bool valid_group(int32_t group);
bool valid_shape(int64_t n, int64_t k);
int64_t scales_count(int64_t n, int64_t k, int32_t group);

int32_t null_pointer(const char* op, const char* what);
int32_t misaligned_pointer(const char* op, const char* what, const void* pointer, size_t alignment);

// Null is allowed: it has its own error where it is not.
template <class T>
int32_t check_alignment(const char* op, const char* what, const T* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return address % alignof(T) == 0 ? 0 : misaligned_pointer(op, what, pointer, alignof(T));
}

int32_t check_shape(const char* op, int64_t n, int64_t k, int32_t group);
int32_t check_context(const char* op, const qc_context* context, Workers* workers, const Kernels** kernels);
// `out`: the edges, null as none.
int32_t check_edges(const char* op, const qc_linear_edges* edges, const Matrix& matrix, qc_linear_edges* out);
// rows * columns fp32 values must be addressable.
int32_t check_matrix(const char* op, const char* what, int64_t rows, int64_t columns);
// No rows need no pointers.
int32_t check_operands(const char* op, const Matrix& matrix, int64_t rows, const float* x, const float* bias, const float* y);

// y = W[indices], once count, pointers and indices are what they must be.
int32_t checked_embedding(const char* op, const Workers& workers, const Matrix& matrix, int64_t count,
                          const int64_t* indices, float* y);

}  // namespace qc
#endif
