// Columns in float beside the packed product, 4 output rows at a time. Product and sum are each rounded, so that every ISA
// and a plain runtime's Mul and Add give the same bits.
#include "isa.h"
#include "vectors.h"

namespace qc {
namespace neon {

void add_outliers(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t row_begin, int64_t row_end) {
  const int64_t n = job.weight.n, count = job.outlier_count;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const uint16_t* weights = job.outliers + tile * count * kTileRows;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const float* x = job.outlier_x + row * count;
      for (int q = 0; q < 4; ++q) {
        const int64_t first = tile * kTileRows + kQuadRows * q;
        if (first >= n) break;
        float32x4_t y = load_first(job.y + row * n + first, n - first);
        for (int64_t j = 0; j < count; ++j) {
          y = vaddq_f32(y, vmulq_n_f32(load_scales(weights + j * kTileRows, q), x[j]));
        }
        store_first(job.y + row * n + first, with_one_nan(y), n - first);
      }
    }
  }
}

}  // namespace neon
}  // namespace qc
