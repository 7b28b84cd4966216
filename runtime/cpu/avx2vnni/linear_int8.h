// int8 activations and levels. Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_AVX2VNNI_LINEAR_INT8_H
#define QCOMPILER_AVX2VNNI_LINEAR_INT8_H

#include "products.h"

namespace qc {
namespace {

// Halves first .. first + H - 1 of a tile.
template <int Bits, bool Asymmetric, int R, int H, class Keep>
QC_INLINE void halves(const LinearJob& job, const TileCodes<Bits>& codes, int64_t tile, int64_t block, int first, Keep keep) {
  const Matrix& w = job.weight;
  const int32_t* x = reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  const float* sa = job.sa + block * job.segments * R;
  const int32_t* sums = job.sums + block * job.segments * R;
  const uint16_t* scales = w.scales + tile * w.groups * kTileRows;
  const uint8_t* zeros = Asymmetric ? w.zeros + tile * w.groups * tile_zero_bytes(Bits) : nullptr;
  const int64_t chunks = ceil_div(w.k, kChunk), per_segment = ceil_div(job.segment, kChunk);

  __m256 acc[H][R];
  for (int h = 0; h < H; ++h) {
    for (int m = 0; m < R; ++m) acc[h][m] = _mm256_setzero_ps();
  }
  int64_t chunk = 0;
  for (int64_t s = 0; s < job.segments; ++s) {
    Sums<R, H> dots(Asymmetric ? nullptr : sums);
    const int64_t end = chunk + per_segment < chunks ? chunk + per_segment : chunks;
    for (; chunk < end; ++chunk, x += 8 * R) {
      if (Keep::kAhead || (R == 1 && asks_ahead(Bits, job.segment))) ask_ahead<chunk_bytes(Bits)>(codes.chunk(chunk));
      each_vector<Bits, H>(codes.chunk(chunk) + 32 * first, [&](int j, const Halves<H>& v) QC_LAMBDA_INLINE {
        const Halves<H> bytes = Bits == 8 ? v.flipped() : v.masked((1 << Bits) - 1);
        keep.vector(j, first, bytes);
        dots.add(j, bytes, x);
      });
      keep.chunk();
    }
    for (int h = 0; h < H; ++h) {
      const __m256 scale = load_scales(scales, first + h);
      const __m256i zero = Asymmetric ? _mm256_add_epi32(load_zeros<Bits>(zeros, first + h), _mm256_set1_epi32(code_bias(Bits)))
                                      : _mm256_setzero_si256();
      keep.segment(first + h, scale, zero, Asymmetric);
      for (int m = 0; m < R; ++m) {
        __m256i d = dots.total(h, m);
        if (Asymmetric) d = _mm256_sub_epi32(d, _mm256_mullo_epi32(zero, _mm256_set1_epi32(sums[m])));
        acc[h][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d), _mm256_mul_ps(scale, _mm256_set1_ps(sa[m])), acc[h][m]);
      }
    }
    keep.next();
    sa += R;
    sums += R;
    scales += job.groups_per_segment * kTileRows;
    if (Asymmetric) zeros += job.groups_per_segment * tile_zero_bytes(Bits);
  }
  for (int h = 0; h < H; ++h) {
    for (int m = 0; m < R; ++m) store(job, tile, first + h, block * R + m, acc[h][m]);
  }
}

template <int Bits, bool Asymmetric, int R, class Keep>
QC_INLINE void both_halves(const LinearJob& job, int64_t tile, int64_t block, Keep keep) {
  constexpr int H = halves_at_once(R);
  const TileCodes<Bits> codes(job.weight, tile);
  for (int first = 0; first < 2; first += H) halves<Bits, Asymmetric, R, H>(job, codes, tile, block, first, keep);
}

template <int Bits, bool Asymmetric, int R>
void tile_int8(const LinearJob& job, int64_t tile, int64_t block) {
  both_halves<Bits, Asymmetric, R>(job, tile, block, KeepNothing());
}

template <int Bits, bool Asymmetric, int R>
void keep_int8(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out) {
  both_halves<Bits, Asymmetric, R>(job, tile, block, KeepTile{out});
}

template <int Bits, bool Asymmetric>
TileFunction of_rows(int64_t rows) {
  switch (rows) {
    case 1: return tile_int8<Bits, Asymmetric, 1>;
    case 2: return tile_int8<Bits, Asymmetric, 2>;
    case 4: return tile_int8<Bits, Asymmetric, 4>;
    default: return tile_int8<Bits, Asymmetric, 8>;
  }
}

template <int Bits>
TileFunction of_zeros(const LinearJob& job) {
  return job.weight.zeros ? of_rows<Bits, true>(job.block_rows) : of_rows<Bits, false>(job.block_rows);
}

inline TileFunction tile_function(const LinearJob& job) {
  switch (job.weight.bits) {
    case 8: return of_zeros<8>(job);
    case 4: return of_zeros<4>(job);
    case 3: return of_zeros<3>(job);
    default: return of_zeros<2>(job);
  }
}

template <int Bits>
KeepFunction keep_of_zeros(const LinearJob& job) {
  return job.weight.zeros ? job.block_rows == 5 ? keep_int8<Bits, true, 5> : keep_int8<Bits, true, 6>
         : job.block_rows == 5 ? keep_int8<Bits, false, 5>
                               : keep_int8<Bits, false, 6>;
}

inline KeepFunction keep_function(const LinearJob& job) {
  switch (job.weight.bits) {
    case 8: return keep_of_zeros<8>(job);
    case 4: return keep_of_zeros<4>(job);
    case 3: return keep_of_zeros<3>(job);
    default: return keep_of_zeros<2>(job);
  }
}

}  // namespace
}  // namespace qc
#endif
