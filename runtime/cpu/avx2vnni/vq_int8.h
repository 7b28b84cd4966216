// int8 activations and codebooks. The tables hold entries that are biased by 128, unsigned: the sums that a segment starts from
// take that off (see linear.cpp). Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_AVX2VNNI_VQ_INT8_H
#define QCOMPILER_AVX2VNNI_VQ_INT8_H

#include "../avx2/vq_kernels.h"
#include "products.h"

namespace qc {
namespace {

// Halves first .. first + H - 1 of a tile.
template <class Decoder, int R, int H, class Keep>
QC_INLINE void halves(const LinearJob& job, const VqCodes<Decoder::kBits>& codes, int64_t tile, int64_t block, int first,
                      Keep keep) {
  const Matrix& w = job.weight;
  TileBooks books(*w.codebooks, tile);
  const int32_t* x = reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  const float* sa = job.sa + block * job.segments * R;
  const int32_t* sums = job.sums + block * job.segments * R;
  const uint16_t* scales = w.scales + tile * w.groups * kTileRows;
  const int64_t chunks = ceil_div(w.k, kChunk), per_segment = job.segment / kChunk;
  const int64_t segments_per_book = w.codebooks->block_columns / job.segment;

  __m256 acc[H][R];
  for (int h = 0; h < H; ++h) {
    for (int m = 0; m < R; ++m) acc[h][m] = _mm256_setzero_ps();
  }
  int64_t chunk = 0;
  for (int64_t s = 0; s < job.segments; books.next()) {
    const Decoder decoder(books.entries, w.codebooks->dim, kBiased);
    const __m256 shared = books.scale();
    const int64_t book_end = s + segments_per_book < job.segments ? s + segments_per_book : job.segments;
    for (; s < book_end; ++s) {
      Sums<R, H> dots(sums);
      const int64_t end = chunk + per_segment < chunks ? chunk + per_segment : chunks;
      for (; chunk < end; ++chunk, x += 8 * R) {
        const uint8_t* p = codes.chunk(chunk) + 32 * first;
        if (Keep::kAhead || (R == 1 && Decoder::kBits == 2)) ask_ahead<chunk_bytes(2)>(p);
        decoder.template each<H>(p, chunk % 2 != 0, [&](int j, const Halves<H>& v) QC_LAMBDA_INLINE {
          keep.vector(j, first, v);
          dots.add(j, v, x);
        });
        keep.chunk();
      }
      for (int h = 0; h < H; ++h) {
        const __m256 scale = _mm256_mul_ps(load_scales(scales, first + h), shared);
        keep.segment(first + h, scale, __m256i(), false);
        for (int m = 0; m < R; ++m) {
          const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(sa[m]));
          acc[h][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots.total(h, m)), factor, acc[h][m]);
        }
      }
      keep.next();
      sa += R;
      sums += R;
      scales += job.groups_per_segment * kTileRows;
    }
  }
  for (int h = 0; h < H; ++h) {
    for (int m = 0; m < R; ++m) store(job, tile, first + h, block * R + m, acc[h][m]);
  }
}

template <class Decoder, int R, class Keep>
QC_INLINE void both_halves(const LinearJob& job, int64_t tile, int64_t block, Keep keep) {
  constexpr int H = halves_at_once(R);
  const VqCodes<Decoder::kBits> codes(job.weight, tile);
  for (int first = 0; first < 2; first += H) halves<Decoder, R, H>(job, codes, tile, block, first, keep);
}

template <class Decoder, int R>
void tile_vq_int8(const LinearJob& job, int64_t tile, int64_t block) {
  both_halves<Decoder, R>(job, tile, block, KeepNothing());
}

template <class Decoder, int R>
void keep_vq_int8(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out) {
  both_halves<Decoder, R>(job, tile, block, KeepTile{out});
}

template <class Decoder>
TileFunction of_rows(int64_t rows) {
  switch (rows) {
    case 1: return tile_vq_int8<Decoder, 1>;
    case 2: return tile_vq_int8<Decoder, 2>;
    case 4: return tile_vq_int8<Decoder, 4>;
    default: return tile_vq_int8<Decoder, 8>;
  }
}

inline TileFunction tile_function(const LinearJob& job) {
  return with_decoder<Decoders>(*job.weight.codebooks, [&](auto tag) { return of_rows<typename decltype(tag)::type>(job.block_rows); });
}

inline KeepFunction keep_function(const LinearJob& job) {
  return with_decoder<Decoders, KeepFunction>(*job.weight.codebooks, [&](auto tag) -> KeepFunction {
    using Decoder = typename decltype(tag)::type;
    return job.block_rows == 5 ? keep_vq_int8<Decoder, 5> : keep_vq_int8<Decoder, 6>;
  });
}

}  // namespace
}  // namespace qc
#endif
