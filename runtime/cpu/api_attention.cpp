// The C interface of attention: validation and error text.
#include <cinttypes>
#include <cmath>

#include "attention.h"
#include "checks.h"
#include "dispatch.h"
#include "error.h"
#include "qcompiler_ops.h"

namespace qc {
namespace {

constexpr const char* kOp = "qc_attention";
constexpr int64_t kMost = int64_t{1} << 31;

int32_t check_heads(const qc_attention_call& c) {
  if (c.heads < 1 || c.kv_heads < 1 || c.heads % c.kv_heads != 0) {
    return fail(kInvalidArgument, "%s: heads is %" PRId32 " and kv_heads is %" PRId32 ", expected a multiple and its factor", kOp,
                c.heads, c.kv_heads);
  }
  if (c.head_size < 1 || c.head_size > 4096) {
    return fail(kInvalidArgument, "%s: head_size is %" PRId32 ", expected 1 to 4096", kOp, c.head_size);
  }
  if (c.rotary < 0 || c.rotary > c.head_size || c.rotary % 2 != 0) {
    return fail(kInvalidArgument, "%s: rotary is %" PRId32 ", expected an even number of at most the head size %" PRId32, kOp,
                c.rotary, c.head_size);
  }
  if (!std::isfinite(c.scale)) return fail(kInvalidArgument, "%s: scale is %g, expected a finite number", kOp, double(c.scale));
  return kOk;
}

int32_t check_lengths(const qc_attention_call& c) {
  if (c.rows < 0 || c.past < 0 || c.rows >= kMost || c.past >= kMost) {
    return fail(kInvalidArgument, "%s: rows is %" PRId64 " and past is %" PRId64 ", expected 0 to 2^31 - 1", kOp, c.rows, c.past);
  }
  if (c.capacity < 0 || c.capacity >= kMost || c.past + c.rows > c.capacity) {
    return fail(kInvalidArgument, "%s: %" PRId64 " positions are filled and %" PRId64 " are new, expected room for them in the "
                "capacity of %" PRId64, kOp, c.past, c.rows, c.capacity);
  }
  if (c.past > 0 && (c.past > c.past_capacity || c.past_capacity >= kMost)) {
    return fail(kInvalidArgument, "%s: %" PRId64 " positions are filled, expected at most the past's capacity of %" PRId64, kOp,
                c.past, c.past_capacity);
  }
  const bool shared = c.past_key == c.present_key || c.past_value == c.present_value;
  if (c.past > 0 && shared && c.past_capacity != c.capacity) {
    return fail(kInvalidArgument, "%s: past and present are one buffer with capacities %" PRId64 " and %" PRId64
                ", expected one", kOp, c.past_capacity, c.capacity);
  }
  return kOk;
}

int32_t check_rotary(const qc_attention_call& c) {
  if (c.rotary == 0) return kOk;
  if (!c.cosines) return null_pointer(kOp, "cosines");
  if (!c.sines) return null_pointer(kOp, "sines");
  for (int64_t row = 0; row < c.rows; ++row) {
    const int64_t at = c.positions ? c.positions[row] : c.past + row;
    if (at < 0 || at >= c.rotary_rows) {
      return fail(kInvalidArgument, "%s: the position of row %" PRId64 " is %" PRId64 ", expected 0 to %" PRId64
                  " (the rows of the cosines)", kOp, row, at, c.rotary_rows - 1);
    }
  }
  return kOk;
}

int32_t check_pointers(const qc_attention_call& c) {
  const struct {
    const void* pointer;
    const char* name;
    bool needed;
  } pointers[] = {{c.q, "q", true},
                  {c.k, "k", true},
                  {c.v, "v", true},
                  {c.present_key, "present_key", true},
                  {c.present_value, "present_value", true},
                  {c.past_key, "past_key", c.past > 0},
                  {c.past_value, "past_value", c.past > 0},
                  {c.y, "y", true},
                  {c.bias, "bias", false},
                  {c.cosines, "cosines", false},
                  {c.sines, "sines", false}};
  for (const auto& p : pointers) {
    if (p.needed && !p.pointer) return null_pointer(kOp, p.name);
    if (int32_t code = check_alignment(kOp, p.name, static_cast<const float*>(p.pointer))) return code;
  }
  if (int32_t code = check_alignment(kOp, "positions", c.positions)) return code;
  const int64_t width = int64_t{c.heads} * c.head_size, kv_width = int64_t{c.kv_heads} * c.head_size;
  const struct {
    int64_t found, least;
    const char* name;
  } strides[] = {{c.q_stride, width, "q_stride"}, {c.k_stride, kv_width, "k_stride"}, {c.v_stride, kv_width, "v_stride"}};
  for (const auto& s : strides) {
    if (s.found < s.least) {
      return fail(kInvalidArgument, "%s: %s is %" PRId64 ", expected at least %" PRId64, kOp, s.name, s.found, s.least);
    }
  }
  if (c.bias && (c.bias_row_stride < c.past + c.rows || c.bias_head_stride < 0)) {
    return fail(kInvalidArgument, "%s: bias_row_stride is %" PRId64 " and bias_head_stride %" PRId64 ", expected at least the %" PRId64
                " positions, and at least 0", kOp, c.bias_row_stride, c.bias_head_stride, c.past + c.rows);
  }
  return kOk;
}

}  // namespace
}  // namespace qc

int32_t qc_attention(const qc_context* context, const qc_attention_call* call) {
  using namespace qc;
  Workers workers;
  const Kernels* kernels = nullptr;
  if (int32_t code = check_context(kOp, context, &workers, &kernels)) return code;
  if (!call) return null_pointer(kOp, "call");
  if (int32_t code = check_heads(*call)) return code;
  if (int32_t code = check_lengths(*call)) return code;
  if (call->rows == 0) return kOk;
  if (int32_t code = check_pointers(*call)) return code;
  if (int32_t code = check_rotary(*call)) return code;
  if (run_attention(*kernels->attention, workers, *call)) return kOk;
  return fail(kOutOfMemory, "%s: no memory for the scores of %" PRId64 " rows", kOp, call->rows);
}
