// Rows of a packed matrix, decoded to fp32. S * (q - Z) has at most 19 significant bits, so that one multiplication is
// exact and the same on every ISA; the work is one gathered dword for every four columns, so there is one version.
#include <algorithm>
#include <cmath>
#include <limits>

#include "linear.h"
#include "vq_layout.h"

namespace qc {
namespace {

// One NaN for all ISAs: the sign of infinity times 0 is not portable.
float with_one_nan(float value) { return std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value; }

void decode_row(const Matrix& w, int64_t index, float* y) {
  const int64_t tile = index / kTileRows;
  const int row = int(index % kTileRows), bits = w.bits;
  const uint8_t* codes = w.codes + tile * w.tile_bytes + 4 * row;
  const int64_t columns = unit_columns(bits), bytes = unit_bytes(bits);
  int levels[32];  // one unit: q of columns 4 * j + i

  int64_t group = -1;
  float scale = 0;
  int zero = 0;
  for (int64_t first = 0; first < w.k; first += columns, codes += bytes) {
    const int64_t this_group = w.group ? first / w.group : 0;  // units never straddle groups
    if (this_group != group) {
      group = this_group;
      const int64_t at = tile * w.groups + group;
      scale = half_to_float(w.scales[at * kTileRows + row]);
      zero = w.zeros ? zero_point(w.zeros + at * tile_zero_bytes(bits), bits, row) : symmetric_zero(bits);
    }
    for (int i = 0; i < 4; ++i) {
      if (bits == 8) {
        levels[i] = int8_t(codes[i]);
      } else if (bits == 3) {
        const int b0 = codes[i], b1 = codes[64 + i], b2 = codes[128 + i];
        const int indices[4] = {b0, b1, b2, (b0 >> 6) << 4 | (b1 >> 6) << 2 | b2 >> 6};
        for (int j = 0; j < 8; ++j) levels[4 * j + i] = (indices[j / 2] >> (3 * (j % 2))) & 7;
      } else {
        for (int j = 0; j < 8 / bits; ++j) levels[4 * j + i] = (codes[i] >> (bits * j)) & ((1 << bits) - 1);
      }
    }
    const int64_t count = std::min(columns, w.k - first);
    for (int64_t c = 0; c < count; ++c) y[first + c] = with_one_nan(scale * float(levels[c] - zero));
  }
}

// (S * c) is exact; its product with an entry is rounded once.
void decode_vq_row(const Matrix& w, int64_t index, float* y) {
  const Codebooks& books = *w.codebooks;
  const int64_t tile = index / kTileRows;
  const int row = int(index % kTileRows), dim = books.dim, centroids = books.centroids;
  const uint8_t* codes = w.codes + tile * w.tile_bytes + 4 * row;
  const int64_t columns = vq_unit_columns(dim, centroids), bytes = vq_unit_bytes(dim, centroids);
  const int64_t segment = w.group ? w.group : kActivationBlock;
  for (int64_t begin = 0; begin < w.k; begin += segment) {
    const int64_t end = std::min(w.k, begin + segment), group = w.group ? begin / w.group : 0;
    const Codebook book = codebook_at(books, index, begin);
    const float factor = half_to_float(w.scales[(tile * w.groups + group) * kTileRows + row]) * half_to_float(book.scale);
    for (int64_t first = begin; first < end; first += 4 * dim) {  // four vectors
      const uint8_t* unit = codes + first / columns * bytes;
      const int block = int(first % columns / (4 * dim));
      for (int i = 0; i < 4; ++i) {
        const int entry = vq_index(unit + i, dim, centroids, block);
        for (int64_t k = first + i, j = 0; j < dim && k < end; ++j, k += 4) {
          y[k] = with_one_nan(factor * float(book.entries[j * centroids + entry]));
        }
      }
    }
  }
}

}  // namespace

void run_embedding(const Workers& workers, const Matrix& weight, int64_t count, const int64_t* indices, float* y) {
  constexpr int64_t kElementsPerPiece = 64 << 10;
  const int64_t rows_per_piece = std::max<int64_t>(1, kElementsPerPiece / weight.k);
  workers.run(ceil_div(count, rows_per_piece), [&](int64_t piece) {
    const int64_t end = std::min(count, (piece + 1) * rows_per_piece);
    for (int64_t i = piece * rows_per_piece; i < end; ++i) {
      float* out = y + i * weight.k;
      if (weight.codebooks) {
        decode_vq_row(weight, indices[i], out);
      } else {
        decode_row(weight, indices[i], out);
      }
    }
  });
}

}  // namespace qc
