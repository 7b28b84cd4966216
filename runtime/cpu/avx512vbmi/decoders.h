// Codebooks in registers: vpermb looks 64 indices up in 64 entries and vpermi2b in 128, both by the low bits of each byte, so
// that neither masks nor exact shifts are needed. A smaller table is repeated to fill a register.
#ifndef QCOMPILER_AVX512VBMI_DECODERS_H
#define QCOMPILER_AVX512VBMI_DECODERS_H

#include "../avx512/vq_kernels.h"

namespace qc {
namespace {

struct Pairs16 {
  static constexpr int kBits = 2;
  PairTables16 table;

  QC_INLINE Pairs16(const int8_t* entries, int dim) : table(entries, dim) {}

  template <class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    for (int u = 0; u < 2; ++u) {
      const __m512i low = load_codes(p + 64 * u), high = _mm512_srli_epi16(low, 4);
      use(4 * u, _mm512_permutexvar_epi8(low, table.x));
      use(4 * u + 1, _mm512_permutexvar_epi8(low, table.y));
      use(4 * u + 2, _mm512_permutexvar_epi8(high, table.x));
      use(4 * u + 3, _mm512_permutexvar_epi8(high, table.y));
    }
  }
};

struct Pairs32 {
  static constexpr int kBits = 5;
  __m512i x, y;

  QC_INLINE Pairs32(const int8_t* entries, int)
      : x(biased(_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries))))),
        y(biased(_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries + 32))))) {}

  template <class Use>
  QC_INLINE void each(const uint8_t* p, bool half, Use&& use) const {
    const FiveBits index(p, half);
    for (int m = 0; m < 4; ++m) {
      use(2 * m, _mm512_permutexvar_epi8(index.v[m], x));
      use(2 * m + 1, _mm512_permutexvar_epi8(index.v[m], y));
    }
  }
};

struct Pairs64 {
  static constexpr int kBits = 3;
  __m512i x, y;

  // One column's 8 entries make those of a pair of 3-bit indices.
  QC_INLINE Pairs64(const int8_t* entries, int dim) {
    if (dim == 2) {
      x = biased(_mm512_loadu_si512(entries));
      y = biased(_mm512_loadu_si512(entries + 64));
    } else {
      const __m512i row = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
      const __m512i lane = _mm512_setr_epi64(0, 0, 0x0202020202020202, 0x0202020202020202, 0x0404040404040404,
                                             0x0404040404040404, 0x0606060606060606, 0x0606060606060606);
      x = biased(repeat8(entries));
      y = _mm512_shuffle_epi8(x, _mm512_add_epi8(row, lane));
    }
  }

  template <class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    const SixBits index(p);
    for (int m = 0; m < 4; ++m) {
      use(2 * m, _mm512_permutexvar_epi8(index.v[m], x));
      use(2 * m + 1, _mm512_permutexvar_epi8(index.v[m], y));
    }
  }
};

struct Single16 {
  static constexpr int kBits = 4;
  __m512i table;

  QC_INLINE Single16(const int8_t* entries, int) : table(biased(repeat16(entries))) {}

  template <class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    for (int u = 0; u < 4; ++u) {
      const __m512i v = load_codes(p + 64 * u);
      use(2 * u, _mm512_permutexvar_epi8(v, table));
      use(2 * u + 1, _mm512_permutexvar_epi8(_mm512_srli_epi16(v, 4), table));
    }
  }
};

// 256 entries in four registers; bit 7 of an index chooses between the two halves. The result takes the place of the index:
// what the first half does not concern is still there for the second.
template <int Dim>
struct Vectors256 {
  static constexpr int kBits = 8 / Dim;
  __m512i table[Dim][4];

  QC_INLINE Vectors256(const int8_t* entries, int) {
    for (int d = 0; d < Dim; ++d) {
      for (int q = 0; q < 4; ++q) table[d][q] = biased(_mm512_loadu_si512(entries + 256 * d + 64 * q));
    }
  }

  template <class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    for (int u = 0; u < 8 / Dim; ++u) {
      const __m512i v = load_codes(p + 64 * u);
      const __mmask64 upper = _mm512_movepi8_mask(v), lower = _knot_mask64(upper);
      for (int d = 0; d < Dim; ++d) {
        const __m512i half = _mm512_mask2_permutex2var_epi8(table[d][2], v, upper, table[d][3]);
        use(Dim * u + d, _mm512_mask2_permutex2var_epi8(table[d][0], half, lower, table[d][1]));
      }
    }
  }
};

struct Permuted {
  using D1x4 = Pairs16;
  using D1x8 = Pairs64;
  using D1x16 = Single16;
  using D2x16 = Pairs16;
  using D2x32 = Pairs32;
  using D2x64 = Pairs64;
  using D2x256 = Vectors256<2>;
  using D4x256 = Vectors256<4>;
};

}  // namespace
}  // namespace qc
#endif
