#include "checks.h"

#include <cinttypes>
#include <cmath>

#include "dispatch.h"
#include "error.h"
#include "layout.h"

namespace qc {

static constexpr int64_t kLargest = INT64_MAX;

int64_t product(int64_t a, int64_t b) { return a > 0 && b > 0 && a <= kLargest / b ? a * b : 0; }

bool valid_group(int32_t group) { return group == 0 || group == 32 || group == 64 || group == 128; }
bool valid_shape(int64_t n, int64_t k) {
  // Leaves room to round up to a tile and a unit.
  return n > 0 && k > 0 && n <= kLargest - kTileRows && k <= kLargest - 2 * kActivationBlock;
}

int64_t scales_count(int64_t n, int64_t k, int32_t group) {
  if (!valid_shape(n, k) || !valid_group(group)) return 0;
  return product(ceil_div(n, kTileRows), product(group_count(k, group), kTileRows));
}

int32_t null_pointer(const char* op, const char* what) {
  return fail(kInvalidArgument, "%s: %s is null, expected a pointer", op, what);
}

int32_t misaligned_pointer(const char* op, const char* what, const void* pointer, size_t alignment) {
  return fail(kInvalidArgument, "%s: %s lies at address 0x%" PRIxPTR ", expected a multiple of %zu", op, what,
              reinterpret_cast<uintptr_t>(pointer), alignment);
}

int32_t check_shape(const char* op, int64_t n, int64_t k, int32_t group) {
  if (!valid_group(group)) {
    return fail(kInvalidArgument, "%s: weight.group is %" PRId32 ", expected 32, 64, 128 or 0 (the whole row)", op, group);
  }
  if (!valid_shape(n, k)) {
    return fail(kInvalidArgument, "%s: weight has n = %" PRId64 " and k = %" PRId64 ", expected both at least 1", op, n, k);
  }
  return kOk;
}

int32_t check_context(const char* op, const qc_context* context, Workers* workers, const Kernels** kernels) {
  const qc_context serial = {nullptr, nullptr, 1, nullptr};
  const qc_context& c = context ? *context : serial;
  if (c.threads < 1) {
    return fail(kInvalidArgument, "%s: context.threads is %" PRId32 ", expected at least 1", op, c.threads);
  }
  *workers = {c.parallel_for, c.pool, c.threads};
  *kernels = select_kernels(c.isa);
  return *kernels ? kOk : kUnavailable;
}

int32_t check_edges(const char* op, const qc_linear_edges* edges, const Matrix& matrix, qc_linear_edges* out) {
  *out = edges ? *edges : qc_linear_edges{};
  if (out->gate < QC_GATE_NONE || out->gate > QC_GATE_GELU) {
    return fail(kInvalidArgument, "%s: edges.gate is %" PRId32 ", expected 0 (none), 1 (silu), 2 (gelu_tanh) or 3 (gelu)", op,
                out->gate);
  }
  if (out->gate && matrix.n % (2 * kTileRows)) {
    return fail(kInvalidArgument,
                "%s: weight.n is %" PRId64 " and edges.gate %" PRId32 ", expected two halves of a multiple of %" PRId64 " rows",
                op, matrix.n, out->gate, kTileRows);
  }
  if (!(out->epsilon >= 0) || !std::isfinite(out->epsilon)) {
    return fail(kInvalidArgument, "%s: edges.epsilon is %g, expected a finite number of at least 0", op,
                double(out->epsilon));
  }
  if (!out->norm && out->epsilon != 0) {
    return fail(kInvalidArgument, "%s: edges.epsilon is %g without edges.norm, expected 0", op, double(out->epsilon));
  }
  if (int32_t code = check_alignment(op, "edges.norm", out->norm)) return code;
  return check_alignment(op, "edges.residual", out->residual);
}

int32_t check_matrix(const char* op, const char* what, int64_t rows, int64_t columns) {
  if (product(product(rows, columns), 8)) return kOk;
  return fail(kInvalidArgument, "%s: %s has %" PRId64 " x %" PRId64 " values, expected fewer than 2^60", op, what, rows,
              columns);
}

int32_t check_operands(const char* op, const Matrix& matrix, int64_t rows, const float* x, const float* bias, const float* y) {
  if (rows < 0) return fail(kInvalidArgument, "%s: rows is %" PRId64 ", expected at least 0", op, rows);
  if (rows == 0) return kOk;
  if (int32_t code = check_matrix(op, "x", rows, matrix.k)) return code;
  if (int32_t code = check_matrix(op, "y", rows, matrix.n)) return code;
  if (!x) return null_pointer(op, "x");
  if (!y) return null_pointer(op, "y");
  if (int32_t code = check_alignment(op, "x", x)) return code;
  if (int32_t code = check_alignment(op, "bias", bias)) return code;
  return check_alignment(op, "y", y);
}

int32_t checked_embedding(const char* op, const Workers& workers, const Matrix& matrix, int64_t count,
                          const int64_t* indices, float* y) {
  if (count < 0) return fail(kInvalidArgument, "%s: count is %" PRId64 ", expected at least 0", op, count);
  if (count == 0) return kOk;
  if (int32_t code = check_matrix(op, "y", count, matrix.k)) return code;
  if (!indices) return null_pointer(op, "indices");
  if (!y) return null_pointer(op, "y");
  if (int32_t code = check_alignment(op, "indices", indices)) return code;
  if (int32_t code = check_alignment(op, "y", y)) return code;
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= matrix.n) {
      return fail(kInvalidArgument, "%s: indices[%" PRId64 "] is %" PRId64 ", expected 0 <= index < n = %" PRId64, op, i,
                  indices[i], matrix.n);
    }
  }
  run_embedding(workers, matrix, count, indices, y);
  return kOk;
}

}  // namespace qc
