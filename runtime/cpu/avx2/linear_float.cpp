// Float activations: a code becomes a float without conversion. OR-ed into the mantissa of a power of two whose unit in
// the last place is the code's own bit position, it reads 2^23 + q (bits 0 .. 7 of a dword) or 2^15 + q (bits 8 .. 15);
// subtracting 2^23 + Z or 2^15 + Z leaves q - Z, exactly.
#include "isa.h"
#include "vectors.h"

namespace qc {
namespace {

template <int Bits, bool Asymmetric, int R>
QC_INLINE void half(const LinearJob& job, const TileCodes<Bits>& codes, int64_t tile, int64_t block, int h) {
  const Matrix& w = job.weight;
  const float* x = reinterpret_cast<const float*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  const uint16_t* scales = w.scales + tile * w.groups * kTileRows;
  const uint8_t* zeros = Asymmetric ? w.zeros + tile * w.groups * tile_zero_bytes(Bits) : nullptr;
  const int64_t chunks = ceil_div(w.k, kChunk), per_group = ceil_div(job.segment, kChunk);

  constexpr int kField = (1 << Bits) - 1;
  constexpr float kBias = float(code_bias(Bits)), kSymmetric = float(symmetric_zero(Bits)) + kBias;
  const __m256i field0 = _mm256_set1_epi32(kField), field8 = _mm256_set1_epi32(kField << 8);
  const __m256i one0 = _mm256_set1_epi32(0x4b000000), one8 = _mm256_set1_epi32(0x47000000);  // 2^23, 2^15
  __m256 base0 = _mm256_set1_ps(8388608.0f + kSymmetric), base8 = _mm256_set1_ps(32768.0f + kSymmetric);

  __m256 acc[R];
  for (int m = 0; m < R; ++m) acc[m] = _mm256_setzero_ps();
  int64_t chunk = 0;
  for (int64_t g = 0; g < job.segments; ++g) {
    if (Asymmetric) {
      const __m256 zero = _mm256_cvtepi32_ps(load_zeros<Bits>(zeros, h));
      base0 = _mm256_add_ps(_mm256_set1_ps(8388608.0f + kBias), zero);
      base8 = _mm256_add_ps(_mm256_set1_ps(32768.0f + kBias), zero);
      zeros += tile_zero_bytes(Bits);
    }
    __m256 part[R][4];
    for (int m = 0; m < R; ++m) {
      for (int i = 0; i < 4; ++i) part[m][i] = _mm256_setzero_ps();
    }
    const int64_t end = chunk + per_group < chunks ? chunk + per_group : chunks;
    for (; chunk < end; ++chunk, x += 32 * R) {
      each_vector<Bits, 1>(codes.chunk(chunk) + 32 * h, [&](int j, const Halves<1>& v) QC_LAMBDA_INLINE {
        __m256i low = v.v[0];
        if (Bits == 8) low = _mm256_xor_si256(low, _mm256_set1_epi8(char(0x80)));
        const __m256i high = _mm256_srli_epi32(low, 16);
        for (int i = 0; i < 4; ++i) {
          const __m256i field = _mm256_and_si256(i < 2 ? low : high, i % 2 ? field8 : field0);
          const __m256 biased = _mm256_castsi256_ps(_mm256_or_si256(field, i % 2 ? one8 : one0));
          const __m256 level = _mm256_sub_ps(biased, i % 2 ? base8 : base0);
          for (int m = 0; m < R; ++m) {
            part[m][i] = _mm256_fmadd_ps(level, _mm256_set1_ps(x[(4 * j + i) * R + m]), part[m][i]);
          }
        }
      });
    }
    const __m256 scale = load_scales(scales, h);
    scales += kTileRows;
    for (int m = 0; m < R; ++m) {
      const __m256 dot = _mm256_add_ps(_mm256_add_ps(part[m][0], part[m][1]), _mm256_add_ps(part[m][2], part[m][3]));
      acc[m] = _mm256_fmadd_ps(dot, scale, acc[m]);
    }
  }
  for (int m = 0; m < R; ++m) store(job, tile, h, block * R + m, acc[m]);
}

// Compute-bound: the second half finds its codes in the cache.
template <int Bits, bool Asymmetric, int R>
void tile_float(const LinearJob& job, int64_t tile, int64_t block) {
  const TileCodes<Bits> codes(job.weight, tile);
  for (int h = 0; h < 2; ++h) half<Bits, Asymmetric, R>(job, codes, tile, block, h);
}

template <int Bits, bool Asymmetric>
TileFunction of_rows(int64_t rows) {
  return rows == 1 ? tile_float<Bits, Asymmetric, 1> : tile_float<Bits, Asymmetric, 2>;
}

template <int Bits>
TileFunction of_zeros(const LinearJob& job) {
  return job.weight.zeros ? of_rows<Bits, true>(job.block_rows) : of_rows<Bits, false>(job.block_rows);
}

}  // namespace

namespace avx2 {

const int kFloatBlockRows[] = {1, 2, 0};

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

}  // namespace avx2
}  // namespace qc
