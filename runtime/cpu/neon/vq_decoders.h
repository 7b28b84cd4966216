// Entries of codebooks with NEON. tbl looks indices up in 16, 32 or 64 entries and gives 0 beyond, tbx leaves there what was
// found before: 256 entries are four look-ups. A decoder keeps the tables of one codebook and
//   Decoder(entries, dim)   loads them: int8 [dim][centroids]
//   kBits                   of a column, for VqCodes
//   each<Q>(p, half, use)   calls use(Index<j>(), v) for j = 0 .. 7 in this order, where v holds the entries, signed, of columns
//                           4j .. 4j+3 of the chunk of 32 columns, for the quads of the tile from p on: dword = row, byte =
//                           column
// Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_NEON_VQ_DECODERS_H
#define QCOMPILER_NEON_VQ_DECODERS_H

#include "../vq_tiles.h"
#include "vectors.h"

namespace qc {
namespace {

QC_INLINE const uint8_t* bytes_of(const int8_t* entries) { return reinterpret_cast<const uint8_t*>(entries); }
QC_INLINE uint8x16_t find(const uint8x16_t& table, uint8x16_t index) { return vqtbl1q_u8(table, index); }
QC_INLINE uint8x16_t find(const uint8x16x2_t& table, uint8x16_t index) { return vqtbl2q_u8(table, index); }
QC_INLINE uint8x16_t find(const uint8x16x4_t& table, uint8x16_t index) { return vqtbl4q_u8(table, index); }

template <class Table, int Q>
QC_INLINE Quads<Q> look_up(const Table& table, const Quads<Q>& index) {
  Quads<Q> out;
  for (int q = 0; q < Q; ++q) out.v[q] = find(table, index.v[q]);
  return out;
}

// 4-bit indices of pairs; one column's 4 entries make those of a pair of 2-bit indices.
struct Pairs16 {
  static constexpr int kBits = 2;
  uint8x16_t x, y;

  QC_INLINE Pairs16(const int8_t* entries, int dim) {
    if (dim == 2) {
      x = vld1q_u8(bytes_of(entries));
      y = vld1q_u8(bytes_of(entries) + 16);
    } else {
      uint32_t word;
      std::memcpy(&word, entries, 4);
      const uint8x16_t fours = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
      x = vreinterpretq_u8_u32(vdupq_n_u32(word));
      y = vqtbl1q_u8(x, fours);
    }
  }

  template <int Q, class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    unrolled<2>([&](auto u) QC_LAMBDA_INLINE {
      constexpr int first = 4 * decltype(u)::value;
      const Quads<Q> v = Quads<Q>::load(p + 16 * first);
      const Quads<Q> low = v.masked(0x0f), high = v.template shifted<4>();
      use(Index<first>(), look_up(x, low));
      use(Index<first + 1>(), look_up(y, low));
      use(Index<first + 2>(), look_up(x, high));
      use(Index<first + 3>(), look_up(y, high));
    });
  }
};

// 1D: the codes are those of `Bits`-bit levels.
template <int Bits>
struct Single {
  static constexpr int kBits = Bits;
  uint8x16_t table;

  QC_INLINE Single(const int8_t* entries, int) {
    if (Bits == 4) {
      table = vld1q_u8(bytes_of(entries));
    } else {
      const uint8x8_t half = vld1_u8(bytes_of(entries));
      table = vcombine_u8(half, half);
    }
  }

  template <int Q, class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    each_vector<Bits, true, Q>(p, [&](auto j, const Quads<Q>& v) QC_LAMBDA_INLINE { use(j, look_up(table, v)); });
  }
};

template <int Centroids>
struct Pairs {
  static constexpr int kBits = Centroids == 32 ? 5 : 3;
  using Table = std::conditional_t<Centroids == 32, uint8x16x2_t, uint8x16x4_t>;
  Table x, y;

  QC_INLINE Pairs(const int8_t* entries, int) {
    const uint8_t* p = bytes_of(entries);
    if constexpr (Centroids == 32) {
      x = vld1q_u8_x2(p), y = vld1q_u8_x2(p + Centroids);
    } else {
      x = vld1q_u8_x4(p), y = vld1q_u8_x4(p + Centroids);
    }
  }

  template <int M, int Q, class Use>
  QC_INLINE void pair(const Quads<Q>& index, Use&& use) const {
    use(Index<2 * M>(), look_up(x, index));
    use(Index<2 * M + 1>(), look_up(y, index));
  }

  template <int Q, class Use>
  QC_INLINE void each(const uint8_t* p, bool half, Use&& use) const {
    using V = Quads<Q>;
    const V v0 = V::load(p), v1 = V::load(p + 64), v2 = V::load(p + 128);
    if constexpr (Centroids == 64) {
      pair<0>(v0.masked(0x3f), use);
      pair<1>(v1.masked(0x3f), use);
      pair<2>(v2.masked(0x3f), use);
      pair<3>(fourth_of_six_bits(v0, v1, v2), use);
    } else if (!half) {
      pair<0>(v0.masked(0x1f), use);
      pair<1>(v1.masked(0x1f), use);
      pair<2>(v2.masked(0x1f), use);
      pair<3>(V::load(p + 192).masked(0x1f), use);
    } else {
      const V v3 = V::load(p + 192), v4 = V::load(p + 256);
      pair<0>(v4.masked(0x1f), use);
      // Top bits of three vectors, gathered from the top and brought down: two of v3 (or v4, or one of each) and three.
      pair<1>(v3.template shifted_up<1>().template followed_by<2>(v0).template shifted<3>(), use);
      pair<2>(v4.template shifted_up<1>().template followed_by<2>(v1).template shifted<3>(), use);
      pair<3>(v4.template followed_by<1>(v3).template followed_by<2>(v2).template shifted<3>(), use);
    }
  }
};

// 256 entries of a column are four tables of four registers: one after another meets the same eight vectors of indices.
template <int Dim>
struct Vectors256 {
  static constexpr int kBits = 8 / Dim;
  const uint8_t* entries;

  QC_INLINE Vectors256(const int8_t* all, int) : entries(bytes_of(all)) {}

  template <int Q, class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    constexpr int kVectors = 8 / Dim * Q, kTogether = kVectors < 8 ? kVectors : 8;
    Quads<Q> found[8];
    // Not unrolled: nothing is gained by it, and there are no registers for two.
#pragma GCC unroll 1
    for (int part = 0; part < Dim * kVectors / kTogether; ++part) {
      const int d = part % Dim, first = part / Dim * (kTogether / Q);
      uint8x16_t index[kTogether], entry[kTogether];
      for (int v = 0; v < kTogether; ++v) index[v] = vld1q_u8(p + 64 * (first + v / Q) + 16 * (v % Q));
      unrolled<4>([&](auto t) QC_LAMBDA_INLINE {
        constexpr int T = decltype(t)::value;
        const uint8x16x4_t table = vld1q_u8_x4(entries + 256 * d + 64 * T);
        for (int v = 0; v < kTogether; ++v) {
          if constexpr (T == 0) {
            entry[v] = vqtbl4q_u8(table, index[v]);
          } else {
            index[v] = vsubq_u8(index[v], vdupq_n_u8(64));
            entry[v] = vqtbx4q_u8(entry[v], table, index[v]);
          }
        }
      });
      for (int v = 0; v < kTogether; ++v) found[Dim * (first + v / Q) + d].v[v % Q] = entry[v];
    }
    unrolled<8>([&](auto j) QC_LAMBDA_INLINE { use(j, found[decltype(j)::value]); });
  }
};

struct Decoders {
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
