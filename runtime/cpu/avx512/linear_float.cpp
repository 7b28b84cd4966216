// Float activations: a code becomes a float without conversion. OR-ed into the mantissa of a power of two whose unit in
// the last place is the code's own bit position, it reads 2^23 + q (bits 0 .. 7 of a dword) or 2^15 + q (bits 8 .. 15);
// subtracting 2^23 + Z or 2^15 + Z leaves q - Z, exactly.
#include "isa.h"
#include "vectors.h"

namespace qc {
namespace {

template <int Bits, bool Asymmetric, int R>
void tile_float(const LinearJob& job, int64_t tile, int64_t block) {
  const Matrix& w = job.weight;
  const TileCodes<Bits> codes(w, tile);
  const float* x = reinterpret_cast<const float*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  const uint16_t* scales = w.scales + tile * w.groups * kTileRows;
  const uint8_t* zeros = Asymmetric ? w.zeros + tile * w.groups * tile_zero_bytes(Bits) : nullptr;
  const int64_t chunks = ceil_div(w.k, kChunk), per_group = ceil_div(job.segment, kChunk);

  constexpr int kAndOr = 0xea;  // (a & b) | c
  constexpr int kField = (1 << Bits) - 1;
  constexpr float kSymmetric = float(symmetric_zero(Bits) + code_bias(Bits));
  const __m512i field0 = _mm512_set1_epi32(kField), field8 = _mm512_set1_epi32(kField << 8);
  const __m512i one0 = _mm512_set1_epi32(0x4b000000), one8 = _mm512_set1_epi32(0x47000000);  // 2^23, 2^15
  __m512 base0 = _mm512_set1_ps(8388608.0f + kSymmetric), base8 = _mm512_set1_ps(32768.0f + kSymmetric);

  __m512 acc[R];
  for (int m = 0; m < R; ++m) acc[m] = _mm512_setzero_ps();
  int64_t chunk = 0;
  for (int64_t g = 0; g < job.segments; ++g) {
    if (Asymmetric) {
      const __m512 zero = _mm512_cvtepi32_ps(load_zeros<Bits>(zeros));
      base0 = _mm512_add_ps(_mm512_set1_ps(8388608.0f), zero);
      base8 = _mm512_add_ps(_mm512_set1_ps(32768.0f), zero);
      zeros += tile_zero_bytes(Bits);
    }
    __m512 part[R][4];
    for (int m = 0; m < R; ++m) {
      for (int i = 0; i < 4; ++i) part[m][i] = _mm512_setzero_ps();
    }
    const int64_t end = chunk + per_group < chunks ? chunk + per_group : chunks;
    for (; chunk < end; ++chunk, x += 32 * R) {
      each_vector<Bits>(codes.chunk(chunk), [&](int j, __m512i low) QC_LAMBDA_INLINE {
        const __m512i high = _mm512_srli_epi32(low, 16);
        for (int i = 0; i < 4; ++i) {
          const __m512i codes4 = i < 2 ? low : high;
          const __m512i biased = i % 2 ? _mm512_ternarylogic_epi32(codes4, field8, one8, kAndOr)
                                       : _mm512_ternarylogic_epi32(codes4, field0, one0, kAndOr);
          const __m512 level = _mm512_sub_ps(_mm512_castsi512_ps(biased), i % 2 ? base8 : base0);
          for (int m = 0; m < R; ++m) {
            part[m][i] = _mm512_fmadd_ps(level, _mm512_set1_ps(x[(4 * j + i) * R + m]), part[m][i]);
          }
        }
      });
    }
    const __m512 scale = load_scales(scales);
    scales += kTileRows;
    for (int m = 0; m < R; ++m) {
      const __m512 dot = _mm512_add_ps(_mm512_add_ps(part[m][0], part[m][1]), _mm512_add_ps(part[m][2], part[m][3]));
      acc[m] = _mm512_fmadd_ps(dot, scale, acc[m]);
    }
  }
  for (int m = 0; m < R; ++m) store(job, tile, block * R + m, acc[m]);
}

template <int Bits, bool Asymmetric>
TileFunction of_rows(int64_t rows) {
  switch (rows) {
    case 1: return tile_float<Bits, Asymmetric, 1>;
    case 2: return tile_float<Bits, Asymmetric, 2>;
    case 4: return tile_float<Bits, Asymmetric, 4>;
    default: return tile_float<Bits, Asymmetric, 6>;
  }
}

template <int Bits>
TileFunction of_zeros(const LinearJob& job) {
  return job.weight.zeros ? of_rows<Bits, true>(job.block_rows) : of_rows<Bits, false>(job.block_rows);
}

}  // namespace

namespace avx512 {

const int kFloatBlockRows[] = {1, 2, 4, 6, 0};

void linear_float(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  const int bits = job.weight.bits;
  const TileFunction run = bits == 8   ? of_zeros<8>(job)
                           : bits == 4 ? of_zeros<4>(job)
                           : bits == 3 ? of_zeros<3>(job)
                                       : of_zeros<2>(job);
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) run(job, tile, block);
  }
}

}  // namespace avx512
}  // namespace qc
