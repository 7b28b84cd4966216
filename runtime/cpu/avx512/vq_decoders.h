// Codebooks without VBMI: vpshufb looks indices up in 16 entries, which every 16 bytes of a register repeat. More entries take
// several registers: a mask of the lanes whose upper index bits name it lets each overwrite what was found before.
#ifndef QCOMPILER_AVX512_VQ_DECODERS_H
#define QCOMPILER_AVX512_VQ_DECODERS_H

#include "vq_kernels.h"

namespace qc {
namespace {

QC_INLINE __m512i masked(__m512i v, int byte) { return _mm512_and_si512(v, _mm512_set1_epi8(char(byte))); }

struct Pairs16 {
  static constexpr int kBits = 2;
  PairTables16 table;

  QC_INLINE Pairs16(const int8_t* entries, int dim) : table(entries, dim) {}

  template <class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    for (int u = 0; u < 2; ++u) {
      const __m512i v = load_codes(p + 64 * u);
      const __m512i low = masked(v, 0x0f), high = masked(_mm512_srli_epi16(v, 4), 0x0f);
      use(4 * u, _mm512_shuffle_epi8(table.x, low));
      use(4 * u + 1, _mm512_shuffle_epi8(table.y, low));
      use(4 * u + 2, _mm512_shuffle_epi8(table.x, high));
      use(4 * u + 3, _mm512_shuffle_epi8(table.y, high));
    }
  }
};

// 1D: the codes are those of `Bits`-bit levels.
template <int Bits>
struct Single {
  static constexpr int kBits = Bits;
  __m512i table;

  QC_INLINE Single(const int8_t* entries, int) : table(biased(Bits == 3 ? repeat8(entries) : repeat16(entries))) {}

  template <class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    each_vector<Bits>(p, [&](int j, __m512i v) QC_LAMBDA_INLINE { use(j, _mm512_shuffle_epi8(table, masked(v, 0x0f))); });
  }
};

// Dim tables of Centroids entries, looked up by the low bits of v.
template <int Dim, int Centroids>
struct Tables {
  static constexpr int kParts = Centroids / 16;
  __m512i part[Dim][kParts];

  QC_INLINE explicit Tables(const int8_t* entries) {
    for (int d = 0; d < Dim; ++d) {
      for (int q = 0; q < kParts; ++q) part[d][q] = biased(repeat16(entries + Centroids * d + 16 * q));
    }
  }

  QC_INLINE void find(__m512i v, __m512i (&found)[Dim]) const {
    const __m512i low = masked(v, 0x0f), upper = masked(v, (kParts - 1) * 16);
    for (int d = 0; d < Dim; ++d) found[d] = _mm512_shuffle_epi8(part[d][0], low);
    for (int q = 1; q < kParts; ++q) {
      const __mmask64 here = _mm512_cmpeq_epi8_mask(upper, _mm512_set1_epi8(char(16 * q)));
      for (int d = 0; d < Dim; ++d) found[d] = _mm512_mask_shuffle_epi8(found[d], here, part[d][q], low);
    }
  }
};

template <int Centroids>
struct Pairs {
  static constexpr int kBits = Centroids == 32 ? 5 : 3;
  Tables<2, Centroids> tables;

  QC_INLINE Pairs(const int8_t* entries, int) : tables(entries) {}

  template <class Use>
  QC_INLINE void use_all(const __m512i (&index)[4], Use&& use) const {
    for (int m = 0; m < 4; ++m) {
      __m512i found[2];
      tables.find(index[m], found);
      use(2 * m, found[0]);
      use(2 * m + 1, found[1]);
    }
  }

  template <class Use>
  QC_INLINE void each(const uint8_t* p, bool half, Use&& use) const {
    if constexpr (Centroids == 32) {
      use_all(FiveBits(p, half).v, use);
    } else {
      use_all(SixBits(p).v, use);
    }
  }
};

template <int Dim>
struct Vectors256 {
  static constexpr int kBits = 8 / Dim;
  Tables<Dim, 256> tables;

  QC_INLINE Vectors256(const int8_t* entries, int) : tables(entries) {}

  template <class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    for (int u = 0; u < 8 / Dim; ++u) {
      __m512i found[Dim];
      tables.find(load_codes(p + 64 * u), found);
      for (int d = 0; d < Dim; ++d) use(Dim * u + d, found[d]);
    }
  }
};

struct Shuffled {
  using D1x4 = Pairs16;
  using D1x8 = Single<3>;
  using D1x16 = Single<4>;
  using D2x16 = Pairs16;
  using D2x32 = Pairs<32>;
  using D2x64 = Pairs<64>;
  using D2x256 = Vectors256<2>;
  using D4x256 = Vectors256<4>;
};

}  // namespace
}  // namespace qc
#endif
