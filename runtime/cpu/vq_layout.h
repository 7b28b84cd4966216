// Geometry of vector-quantized matrices (docs/layout.md). Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_VQ_LAYOUT_H
#define QCOMPILER_VQ_LAYOUT_H

#include "kernels.h"
#include "layout.h"

namespace qc {
namespace {

constexpr bool valid_codebook(int dim, int centroids) {
  return dim == 1   ? centroids == 4 || centroids == 8 || centroids == 16
         : dim == 2 ? centroids == 16 || centroids == 32 || centroids == 64 || centroids == 256
                    : dim == 4 && centroids == 256;
}

constexpr int index_bits(int centroids) {
  return centroids == 4 ? 2 : centroids == 8 ? 3 : centroids == 16 ? 4 : centroids == 32 ? 5 : centroids == 64 ? 6 : 8;
}

// 5-bit indices have units of their own; all others lie like codes of index_bits / dim bits.
constexpr int64_t vq_unit_columns(int dim, int centroids) {
  return centroids == 32 ? 64 : unit_columns(index_bits(centroids) / dim);
}
constexpr int64_t vq_unit_bytes(int dim, int centroids) {
  return centroids == 32 ? 5 * kVectorBytes : unit_bytes(index_bits(centroids) / dim);
}
constexpr int64_t vq_tile_bytes(int64_t k, int dim, int centroids) {
  return ceil_div(k, vq_unit_columns(dim, centroids)) * vq_unit_bytes(dim, centroids);
}

// The index of vector i of a unit's block (4 * dim columns), of the row that `p` = unit + 4 * row + i stands for.
static inline int vq_index(const uint8_t* p, int dim, int centroids, int block) {
  if (centroids == 32) {
    const int v1 = p[64], v2 = p[128], v3 = p[192], v4 = p[256];
    if (block < 5) return p[64 * block] & 31;
    if (block == 5) return p[0] >> 5 | ((v3 >> 5) & 3) << 3;
    if (block == 6) return v1 >> 5 | ((v4 >> 5) & 3) << 3;
    return v2 >> 5 | (v3 >> 7) << 3 | (v4 >> 7) << 4;
  }
  const int bits = index_bits(centroids);
  if (bits / dim == 3) {
    const int b0 = p[0], b1 = p[64], b2 = p[128];
    const int pairs[4] = {b0 & 63, b1 & 63, b2 & 63, (b0 >> 6) << 4 | (b1 >> 6) << 2 | b2 >> 6};
    return dim == 2 ? pairs[block] : (pairs[block / 2] >> (3 * (block % 2))) & 7;
  }
  return (*p >> (bits * block)) & (centroids - 1);
}

// The codebook of a row and column, and its place among the scales.
struct Codebook {
  const int8_t* entries;  // [dim][centroids]
  uint16_t scale;         // fp16
};

static inline Codebook codebook_at(const Codebooks& books, int64_t row, int64_t column) {
  const int64_t at = row / books.block_rows * books.across + column / books.block_columns;
  return {books.entries + at * books.dim * books.centroids, books.scales[at]};
}

}  // namespace
}  // namespace qc
#endif
