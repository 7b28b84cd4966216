// Columns in float beside the packed product, 8 output rows at a time. Product and sum are each rounded, so that every ISA
// and a plain runtime's Mul and Add give the same bits.
#include "isa.h"
#include "vectors.h"

namespace qc {
namespace avx2 {

void add_outliers(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t row_begin, int64_t row_end) {
  const int64_t n = job.weight.n, count = job.outlier_count;
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const uint16_t* weights = job.outliers + tile * count * kTileRows;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const float* x = job.outlier_x + row * count;
      for (int h = 0; h < 2; ++h) {
        const int64_t first = tile * kTileRows + kHalfRows * h;
        if (first >= n) break;
        const __m256i mask = first_lanes(n - first);
        __m256 y = _mm256_maskload_ps(job.y + row * n + first, mask);
        for (int64_t j = 0; j < count; ++j) {
          const __m256 product = _mm256_mul_ps(_mm256_set1_ps(x[j]), load_scales(weights + j * kTileRows, h));
          y = _mm256_add_ps(y, product);
        }
        y = _mm256_blendv_ps(y, nan, _mm256_cmp_ps(y, y, _CMP_UNORD_Q));
        _mm256_maskstore_ps(job.y + row * n + first, mask, y);
      }
    }
  }
}

}  // namespace avx2
}  // namespace qc
