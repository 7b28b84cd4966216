// Columns in float beside the packed product, 16 output rows at a time. Product and sum are each rounded, so that every ISA
// and a plain runtime's Mul and Add give the same bits.
#include "isa.h"
#include "vectors.h"

namespace qc {
namespace avx512 {

void add_outliers(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t row_begin, int64_t row_end) {
  const int64_t n = job.weight.n, count = job.outlier_count;
  const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const uint16_t* weights = job.outliers + tile * count * kTileRows;
    const int64_t left = n - tile * kTileRows;
    const __mmask16 mask = left >= kTileRows ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
    for (int64_t row = row_begin; row < row_end; ++row) {
      const float* x = job.outlier_x + row * count;
      float* out = job.y + row * n + tile * kTileRows;
      __m512 y = _mm512_maskz_loadu_ps(mask, out);
      for (int64_t j = 0; j < count; ++j) {
        y = _mm512_add_ps(y, _mm512_mul_ps(_mm512_set1_ps(x[j]), load_scales(weights + j * kTileRows)));
      }
      y = _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), nan);
      _mm512_mask_storeu_ps(out, mask, y);
    }
  }
}

}  // namespace avx512
}  // namespace qc
