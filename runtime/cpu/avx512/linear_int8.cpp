// int8 activations: each unit is decoded in registers to unsigned bytes and meets R rows through vpdpbusd, whose second
// operand is a dword (4 consecutive k) of one row, broadcast from memory. Lane = output row. vpdpbusd does not saturate,
// so every sum is exact modulo 2^32, and the segment's true sum fits (checked by the caller).
#include "isa.h"
#include "vectors.h"

namespace qc {
namespace {

template <int Bits, bool Asymmetric, int R, class Keep>
QC_INLINE void rows_int8(const LinearJob& job, int64_t tile, int64_t block, Keep keep) {
  // vpdpbusd has a latency of 4 and a throughput of 1: few rows need several chains each.
  constexpr int kChains = R == 1 ? 4 : R <= 3 ? 2 : 1;
  const Matrix& w = job.weight;
  const TileCodes<Bits> codes(w, tile);
  const int32_t* x = reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  const float* sa = job.sa + block * job.segments * R;
  const int32_t* sums = job.sums + block * job.segments * R;
  const uint16_t* scales = w.scales + tile * w.groups * kTileRows;
  const uint8_t* zeros = Asymmetric ? w.zeros + tile * w.groups * tile_zero_bytes(Bits) : nullptr;
  const int64_t chunks = ceil_div(w.k, kChunk), per_segment = ceil_div(job.segment, kChunk);
  const __m512i mask = _mm512_set1_epi8(char((1 << Bits) - 1));

  __m512 acc[R];
  for (int m = 0; m < R; ++m) acc[m] = _mm512_setzero_ps();
  int64_t chunk = 0;
  for (int64_t s = 0; s < job.segments; ++s) {
    __m512i dot[R][kChains];
    for (int m = 0; m < R; ++m) {
      dot[m][0] = Asymmetric ? _mm512_setzero_si512() : _mm512_set1_epi32(sums[m]);
      for (int c = 1; c < kChains; ++c) dot[m][c] = _mm512_setzero_si512();
    }
    const int64_t end = chunk + per_segment < chunks ? chunk + per_segment : chunks;
    for (; chunk < end; ++chunk, x += 8 * R) {
      const uint8_t* p = codes.chunk(chunk);
      if (Keep::kAhead || (R == 1 && asks_ahead(Bits, job.segment))) ask_ahead<chunk_bytes(Bits)>(p);
      each_vector<Bits>(p, [&](int j, __m512i v) QC_LAMBDA_INLINE {
        if (Bits < 8) v = _mm512_and_si512(v, mask);
        keep.vector(j, v);
        for (int m = 0; m < R; ++m) {
          __m512i& d = dot[m][j % kChains];
          d = _mm512_dpbusd_epi32(d, v, _mm512_set1_epi32(x[j * R + m]));
        }
      });
      keep.chunk();
    }
    const __m512 scale = load_scales(scales);
    const __m512i zero = Asymmetric ? load_zeros<Bits>(zeros) : _mm512_setzero_si512();
    keep.segment(scale, zero, Asymmetric);
    for (int m = 0; m < R; ++m) {
      __m512i d = dot[m][0];
      if (kChains > 1) d = _mm512_add_epi32(d, dot[m][1]);
      if (kChains > 2) d = _mm512_add_epi32(d, _mm512_add_epi32(dot[m][2 % kChains], dot[m][3 % kChains]));
      if (Asymmetric) d = _mm512_sub_epi32(d, _mm512_mullo_epi32(zero, _mm512_set1_epi32(sums[m])));
      acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), _mm512_mul_ps(scale, _mm512_set1_ps(sa[m])), acc[m]);
    }
    sa += R;
    sums += R;
    scales += job.groups_per_segment * kTileRows;
    if (Asymmetric) zeros += job.groups_per_segment * tile_zero_bytes(Bits);
  }
  for (int m = 0; m < R; ++m) store(job, tile, block * R + m, acc[m]);
}

template <int Bits, bool Asymmetric, int R>
void tile_int8(const LinearJob& job, int64_t tile, int64_t block) {
  rows_int8<Bits, Asymmetric, R>(job, tile, block, KeepNothing());
}

template <int Bits, bool Asymmetric, int R>
void keep_int8(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out) {
  rows_int8<Bits, Asymmetric, R>(job, tile, block, KeepTile{out});
}

template <int Bits, bool Asymmetric>
TileFunction of_rows(int64_t rows) {
  switch (rows) {
    case 1: return tile_int8<Bits, Asymmetric, 1>;
    case 2: return tile_int8<Bits, Asymmetric, 2>;
    case 3: return tile_int8<Bits, Asymmetric, 3>;
    case 4: return tile_int8<Bits, Asymmetric, 4>;
    case 6: return tile_int8<Bits, Asymmetric, 6>;
    case 8: return tile_int8<Bits, Asymmetric, 8>;
    default: return tile_int8<Bits, Asymmetric, 12>;
  }
}

template <int Bits>
TileFunction of_zeros(const LinearJob& job) {
  return job.weight.zeros ? of_rows<Bits, true>(job.block_rows) : of_rows<Bits, false>(job.block_rows);
}

template <int Bits, bool Asymmetric>
KeepFunction keep_of_rows(int64_t rows) {
  switch (rows) {
    case 4: return keep_int8<Bits, Asymmetric, 4>;
    case 6: return keep_int8<Bits, Asymmetric, 6>;
    default: return keep_int8<Bits, Asymmetric, 8>;
  }
}

template <int Bits>
KeepFunction keep_of_zeros(const LinearJob& job) {
  return job.weight.zeros ? keep_of_rows<Bits, true>(job.block_rows) : keep_of_rows<Bits, false>(job.block_rows);
}

}  // namespace

namespace avx512 {

const int kInt8BlockRows[] = {1, 2, 3, 4, 6, 8, 12, 0};

void linear_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  const int bits = job.weight.bits;
  const TileFunction run = bits == 8   ? of_zeros<8>(job)
                           : bits == 4 ? of_zeros<4>(job)
                           : bits == 3 ? of_zeros<3>(job)
                                       : of_zeros<2>(job);
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) run(job, tile, block);
  }
}

void keep(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out) {
  const int bits = job.weight.bits;
  const KeepFunction run = bits == 8   ? keep_of_zeros<8>(job)
                           : bits == 4 ? keep_of_zeros<4>(job)
                           : bits == 3 ? keep_of_zeros<3>(job)
                                       : keep_of_zeros<2>(job);
  run(job, tile, block, out);
}

}  // namespace avx512
}  // namespace qc
