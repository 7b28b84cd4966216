// int8 activations: entries are signed bytes like 8-bit codes (see linear_int8.cpp), and activations lie in [-127, 127].
#include "isa.h"
#include "vq_kernels.h"

namespace qc {
namespace {

static_assert(2 * 128 * 127 <= INT16_MAX, "a pair of products stays in int16");

template <class Decoder, int R, int H>
QC_INLINE void halves(const LinearJob& job, const VqCodes<Decoder::kBits>& codes, int64_t tile, int64_t block, int first) {
  const Matrix& w = job.weight;
  TileBooks books(*w.codebooks, tile);
  const int32_t* x = reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  const float* sa = job.sa + block * job.segments * R;
  const uint16_t* scales = w.scales + tile * w.groups * kTileRows;
  const int64_t chunks = ceil_div(w.k, kChunk), per_segment = job.segment / kChunk;
  const int64_t segments_per_book = w.codebooks->block_columns / job.segment;
  const __m256i ones = _mm256_set1_epi16(1);

  __m256 acc[H][R];
  for (int h = 0; h < H; ++h) {
    for (int m = 0; m < R; ++m) acc[h][m] = _mm256_setzero_ps();
  }
  int64_t chunk = 0;
  for (int64_t s = 0; s < job.segments; books.next()) {
    const Decoder decoder(books.entries, w.codebooks->dim);
    const __m256 shared = books.scale();
    const int64_t book_end = s + segments_per_book < job.segments ? s + segments_per_book : job.segments;
    for (; s < book_end; ++s) {
      __m256i dot[H][R];
      for (int h = 0; h < H; ++h) {
        for (int m = 0; m < R; ++m) dot[h][m] = _mm256_setzero_si256();
      }
      const int64_t end = chunk + per_segment < chunks ? chunk + per_segment : chunks;
      for (; chunk < end; ++chunk, x += 8 * R) {
        const uint8_t* p = codes.chunk(chunk) + 32 * first;
        if (R == 1 && Decoder::kBits == 2) ask_ahead<chunk_bytes(2)>(p);
        decoder.template each<H>(p, chunk % 2 != 0, [&](int j, const Halves<H>& v) QC_LAMBDA_INLINE {
          for (int m = 0; m < R; ++m) {
            const __m256i a = _mm256_set1_epi32(x[j * R + m]);
            for (int h = 0; h < H; ++h) {
              const __m256i pair = _mm256_maddubs_epi16(_mm256_abs_epi8(v.v[h]), _mm256_sign_epi8(a, v.v[h]));
              dot[h][m] = _mm256_add_epi32(dot[h][m], _mm256_madd_epi16(pair, ones));
              // Ends the addition here: the compiler would rather add up a tree of all products, and spill them.
              __asm__("" : "+x"(dot[h][m]));
            }
          }
        });
      }
      for (int h = 0; h < H; ++h) {
        const __m256 scale = _mm256_mul_ps(load_scales(scales, first + h), shared);
        for (int m = 0; m < R; ++m) {
          const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(sa[m]));
          acc[h][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[h][m]), factor, acc[h][m]);
        }
      }
      sa += R;
      scales += job.groups_per_segment * kTileRows;
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int m = 0; m < R; ++m) store(job, tile, first + h, block * R + m, acc[h][m]);
  }
}

// Both halves at once for few rows (the codes then stream through once), else one by one.
template <class Decoder, int R>
void tile_int8(const LinearJob& job, int64_t tile, int64_t block) {
  const VqCodes<Decoder::kBits> codes(job.weight, tile);
  if constexpr (R <= 2) {
    halves<Decoder, R, 2>(job, codes, tile, block, 0);
  } else {
    for (int h = 0; h < 2; ++h) halves<Decoder, R, 1>(job, codes, tile, block, h);
  }
}

template <class Decoder>
TileFunction of_rows(int64_t rows) {
  switch (rows) {
    case 1: return tile_int8<Decoder, 1>;
    case 2: return tile_int8<Decoder, 2>;
    default: return tile_int8<Decoder, 4>;
  }
}

}  // namespace

namespace avx2 {

void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  const TileFunction run = with_decoder<Decoders>(*job.weight.codebooks, [&](auto tag) {
    return of_rows<typename decltype(tag)::type>(job.block_rows);
  });
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) run(job, tile, block);
  }
}

}  // namespace avx2
}  // namespace qc
