// The C interface: validation and error text. No exception crosses it: nothing below it throws.
#include <cinttypes>
#include <cmath>
#include <cstdint>

#include "checks.h"
#include "dispatch.h"
#include "error.h"
#include "layout.h"
#include "linear.h"
#include "qcompiler_ops.h"

namespace qc {
namespace {

bool valid_bits(int32_t bits) { return bits == 8 || bits == 4 || bits == 3 || bits == 2; }
int64_t codes_bytes(int64_t n, int64_t k, int32_t bits) {
  if (!valid_shape(n, k) || !valid_bits(bits)) return 0;
  return product(ceil_div(n, kTileRows), product(ceil_div(k, unit_columns(bits)), unit_bytes(bits)));
}

int64_t zeros_bytes(int64_t n, int64_t k, int32_t bits, int32_t group) {
  if (!valid_shape(n, k) || !valid_bits(bits) || !valid_group(group)) return 0;
  return product(ceil_div(n, kTileRows), product(group_count(k, group), tile_zero_bytes(bits)));
}

int32_t check_weight(const char* op, const qc_weight* weight, Matrix* out) {
  if (!weight) return null_pointer(op, "weight");
  const qc_weight& w = *weight;
  if (!valid_bits(w.bits)) {
    return fail(kInvalidArgument, "%s: weight.bits is %" PRId32 ", expected 8, 4, 3 or 2", op, w.bits);
  }
  if (int32_t code = check_shape(op, w.n, w.k, w.group)) return code;
  if (!codes_bytes(w.n, w.k, w.bits) || !product(scales_count(w.n, w.k, w.group), 2)) {
    return fail(kInvalidArgument, "%s: a weight of n = %" PRId64 " and k = %" PRId64 " exceeds 2^63 bytes, expected less",
                op, w.n, w.k);
  }
  if (!w.codes) return null_pointer(op, "weight.codes");
  if (!w.scales) return null_pointer(op, "weight.scales");
  if (int32_t code = check_alignment(op, "weight.scales", w.scales)) return code;
  *out = {w.n,      w.k,     w.bits,  w.group,
          w.codes,  w.scales, w.zeros, ceil_div(w.n, kTileRows),
          group_count(w.k, w.group), tile_code_bytes(w.k, w.bits), nullptr};
  return kOk;
}

// The dot product of a segment is an int32: |q - Z| * |a| * k must fit. Only a segment of a whole row can be too long.
int32_t check_exactness(const char* op, const Matrix& w, int32_t activation, bool full_range = false) {
  if ((activation != QC_ACT_INT8_TOKEN && activation != QC_ACT_INT8_STATIC) || w.group != 0) return kOk;
  const int64_t longest = INT32_MAX / ((full_range ? 128 : 127) * largest_level(w.bits, w.zeros != nullptr));
  if (w.k <= longest) return kOk;
  return fail(kInvalidArgument,
              "%s: weight.k is %" PRId64 " with %" PRId32 " bits, one scale a row and one scale for all of its int8 "
              "activations: the sum may exceed int32, expected k <= %" PRId64 " (or int8 activations per block)",
              op, w.k, w.bits, longest);
}

// `last`: the largest kind that the op takes.
int32_t check_activation(const char* op, int32_t activation, int32_t last) {
  if (activation >= QC_ACT_FLOAT && activation <= last) return kOk;
  return fail(kInvalidArgument, "%s: activation is %" PRId32 ", expected 0 (float), 1 (int8 per token)%s", op, activation,
              last == QC_ACT_INT8_STATIC ? ", 2 (int8 per block) or 3 (static int8)" : " or 2 (int8 per block)");
}

int32_t check_range(const char* op, int32_t activation, const qc_activation_range* range, ActivationRange* out) {
  if (activation != QC_ACT_INT8_STATIC) {
    if (!range) return kOk;
    return fail(kInvalidArgument, "%s: a static range is given and activation is %" PRId32 ", expected 3 (static int8)",
                op, activation);
  }
  if (!range) return null_pointer(op, "range (of static int8 activations)");
  if (!(range->scale > 0) || !std::isfinite(range->scale)) {
    return fail(kInvalidArgument, "%s: range.scale is %g, expected a finite number above 0", op, double(range->scale));
  }
  if (!range->zero != !range->offset) {
    return fail(kInvalidArgument, "%s: range.%s is given without range.%s, expected both or neither", op,
                range->zero ? "zero" : "offset", range->zero ? "offset" : "zero");
  }
  if (int32_t code = check_alignment(op, "range.offset", range->offset)) return code;
  *out = {range->scale, range->zero ? *range->zero : 0, range->zero ? -128 : -127, 127};
  return kOk;
}

int32_t check_outliers(const char* op, const qc_outliers& outliers, int64_t k) {
  if (outliers.count < 0 || outliers.count > k) {
    return fail(kInvalidArgument, "%s: outliers.count is %" PRId64 ", expected 0 to k = %" PRId64, op, outliers.count, k);
  }
  if (!outliers.count) return kOk;
  if (!outliers.columns) return null_pointer(op, "outliers.columns");
  if (!outliers.weights) return null_pointer(op, "outliers.weights");
  if (int32_t code = check_alignment(op, "outliers.columns", outliers.columns)) return code;
  if (int32_t code = check_alignment(op, "outliers.weights", outliers.weights)) return code;
  int64_t before = -1;
  for (int64_t i = 0; i < outliers.count; ++i) {
    const int64_t column = outliers.columns[i];
    if (column < 0 || column >= k) {
      return fail(kInvalidArgument, "%s: columns[%" PRId64 "] is %" PRId64 ", expected 0 <= column < k = %" PRId64, op, i,
                  column, k);
    }
    if (column <= before) {
      return fail(kInvalidArgument,
                  "%s: columns[%" PRId64 "] is %" PRId64 " after %" PRId64 ", expected ascending columns, each once", op, i,
                  column, before);
    }
    before = column;
  }
  return kOk;
}

int32_t linear(const char* op, const qc_context* context, const qc_weight* weight, int32_t activation,
               const qc_activation_range* range, const qc_outliers* outliers, const qc_linear_edges* edges, int64_t rows,
               const float* x, const float* bias, float* y) {
  Workers workers{};
  Matrix matrix{};
  const Kernels* kernels = nullptr;
  if (int32_t code = check_context(op, context, &workers, &kernels)) return code;
  if (int32_t code = check_weight(op, weight, &matrix)) return code;
  if (int32_t code = check_activation(op, activation, QC_ACT_INT8_STATIC)) return code;
  ActivationRange levels{};
  LinearExtras extras;
  if (int32_t code = check_range(op, activation, range, &levels)) return code;
  if (range) extras.range = &levels, extras.offset = range->offset;
  if (outliers) extras.outliers = *outliers;
  if (int32_t code = check_outliers(op, extras.outliers, matrix.k)) return code;
  if (int32_t code = check_edges(op, edges, matrix, &extras.edges)) return code;
  if (int32_t code = check_exactness(op, matrix, activation, levels.low < -127)) return code;
  if (int32_t code = check_operands(op, matrix, rows, x, bias, y)) return code;
  if (rows == 0) return kOk;
  if (!run_linear(*kernels, workers, matrix, static_cast<qc_activation>(activation), rows, x, bias, y, extras)) {
    return fail(kOutOfMemory, "%s: no memory for the activations of k = %" PRId64, op, matrix.k);
  }
  return kOk;
}

int32_t linear_experts(const qc_context* context, const qc_weight* weight, int64_t experts, int32_t activation,
                       int64_t rows, const float* x, const int64_t* expert, const float* bias, float* y) {
  const char* op = "linear_experts_nbit";
  Workers workers{};
  Matrix matrix{};
  const Kernels* kernels = nullptr;
  if (int32_t code = check_context(op, context, &workers, &kernels)) return code;
  if (int32_t code = check_weight(op, weight, &matrix)) return code;
  if (!product(experts, product(codes_bytes(matrix.n, matrix.k, matrix.bits), 1)) ||
      !product(experts, product(scales_count(matrix.n, matrix.k, matrix.group), 2))) {
    return fail(kInvalidArgument, "%s: experts is %" PRId64 ", expected at least 1 and all weights within 2^63 bytes", op,
                experts);
  }
  if (int32_t code = check_activation(op, activation, QC_ACT_INT8_BLOCK)) return code;
  if (int32_t code = check_exactness(op, matrix, activation)) return code;
  if (int32_t code = check_operands(op, matrix, rows, x, bias, y)) return code;
  if (rows == 0) return kOk;
  if (!expert) return null_pointer(op, "expert");
  if (int32_t code = check_alignment(op, "expert", expert)) return code;
  for (int64_t i = 0; i < rows; ++i) {
    if (expert[i] < 0 || expert[i] >= experts) {
      return fail(kInvalidArgument, "%s: expert[%" PRId64 "] is %" PRId64 ", expected 0 <= index < experts = %" PRId64, op,
                  i, expert[i], experts);
    }
  }
  if (!run_experts(*kernels, workers, matrix, experts, static_cast<qc_activation>(activation), rows, x, expert, bias,
                   y)) {
    return fail(kOutOfMemory, "%s: no memory for the activations of k = %" PRId64, op, matrix.k);
  }
  return kOk;
}

int32_t embedding(const qc_context* context, const qc_weight* weight, int64_t count, const int64_t* indices, float* y) {
  const char* op = "embedding_nbit";
  Workers workers{};
  Matrix matrix{};
  const Kernels* kernels = nullptr;
  if (int32_t code = check_context(op, context, &workers, &kernels)) return code;
  if (int32_t code = check_weight(op, weight, &matrix)) return code;
  return checked_embedding(op, workers, matrix, count, indices, y);
}

}  // namespace
}  // namespace qc

extern "C" {

int32_t qc_abi_version(void) { return QC_ABI_VERSION; }
int32_t qc_layout_version(void) { return QC_LAYOUT_VERSION; }
const char* qc_last_error(void) { return qc::last_error(); }
const char* qc_cpu_features(void) { return qc::feature_names(); }
const char* qc_isas(void) { return qc::isa_names(); }
const char* qc_isa(void) { return qc::default_isa(); }

int64_t qc_codes_bytes(int64_t n, int64_t k, int32_t bits) { return qc::codes_bytes(n, k, bits); }
int64_t qc_scales_count(int64_t n, int64_t k, int32_t group) { return qc::scales_count(n, k, group); }
int64_t qc_zeros_bytes(int64_t n, int64_t k, int32_t bits, int32_t group) {
  return qc::zeros_bytes(n, k, bits, group);
}

int32_t qc_linear_nbit(const qc_context* context, const qc_weight* weight, int32_t activation,
                       const qc_activation_range* range, const qc_linear_edges* edges, int64_t rows, const float* x,
                       const float* bias, float* y) {
  return qc::linear("linear_nbit", context, weight, activation, range, nullptr, edges, rows, x, bias, y);
}

int32_t qc_linear_mixed(const qc_context* context, const qc_weight* weight, int32_t activation,
                        const qc_activation_range* range, const qc_outliers* outliers, int64_t rows, const float* x,
                        const float* bias, float* y) {
  if (!outliers) return qc::null_pointer("linear_mixed", "outliers");
  return qc::linear("linear_mixed", context, weight, activation, range, outliers, nullptr, rows, x, bias, y);
}

int32_t qc_linear_experts_nbit(const qc_context* context, const qc_weight* weight, int64_t experts, int32_t activation,
                               int64_t rows, const float* x, const int64_t* expert, const float* bias, float* y) {
  return qc::linear_experts(context, weight, experts, activation, rows, x, expert, bias, y);
}

int32_t qc_embedding_nbit(const qc_context* context, const qc_weight* weight, int64_t count, const int64_t* indices,
                          float* y) {
  return qc::embedding(context, weight, count, indices, y);
}

}  // extern "C"
