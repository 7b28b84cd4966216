// Decoding of W16x4 units with AVX2, shared by the kernels of this folder: a tile is two halves of 8 rows, half h of a
// 64-byte vector being its bytes 32h .. 32h+31. Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_AVX2_VECTORS_H
#define QCOMPILER_AVX2_VECTORS_H

#include <immintrin.h>

#include "../tile_codes.h"

namespace qc {
namespace {

constexpr int kHalfRows = 8;

// The same vector of one or both halves of a tile.
template <int H>
struct Halves {
  __m256i v[H];

  // Half h lies at p + 32h. Kept in registers: given the chance, the compiler loads a vector again for every shift of it.
  static QC_INLINE Halves load(const uint8_t* p) {
    Halves out;
    for (int h = 0; h < H; ++h) {
      out.v[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * h));
      __asm__("" : "+v"(out.v[h]));
    }
    return out;
  }
  QC_INLINE Halves shifted(int count) const {
    Halves out;
    for (int h = 0; h < H; ++h) out.v[h] = _mm256_srli_epi16(v[h], count);
    return out;
  }
  QC_INLINE Halves masked(int byte) const {
    Halves out;
    for (int h = 0; h < H; ++h) out.v[h] = _mm256_and_si256(v[h], _mm256_set1_epi8(char(byte)));
    return out;
  }
  // Signed bytes to unsigned ones that are biased by 128.
  QC_INLINE Halves flipped() const {
    Halves out;
    for (int h = 0; h < H; ++h) out.v[h] = _mm256_xor_si256(v[h], _mm256_set1_epi8(char(0x80)));
    return out;
  }
  QC_INLINE Halves operator|(const Halves& other) const {
    Halves out;
    for (int h = 0; h < H; ++h) out.v[h] = _mm256_or_si256(v[h], other.v[h]);
    return out;
  }
};

// Calls use(j, v) for j = 0 .. 7 in this order, where v holds the codes of columns 4j .. 4j+3 of the chunk, for the half
// of the tile at p (or both): dword = row, byte = column. Of fewer than 8 bits only the low `Bits` of each byte count,
// the others are whatever lay beside them; 8-bit codes are signed.
template <int Bits, int H, class Use>
QC_INLINE void each_vector(const uint8_t* p, Use&& use) {
  using V = Halves<H>;
  if constexpr (Bits == 8) {
    for (int j = 0; j < 8; ++j) use(j, V::load(p + 64 * j));
  } else if constexpr (Bits == 4) {
    for (int u = 0; u < 4; ++u) {
      const V v = V::load(p + 64 * u);
      use(2 * u, v);
      use(2 * u + 1, v.shifted(4));
    }
  } else if constexpr (Bits == 2) {
    for (int u = 0; u < 2; ++u) {
      const V v = V::load(p + 64 * u);
      use(4 * u, v);
      use(4 * u + 1, v.shifted(2));
      use(4 * u + 2, v.shifted(4));
      use(4 * u + 3, v.shifted(6));
    }
  } else {
    static_assert(Bits == 3);
    const V b0 = V::load(p), b1 = V::load(p + 64), b2 = V::load(p + 128);
    use(0, b0);
    use(1, b0.shifted(3));
    use(2, b1);
    use(3, b1.shifted(3));
    use(4, b2);
    use(5, b2.shifted(3));
    // The fourth index vector from the top two bits of each.
    const V b3 = b0.shifted(2).masked(0x30) | b1.shifted(4).masked(0x0c) | b2.shifted(6).masked(0x03);
    use(6, b3);
    use(7, b3.shifted(3));
  }
}

// The zero points of half h of a (tile, group) as int32.
template <int Bits>
QC_INLINE __m256i load_zeros(const uint8_t* zeros, int h) {
  if constexpr (Bits == 8) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 8 * h)));
  } else {
    // 2 * Bits bytes: half 0 is in the first dword, half 1 fills the upper bits of the last one.
    uint32_t word;
    std::memcpy(&word, h ? zeros + 2 * Bits - 4 : zeros, 4);
    if (h) word >>= 32 - 8 * Bits;
    const __m256i shifts = _mm256_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits, 6 * Bits, 7 * Bits);
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(int(word)), shifts),
                            _mm256_set1_epi32((1 << Bits) - 1));
  }
}

QC_INLINE __m256 load_scales(const uint16_t* scales, int h) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + kHalfRows * h)));
}

// All ones in the first `count` of 8 lanes.
QC_INLINE __m256i first_lanes(int64_t count) {
  const int lanes = count < 8 ? int(count) : 8;
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Adds the bias and writes the rows of half h of the tile that exist, with one NaN for all ISAs.
QC_INLINE void store(const LinearJob& job, int64_t tile, int h, int64_t row, __m256 acc) {
  const int64_t first = tile * kTileRows + kHalfRows * h, left = job.weight.n - first;
  if (row >= job.rows || left <= 0) return;
  const __m256i mask = first_lanes(left);
  if (job.offset) acc = _mm256_add_ps(acc, _mm256_maskload_ps(job.offset + first, mask));
  if (job.bias) acc = _mm256_add_ps(acc, _mm256_maskload_ps(job.bias + first, mask));
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  acc = _mm256_blendv_ps(acc, nan, _mm256_cmp_ps(acc, acc, _CMP_UNORD_Q));
  _mm256_maskstore_ps(job.y + row * job.y_stride + first, mask, acc);
}

}  // namespace
}  // namespace qc
#endif
