// Float activations: entries become floats as 8-bit codes do (see linear_float.cpp).
#include "isa.h"
#include "vq_kernels.h"

namespace qc {
namespace {

template <class Decoder, int R>
QC_INLINE void half(const LinearJob& job, const VqCodes<Decoder::kBits>& codes, int64_t tile, int64_t block, int h) {
  const Matrix& w = job.weight;
  TileBooks books(*w.codebooks, tile);
  const float* x = reinterpret_cast<const float*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  const uint16_t* scales = w.scales + tile * w.groups * kTileRows;
  const int64_t chunks = ceil_div(w.k, kChunk), per_segment = job.segment / kChunk;
  const int64_t segments_per_book = w.codebooks->block_columns / job.segment;

  const __m256i field0 = _mm256_set1_epi32(0xff), field8 = _mm256_set1_epi32(0xff00);
  const __m256i one0 = _mm256_set1_epi32(0x4b000000), one8 = _mm256_set1_epi32(0x47000000);  // 2^23, 2^15
  const __m256 base0 = _mm256_set1_ps(8388608.0f + 128.0f), base8 = _mm256_set1_ps(32768.0f + 128.0f);

  __m256 acc[R];
  for (int m = 0; m < R; ++m) acc[m] = _mm256_setzero_ps();
  int64_t chunk = 0;
  for (int64_t s = 0; s < job.segments; books.next()) {
    const Decoder decoder(books.entries, w.codebooks->dim);
    const __m256 shared = books.scale();
    const int64_t book_end = s + segments_per_book < job.segments ? s + segments_per_book : job.segments;
    for (; s < book_end; ++s) {
      __m256 part[R][4];
      for (int m = 0; m < R; ++m) {
        for (int i = 0; i < 4; ++i) part[m][i] = _mm256_setzero_ps();
      }
      const int64_t end = chunk + per_segment < chunks ? chunk + per_segment : chunks;
      for (; chunk < end; ++chunk, x += 32 * R) {
        const uint8_t* p = codes.chunk(chunk) + 32 * h;
        decoder.template each<1>(p, chunk % 2 != 0, [&](int j, const Halves<1>& v) QC_LAMBDA_INLINE {
          const __m256i low = _mm256_xor_si256(v.v[0], _mm256_set1_epi8(char(0x80)));
          const __m256i high = _mm256_srli_epi32(low, 16);
          for (int i = 0; i < 4; ++i) {
            const __m256i field = _mm256_and_si256(i < 2 ? low : high, i % 2 ? field8 : field0);
            const __m256 biased = _mm256_castsi256_ps(_mm256_or_si256(field, i % 2 ? one8 : one0));
            const __m256 entry = _mm256_sub_ps(biased, i % 2 ? base8 : base0);
            for (int m = 0; m < R; ++m) {
              part[m][i] = _mm256_fmadd_ps(entry, _mm256_set1_ps(x[(4 * j + i) * R + m]), part[m][i]);
            }
          }
        });
      }
      const __m256 scale = _mm256_mul_ps(load_scales(scales, h), shared);
      for (int m = 0; m < R; ++m) {
        const __m256 dot = _mm256_add_ps(_mm256_add_ps(part[m][0], part[m][1]), _mm256_add_ps(part[m][2], part[m][3]));
        acc[m] = _mm256_fmadd_ps(dot, scale, acc[m]);
      }
      scales += job.groups_per_segment * kTileRows;
    }
  }
  for (int m = 0; m < R; ++m) store(job, tile, h, block * R + m, acc[m]);
}

template <class Decoder, int R>
void tile_float(const LinearJob& job, int64_t tile, int64_t block) {
  const VqCodes<Decoder::kBits> codes(job.weight, tile);
  for (int h = 0; h < 2; ++h) half<Decoder, R>(job, codes, tile, block, h);
}

template <class Decoder>
TileFunction of_rows(int64_t rows) {
  return rows == 1 ? tile_float<Decoder, 1> : tile_float<Decoder, 2>;
}

}  // namespace

namespace avx2 {

void vq_float(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  const TileFunction run = with_decoder<Decoders>(*job.weight.codebooks, [&](auto tag) {
    return of_rows<typename decltype(tag)::type>(job.block_rows);
  });
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) run(job, tile, block);
  }
}

}  // namespace avx2
}  // namespace qc
