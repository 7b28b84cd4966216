// int8 activations without VNNI. vpmaddubsw multiplies unsigned by signed bytes and adds pairs, saturating at int16:
//   fewer than 8 bits: codes are unsigned, a pair is at most 2 * 15 * 127 = 3810 (4 bits), and the 8 pairs of a chunk are
//     added up in int16: 30480 <= 32767;
//   8 bits: |q| is unsigned and takes its sign to the activation; a pair is at most 2 * 128 * 127 = 32512 <= 32767, and
//     is widened at once;
//   8 bits and activations that may be -128 (`Full`), where that sign and that pair would overflow: u = q + 128 is unsigned,
//     u = 2 * (u >> 1) + (u & 1), and a pair of the halves is at most 2 * 127 * 128 = 32512.
#include "isa.h"
#include "vectors.h"

namespace qc {
namespace {

static_assert(8 * 2 * largest_level(4, true) * 128 <= INT16_MAX, "a chunk of 4-bit codes stays in int16");
static_assert(2 * 128 * 127 <= INT16_MAX, "a pair of 8-bit codes stays in int16");
static_assert(2 * (255 / 2) * 128 <= INT16_MAX, "a pair of halved 8-bit codes stays in int16");

// Ends an addition here: the compiler would rather add up a tree of all products, and spill them.
QC_INLINE void settle(__m256i& sum) { __asm__("" : "+x"(sum)); }

// sum[h][m] += codes of one chunk times the activations of R rows, for one or both halves of the tile.
template <int Bits, bool Full, int R, int H>
QC_INLINE void add_chunk(const uint8_t* codes, const int32_t* x, __m256i (&sum)[H][R]) {
  const __m256i ones = _mm256_set1_epi16(1), mask = _mm256_set1_epi8(char((1 << Bits) - 1));
  __m256i pairs[H][R];
  for (int h = 0; h < H; ++h) {
    for (int m = 0; m < R; ++m) pairs[h][m] = _mm256_setzero_si256();
  }
  each_vector<Bits, H>(codes, [&](int j, const Halves<H>& v) QC_LAMBDA_INLINE {
    for (int m = 0; m < R; ++m) {
      const __m256i a = _mm256_set1_epi32(x[j * R + m]);
      for (int h = 0; h < H; ++h) {
        if (Full) {
          const __m256i u = _mm256_xor_si256(v.v[h], _mm256_set1_epi8(char(0x80)));
          const __m256i half = _mm256_and_si256(_mm256_srli_epi16(u, 1), _mm256_set1_epi8(0x7f));
          const __m256i rest = _mm256_and_si256(u, _mm256_set1_epi8(1));
          const __m256i twice = _mm256_madd_epi16(_mm256_maddubs_epi16(half, a), _mm256_set1_epi16(2));
          const __m256i once = _mm256_madd_epi16(_mm256_maddubs_epi16(rest, a), ones);
          sum[h][m] = _mm256_add_epi32(sum[h][m], _mm256_add_epi32(twice, once));
          settle(sum[h][m]);
        } else if (Bits == 8) {
          const __m256i pair = _mm256_maddubs_epi16(_mm256_abs_epi8(v.v[h]), _mm256_sign_epi8(a, v.v[h]));
          sum[h][m] = _mm256_add_epi32(sum[h][m], _mm256_madd_epi16(pair, ones));
          settle(sum[h][m]);
        } else {
          const __m256i pair = _mm256_maddubs_epi16(_mm256_and_si256(v.v[h], mask), a);
          pairs[h][m] = _mm256_add_epi16(pairs[h][m], pair);
          settle(pairs[h][m]);
        }
      }
    }
  });
  if (Bits < 8) {
    for (int h = 0; h < H; ++h) {
      for (int m = 0; m < R; ++m) sum[h][m] = _mm256_add_epi32(sum[h][m], _mm256_madd_epi16(pairs[h][m], ones));
    }
  }
}

// Halves first .. first + H - 1: both at once for few rows (the codes then stream through once), else one by one.
template <int Bits, bool Full, bool Asymmetric, int R, int H>
QC_INLINE void halves(const LinearJob& job, const TileCodes<Bits>& codes, int64_t tile, int64_t block, int first) {
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
    __m256i dot[H][R];
    for (int h = 0; h < H; ++h) {
      // 8-bit codes are signed here (unless Full): with no zero point there is nothing to correct.
      for (int m = 0; m < R; ++m) {
        dot[h][m] = Asymmetric || (Bits == 8 && !Full) ? _mm256_setzero_si256() : _mm256_set1_epi32(sums[m]);
      }
    }
    const int64_t end = chunk + per_segment < chunks ? chunk + per_segment : chunks;
    for (; chunk < end; ++chunk, x += 8 * R) {
      if (R == 1 && asks_ahead(Bits, job.segment)) ask_ahead<chunk_bytes(Bits)>(codes.chunk(chunk));
      add_chunk<Bits, Full, R, H>(codes.chunk(chunk) + 32 * first, x, dot);
    }
    for (int h = 0; h < H; ++h) {
      const __m256 scale = load_scales(scales, first + h);
      __m256i zero = Asymmetric ? load_zeros<Bits>(zeros, first + h) : _mm256_setzero_si256();
      if (Full) zero = _mm256_add_epi32(zero, _mm256_set1_epi32(code_bias(Bits)));
      for (int m = 0; m < R; ++m) {
        __m256i d = dot[h][m];
        if (Asymmetric) d = _mm256_sub_epi32(d, _mm256_mullo_epi32(zero, _mm256_set1_epi32(sums[m])));
        acc[h][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d), _mm256_mul_ps(scale, _mm256_set1_ps(sa[m])), acc[h][m]);
      }
    }
    sa += R;
    sums += R;
    scales += job.groups_per_segment * kTileRows;
    if (Asymmetric) zeros += job.groups_per_segment * tile_zero_bytes(Bits);
  }
  for (int h = 0; h < H; ++h) {
    for (int m = 0; m < R; ++m) store(job, tile, first + h, block * R + m, acc[h][m]);
  }
}

template <int Bits, bool Full, bool Asymmetric, int R>
void tile_int8(const LinearJob& job, int64_t tile, int64_t block) {
  const TileCodes<Bits> codes(job.weight, tile);
  if constexpr (R <= 2) {
    halves<Bits, Full, Asymmetric, R, 2>(job, codes, tile, block, 0);
  } else {
    for (int h = 0; h < 2; ++h) halves<Bits, Full, Asymmetric, R, 1>(job, codes, tile, block, h);
  }
}

template <int Bits, bool Full, bool Asymmetric>
TileFunction of_rows(int64_t rows) {
  switch (rows) {
    case 1: return tile_int8<Bits, Full, Asymmetric, 1>;
    case 2: return tile_int8<Bits, Full, Asymmetric, 2>;
    default: return tile_int8<Bits, Full, Asymmetric, 4>;
  }
}

template <int Bits, bool Full = false>
TileFunction of_zeros(const LinearJob& job) {
  return job.weight.zeros ? of_rows<Bits, Full, true>(job.block_rows) : of_rows<Bits, Full, false>(job.block_rows);
}

}  // namespace

namespace avx2 {

const int kInt8BlockRows[] = {1, 2, 4, 0};

void linear_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  const int bits = job.weight.bits;
  const TileFunction run = bits == 8   ? job.full_range ? of_zeros<8, true>(job) : of_zeros<8>(job)
                           : bits == 4 ? of_zeros<4>(job)
                           : bits == 3 ? of_zeros<3>(job)
                                       : of_zeros<2>(job);
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) run(job, tile, block);
  }
}

}  // namespace avx2
}  // namespace qc
