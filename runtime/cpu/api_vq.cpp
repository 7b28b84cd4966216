// The C interface of vector-quantized matrices: validation and error text. No exception crosses it: nothing below it throws.
#include <cinttypes>
#include <cstdint>

#include "checks.h"
#include "error.h"
#include "linear.h"
#include "qcompiler_ops.h"
#include "vq_layout.h"

namespace qc {
namespace {

bool valid_block(int32_t rows, int32_t columns) {
  return rows >= 0 && columns >= 0 && rows % kTileRows == 0 && columns % kActivationBlock == 0;
}

int64_t vq_codes_bytes(int64_t n, int64_t k, int32_t dim, int32_t centroids) {
  if (!valid_shape(n, k) || !valid_codebook(dim, centroids)) return 0;
  const int64_t units = ceil_div(k, vq_unit_columns(dim, centroids));
  return product(ceil_div(n, kTileRows), product(units, vq_unit_bytes(dim, centroids)));
}

int64_t codebook_count(int64_t n, int64_t k, int32_t block_rows, int32_t block_columns) {
  if (!valid_shape(n, k) || !valid_block(block_rows, block_columns)) return 0;
  return product(block_rows ? ceil_div(n, block_rows) : 1, block_columns ? ceil_div(k, block_columns) : 1);
}

int64_t codebooks_bytes(int64_t n, int64_t k, int32_t dim, int32_t centroids, int32_t block_rows, int32_t block_columns) {
  if (!valid_codebook(dim, centroids)) return 0;
  return product(codebook_count(n, k, block_rows, block_columns), int64_t(dim) * centroids);
}

// `books` must outlive `out`, which points to it.
int32_t check_weight(const char* op, const qc_vq_weight* weight, Codebooks* books, Matrix* out) {
  if (!weight) return null_pointer(op, "weight");
  const qc_vq_weight& w = *weight;
  if (w.dim != 1 && w.dim != 2 && w.dim != 4) {
    return fail(kInvalidArgument, "%s: weight.dim is %" PRId32 ", expected 1, 2 or 4", op, w.dim);
  }
  if (!valid_codebook(w.dim, w.centroids)) {
    return fail(kInvalidArgument, "%s: weight.centroids is %" PRId32 " with weight.dim %" PRId32 ", expected %s", op,
                w.centroids, w.dim, w.dim == 1 ? "4, 8 or 16" : w.dim == 2 ? "16, 32, 64 or 256" : "256");
  }
  if (!valid_block(w.block_rows, 0)) {
    return fail(kInvalidArgument, "%s: weight.block_rows is %" PRId32 ", expected a multiple of 16, or 0 (all rows)", op,
                w.block_rows);
  }
  if (!valid_block(0, w.block_columns)) {
    return fail(kInvalidArgument, "%s: weight.block_columns is %" PRId32 ", expected a multiple of 128, or 0 (all columns)",
                op, w.block_columns);
  }
  if (int32_t code = check_shape(op, w.n, w.k, w.group)) return code;
  const int64_t count = codebook_count(w.n, w.k, w.block_rows, w.block_columns);
  if (!vq_codes_bytes(w.n, w.k, w.dim, w.centroids) || !product(scales_count(w.n, w.k, w.group), 2) ||
      !product(count, int64_t(w.dim) * w.centroids)) {
    return fail(kInvalidArgument, "%s: a weight of n = %" PRId64 " and k = %" PRId64 " exceeds 2^63 bytes, expected less",
                op, w.n, w.k);
  }
  if (!w.codes) return null_pointer(op, "weight.codes");
  if (!w.codebooks) return null_pointer(op, "weight.codebooks");
  if (!w.codebook_scales) return null_pointer(op, "weight.codebook_scales");
  if (!w.scales) return null_pointer(op, "weight.scales");
  if (int32_t code = check_alignment(op, "weight.codebook_scales", w.codebook_scales)) return code;
  if (int32_t code = check_alignment(op, "weight.scales", w.scales)) return code;
  *books = {w.dim,
            w.centroids,
            w.block_rows ? w.block_rows : ceil_div(w.n, kTileRows) * kTileRows,
            w.block_columns ? w.block_columns : ceil_div(w.k, kActivationBlock) * kActivationBlock,
            w.block_columns ? ceil_div(w.k, w.block_columns) : 1,
            w.codebooks,
            w.codebook_scales};
  *out = {w.n,      w.k,      8,       w.group,
          w.codes,  w.scales, nullptr, ceil_div(w.n, kTileRows),
          group_count(w.k, w.group), vq_tile_bytes(w.k, w.dim, w.centroids), books};
  return kOk;
}

int32_t linear(const char* op, const qc_context* context, const qc_vq_weight* weight, int32_t activation,
               const qc_linear_edges* edges, int64_t rows, const float* x, const float* bias, float* y) {
  Workers workers{};
  Codebooks books{};
  Matrix matrix{};
  const Kernels* kernels = nullptr;
  if (int32_t code = check_context(op, context, &workers, &kernels)) return code;
  if (int32_t code = check_weight(op, weight, &books, &matrix)) return code;
  if (activation != QC_ACT_FLOAT && activation != QC_ACT_INT8_BLOCK) {
    const char* name = activation == QC_ACT_INT8_TOKEN    ? " (int8 per token)"
                       : activation == QC_ACT_INT8_STATIC ? " (static int8)"
                                                          : "";
    return fail(kInvalidArgument, "%s: activation is %" PRId32 "%s, expected 0 (float) or 2 (int8 per block)", op, activation,
                name);
  }
  LinearExtras extras;
  if (int32_t code = check_edges(op, edges, matrix, &extras.edges)) return code;
  if (int32_t code = check_operands(op, matrix, rows, x, bias, y)) return code;
  if (rows == 0) return kOk;
  if (!run_linear(*kernels, workers, matrix, static_cast<qc_activation>(activation), rows, x, bias, y, extras)) {
    return fail(kOutOfMemory, "%s: no memory for the activations of k = %" PRId64, op, matrix.k);
  }
  return kOk;
}

int32_t embedding(const char* op, const qc_context* context, const qc_vq_weight* weight, int64_t count,
                  const int64_t* indices, float* y) {
  Workers workers{};
  Codebooks books{};
  Matrix matrix{};
  const Kernels* kernels = nullptr;
  if (int32_t code = check_context(op, context, &workers, &kernels)) return code;
  if (int32_t code = check_weight(op, weight, &books, &matrix)) return code;
  return checked_embedding(op, workers, matrix, count, indices, y);
}

}  // namespace
}  // namespace qc

extern "C" {

int64_t qc_vq_codes_bytes(int64_t n, int64_t k, int32_t dim, int32_t centroids) {
  return qc::vq_codes_bytes(n, k, dim, centroids);
}
int64_t qc_vq_codebook_count(int64_t n, int64_t k, int32_t block_rows, int32_t block_columns) {
  return qc::codebook_count(n, k, block_rows, block_columns);
}
int64_t qc_vq_codebooks_bytes(int64_t n, int64_t k, int32_t dim, int32_t centroids, int32_t block_rows,
                              int32_t block_columns) {
  return qc::codebooks_bytes(n, k, dim, centroids, block_rows, block_columns);
}

int32_t qc_linear_vq(const qc_context* context, const qc_vq_weight* weight, int32_t activation,
                     const qc_linear_edges* edges, int64_t rows, const float* x, const float* bias, float* y) {
  return qc::linear("linear_vq", context, weight, activation, edges, rows, x, bias, y);
}

int32_t qc_embedding_vq(const qc_context* context, const qc_vq_weight* weight, int64_t count, const int64_t* indices,
                        float* y) {
  return qc::embedding("embedding_vq", context, weight, count, indices, y);
}

}  // extern "C"
