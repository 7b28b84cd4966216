// The linear op on vector-quantized matrices with AVX2. vpshufb looks indices up in 16 entries, which both halves of a register
// repeat, and gives 0 where bit 7 of the index is set. More entries take several look-ups whose results are XORed: with
// T1, T2, ... the parts of 16 entries, T0[i] ^ (T0 ^ T1)[i - 16] ^ (T1 ^ T2)[i - 32] ^ ... is the entry, as all terms whose index
// is below 0 vanish. A decoder keeps the tables of one codebook; see avx512/vq_kernels.h. Its last argument tells how
// entries come out: as they are, signed, or biased by 128.
// Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_AVX2_VQ_KERNELS_H
#define QCOMPILER_AVX2_VQ_KERNELS_H

#include "../vq_tiles.h"
#include "isa.h"
#include "vectors.h"

namespace qc {
namespace {

struct TileBooks : BooksOfTile {
  using BooksOfTile::BooksOfTile;
  QC_INLINE __m256 scale() const { return _mm256_cvtph_ps(_mm_set1_epi16(short(*scales))); }
};

// XORed to entries.
enum Flip { kSigned = 0, kBiased = 0x80 };

QC_INLINE __m256i flipped(__m256i entries, Flip flip) {
  return flip ? _mm256_xor_si256(entries, _mm256_set1_epi8(char(flip))) : entries;
}
QC_INLINE __m256i repeat16(const int8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <int H>
QC_INLINE Halves<H> look_up(__m256i table, const Halves<H>& index) {
  Halves<H> out;
  for (int h = 0; h < H; ++h) out.v[h] = _mm256_shuffle_epi8(table, index.v[h]);
  return out;
}

// 4-bit indices of pairs; one column's 4 entries make those of a pair of 2-bit indices.
struct Pairs16 {
  static constexpr int kBits = 2;
  __m256i x, y;

  QC_INLINE Pairs16(const int8_t* entries, int dim, Flip flip = kSigned) {
    if (dim == 2) {
      x = flipped(repeat16(entries), flip);
      y = flipped(repeat16(entries + 16), flip);
    } else {
      int32_t word;
      std::memcpy(&word, entries, 4);
      x = flipped(_mm256_set1_epi32(word), flip);
      y = _mm256_shuffle_epi8(
          x, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)));
    }
  }

  template <int H, class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    for (int u = 0; u < 2; ++u) {
      const Halves<H> v = Halves<H>::load(p + 64 * u);
      const Halves<H> low = v.masked(0x0f), high = v.shifted(4).masked(0x0f);
      use(4 * u, look_up(x, low));
      use(4 * u + 1, look_up(y, low));
      use(4 * u + 2, look_up(x, high));
      use(4 * u + 3, look_up(y, high));
    }
  }
};

// 1D: the codes are those of `Bits`-bit levels.
template <int Bits>
struct Single {
  static constexpr int kBits = Bits;
  __m256i table;

  QC_INLINE Single(const int8_t* entries, int, Flip flip = kSigned) {
    if (Bits == 4) {
      table = flipped(repeat16(entries), flip);
    } else {
      int64_t word;
      std::memcpy(&word, entries, 8);
      table = flipped(_mm256_set1_epi64x(word), flip);
    }
  }

  template <int H, class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    each_vector<Bits, H>(
        p, [&](int j, const Halves<H>& v) QC_LAMBDA_INLINE { use(j, look_up(table, v.masked(0x0f))); });
  }
};

// The tables of Dim columns, Centroids entries each, of which every 128 (or all) are one chain of XORs.
template <int Dim, int Centroids>
struct Tables {
  static constexpr int kParts = Centroids / 16, kChain = kParts < 8 ? kParts : 8;
  __m128i part[Dim][kParts];

  QC_INLINE Tables(const int8_t* entries, Flip flip) {
    for (int d = 0; d < Dim; ++d) {
      for (int q = 0; q < kParts; ++q) {
        const __m128i* own = reinterpret_cast<const __m128i*>(entries + Centroids * d + 16 * q);
        part[d][q] = _mm_loadu_si128(own);
        // The first part is in every XOR once.
        part[d][q] = _mm_xor_si128(part[d][q], q % kChain ? _mm_loadu_si128(own - 1) : _mm_set1_epi8(char(flip)));
      }
    }
  }

  // `index`: bits that do not count are masked away, but for bit 7 of 256, which chooses the chain.
  template <int H>
  QC_INLINE void find(const Halves<H>& index, Halves<H> (&found)[Dim]) const {
    for (int h = 0; h < H; ++h) {
      __m256i chain[Dim][kParts / kChain];
      __m256i at = kParts == 16 ? _mm256_and_si256(index.v[h], _mm256_set1_epi8(0x7f)) : index.v[h];
      for (int q = 0; q < kChain; ++q) {
        for (int d = 0; d < Dim; ++d) {
          for (int c = 0; c < kParts / kChain; ++c) {
            const __m256i term = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(part[d][kChain * c + q]), at);
            chain[d][c] = q ? _mm256_xor_si256(chain[d][c], term) : term;
          }
        }
        at = _mm256_sub_epi8(at, _mm256_set1_epi8(16));
      }
      for (int d = 0; d < Dim; ++d) {
        found[d].v[h] = chain[d][0];
        if (kParts == 16) found[d].v[h] = _mm256_blendv_epi8(chain[d][0], chain[d][kParts / kChain - 1], index.v[h]);
      }
    }
  }
};

template <int Centroids>
struct Pairs {
  static constexpr int kBits = Centroids == 32 ? 5 : 3;
  Tables<2, Centroids> tables;

  QC_INLINE Pairs(const int8_t* entries, int, Flip flip = kSigned) : tables(entries, flip) {}

  template <int H, class Use>
  QC_INLINE void pair(int m, const Halves<H>& index, Use&& use) const {
    Halves<H> found[2];
    tables.find(index, found);
    use(2 * m, found[0]);
    use(2 * m + 1, found[1]);
  }

  template <int H, class Use>
  QC_INLINE void each(const uint8_t* p, bool half, Use&& use) const {
    using V = Halves<H>;
    const V v0 = V::load(p), v1 = V::load(p + 64), v2 = V::load(p + 128);
    if constexpr (Centroids == 64) {
      pair(0, v0.masked(0x3f), use);
      pair(1, v1.masked(0x3f), use);
      pair(2, v2.masked(0x3f), use);
      pair(3, v0.shifted(2).masked(0x30) | v1.shifted(4).masked(0x0c) | v2.shifted(6).masked(0x03), use);
    } else if (!half) {
      pair(0, v0.masked(0x1f), use);
      pair(1, v1.masked(0x1f), use);
      pair(2, v2.masked(0x1f), use);
      pair(3, V::load(p + 192).masked(0x1f), use);
    } else {
      const V v3 = V::load(p + 192), v4 = V::load(p + 256);
      pair(0, v4.masked(0x1f), use);
      pair(1, v0.shifted(5).masked(0x07) | v3.shifted(2).masked(0x18), use);
      pair(2, v1.shifted(5).masked(0x07) | v4.shifted(2).masked(0x18), use);
      pair(3, v2.shifted(5).masked(0x07) | v3.shifted(4).masked(0x08) | v4.shifted(3).masked(0x10), use);
    }
  }
};

template <int Dim>
struct Vectors256 {
  static constexpr int kBits = 8 / Dim;
  Tables<Dim, 256> tables;

  QC_INLINE Vectors256(const int8_t* entries, int, Flip flip = kSigned) : tables(entries, flip) {}

  template <int H, class Use>
  QC_INLINE void each(const uint8_t* p, bool, Use&& use) const {
    for (int u = 0; u < 8 / Dim; ++u) {
      Halves<H> found[Dim];
      tables.find(Halves<H>::load(p + 64 * u), found);
      for (int d = 0; d < Dim; ++d) use(Dim * u + d, found[d]);
    }
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
