// What a kernel of vector-quantized matrices walks, whatever decodes the indices. Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_VQ_TILES_H
#define QCOMPILER_VQ_TILES_H

#include "tile_codes.h"
#include "vq_layout.h"

namespace qc {
namespace {

// The codes of one tile, chunk by chunk of 32 columns. Bits: of a column (see vq_layout.h), 5 for the 5-bit indices of
// pairs, whose units are two chunks each.
template <int Bits>
struct VqCodes {
  static constexpr bool kWhole = Bits == 5 || Bits == 3;  // units of a chunk or more: none is there in part
  const uint8_t* codes;
  int64_t whole;
  alignas(64) uint8_t tail[kWhole ? 64 : chunk_bytes(Bits)];

  QC_INLINE VqCodes(const Matrix& w, int64_t tile) : codes(w.codes + tile * w.tile_bytes), whole(w.k / kChunk) {
    if (!kWhole && w.k % kChunk) {
      const int64_t before = whole * chunk_bytes(kWhole ? 4 : Bits);
      std::memset(tail, 0, sizeof tail);
      std::memcpy(tail, codes + before, size_t(w.tile_bytes - before));
    }
  }

  QC_INLINE const uint8_t* chunk(int64_t index) const {
    if (Bits == 5) return codes + index / 2 * vq_unit_bytes(2, 32);
    if (kWhole) return codes + index * chunk_bytes(3);
    return same_loop(index < whole ? codes + index * chunk_bytes(kWhole ? 4 : Bits) : tail);
  }
};

// The codebooks that the columns of one tile have, from left to right.
struct BooksOfTile {
  const Codebooks& books;
  const int8_t* entries;
  const uint16_t* scales;

  QC_INLINE BooksOfTile(const Codebooks& all, int64_t tile) : books(all) {
    const int64_t first = tile * kTileRows / all.block_rows * all.across;
    entries = all.entries + first * all.dim * all.centroids;
    scales = all.scales + first;
  }
  QC_INLINE void next() { entries += books.dim * books.centroids, ++scales; }
};

template <class Decoder>
struct Tag {
  using type = Decoder;
};

// Calls choose with the tag of the decoder of a matrix; `Decoders` has one for each of the eight codebooks.
template <class Decoders, class Function = TileFunction, class Choose>
Function with_decoder(const Codebooks& books, Choose&& choose) {
  switch (books.dim * 1000 + books.centroids) {
    case 1004: return choose(Tag<typename Decoders::D1x4>());
    case 1008: return choose(Tag<typename Decoders::D1x8>());
    case 1016: return choose(Tag<typename Decoders::D1x16>());
    case 2016: return choose(Tag<typename Decoders::D2x16>());
    case 2032: return choose(Tag<typename Decoders::D2x32>());
    case 2064: return choose(Tag<typename Decoders::D2x64>());
    case 2256: return choose(Tag<typename Decoders::D2x256>());
    default: return choose(Tag<typename Decoders::D4x256>());
  }
}

}  // namespace
}  // namespace qc
#endif
