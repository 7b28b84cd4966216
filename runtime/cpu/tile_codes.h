// How kernels walk a tile: its codes, chunk by chunk of 32 columns. Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_TILE_CODES_H
#define QCOMPILER_TILE_CODES_H

#include "inline.h"
#include "kernels.h"
#include "layout.h"

namespace qc {
namespace {

// A kernel of one tile and block of rows.
using TileFunction = void (*)(const LinearJob& job, int64_t tile, int64_t block);

// Hides where p points, on ARM: the compiler would rather make a second loop for a padded copy, decoded in advance.
QC_INLINE const uint8_t* same_loop(const uint8_t* p) {
#ifdef __aarch64__
  __asm__("" : "+r"(p));
#endif
  return p;
}

// The last chunk may hold fewer units than 32 columns; it is then read from a padded copy.
template <int Bits>
struct TileCodes {
  const uint8_t* codes;
  int64_t whole;
  alignas(64) uint8_t tail[chunk_bytes(Bits)];

  QC_INLINE TileCodes(const Matrix& w, int64_t tile) : codes(w.codes + tile * w.tile_bytes), whole(w.k / kChunk) {
    if (w.k % kChunk) {
      std::memset(tail, 0, sizeof tail);
      std::memcpy(tail, codes + whole * chunk_bytes(Bits), size_t(w.tile_bytes - whole * chunk_bytes(Bits)));
    }
  }

  QC_INLINE const uint8_t* chunk(int64_t index) const {
    return same_loop(index < whole ? codes + index * chunk_bytes(Bits) : tail);
  }
};

}  // namespace
}  // namespace qc
#endif
