// The scalar reference of the linear op on vector-quantized matrices: docs/layout.md, "Arithmetic", as it stands.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../vq_layout.h"

namespace qc {
namespace {

constexpr int64_t kMaxBlockRows = 4;  // generic.cpp has no larger blocks

// Calls use(column, entries of the 16 rows) for the columns [begin, end) of a tile, in order. No codebook ends between them.
template <class Use>
void each_column(const Matrix& w, int64_t tile, const int8_t* codebook, int64_t begin, int64_t end, Use&& use) {
  const int dim = w.codebooks->dim, centroids = w.codebooks->centroids;
  const int64_t columns = vq_unit_columns(dim, centroids);
  int8_t entries[kVqChunk][kTileRows];
  for (int64_t unit = begin / columns; unit * columns < end; ++unit) {
    const uint8_t* codes = w.codes + tile * w.tile_bytes + unit * vq_unit_bytes(dim, centroids);
    for (int block = 0; block < columns / (4 * dim); ++block) {
      for (int at = 0; at < 4 * kTileRows; ++at) {
        const int index = vq_index(codes + at, dim, centroids, block);
        for (int j = 0; j < dim; ++j) entries[4 * (block * dim + j) + at % 4][at / 4] = codebook[j * centroids + index];
      }
    }
    const int64_t last = std::min(end, (unit + 1) * columns);
    for (int64_t k = std::max(begin, unit * columns); k < last; ++k) use(k, entries[k % columns]);
  }
}

// Runs one tile: segment(begin, end, codebook, factors S * c, index) for each segment, in order.
template <class Segment>
void each_segment(const LinearJob& job, int64_t tile, Segment&& segment) {
  const Matrix& w = job.weight;
  for (int64_t s = 0; s < job.segments; ++s) {
    const int64_t begin = s * job.segment, group = tile * w.groups + s * job.groups_per_segment;
    const Codebook book = codebook_at(*w.codebooks, tile * kTileRows, begin);
    float factors[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      factors[r] = half_to_float(w.scales[group * kTileRows + r]) * half_to_float(book.scale);
    }
    segment(begin, std::min(w.k, begin + job.segment), book.entries, factors, s);
  }
}

void store(const LinearJob& job, int64_t tile, int64_t row, const float acc[kTileRows]) {
  if (row >= job.rows) return;
  const int64_t first = tile * kTileRows, count = std::min(kTileRows, job.weight.n - first);
  for (int64_t r = 0; r < count; ++r) {
    const float value = job.bias ? acc[r] + job.bias[first + r] : acc[r];
    job.y[row * job.y_stride + first + r] = std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value;
  }
}

void tile_int8(const LinearJob& job, int64_t tile, int64_t block) {
  const int64_t R = job.block_rows;
  const int8_t* x = static_cast<const int8_t*>(job.x) + block * job.x_block_bytes;
  float acc[kMaxBlockRows][kTileRows] = {};
  each_segment(job, tile, [&](int64_t begin, int64_t end, const int8_t* codebook, const float* factors, int64_t s) {
    int32_t dot[kMaxBlockRows][kTileRows] = {};
    each_column(job.weight, tile, codebook, begin, end, [&](int64_t k, const int8_t* entries) {
      for (int64_t m = 0; m < R; ++m) {
        const int a = x[(k / 4 * R + m) * 4 + k % 4];
        for (int r = 0; r < kTileRows; ++r) dot[m][r] += entries[r] * a;
      }
    });
    for (int64_t m = 0; m < R; ++m) {
      const float sa = job.sa[(block * job.segments + s) * R + m];
      for (int r = 0; r < kTileRows; ++r) acc[m][r] = std::fmaf(float(dot[m][r]), factors[r] * sa, acc[m][r]);
    }
  });
  for (int64_t m = 0; m < R; ++m) store(job, tile, block * R + m, acc[m]);
}

void tile_float(const LinearJob& job, int64_t tile, int64_t block) {
  const int64_t R = job.block_rows;
  const float* x = reinterpret_cast<const float*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  float acc[kMaxBlockRows][kTileRows] = {};
  each_segment(job, tile, [&](int64_t begin, int64_t end, const int8_t* codebook, const float* factors, int64_t) {
    float part[kMaxBlockRows][4][kTileRows] = {};
    each_column(job.weight, tile, codebook, begin, end, [&](int64_t k, const int8_t* entries) {
      for (int64_t m = 0; m < R; ++m) {
        float* p = part[m][k % 4];
        for (int r = 0; r < kTileRows; ++r) p[r] = std::fmaf(float(entries[r]), x[k * R + m], p[r]);
      }
    });
    for (int64_t m = 0; m < R; ++m) {
      for (int r = 0; r < kTileRows; ++r) {
        const float dot = (part[m][0][r] + part[m][1][r]) + (part[m][2][r] + part[m][3][r]);
        acc[m][r] = std::fmaf(dot, factors[r], acc[m][r]);
      }
    }
  });
  for (int64_t m = 0; m < R; ++m) store(job, tile, block * R + m, acc[m]);
}

template <void (*Tile)(const LinearJob&, int64_t, int64_t)>
void each_tile(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) Tile(job, tile, block);
  }
}

}  // namespace

namespace generic {

void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  each_tile<tile_int8>(job, tile_begin, tile_end, block_begin, block_end);
}

void vq_float(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  each_tile<tile_float>(job, tile_begin, tile_end, block_begin, block_end);
}

}  // namespace generic
}  // namespace qc
