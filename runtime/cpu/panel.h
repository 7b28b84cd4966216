// Many rows: a few tiles are decoded once to bytes, a panel, and then meet all rows of a piece. One loop over the rows serves
// every format; only decoding differs, which is done along with the first rows: loads, decoding and products then overlap.
#ifndef QCOMPILER_PANEL_H
#define QCOMPILER_PANEL_H

#include "kernels.h"
#include "layout.h"

namespace qc {

// Tiles side by side that are decoded at once.
constexpr int64_t kPanelTiles = 2;

// Columns that the loop over rows takes at once.
constexpr int64_t kPanelStep = 16;

struct Panel {
  const uint8_t* bytes;  // of a tile [k / 4][16 rows][4 columns], k rounded up to a whole chunk: what the dot product takes
  int64_t tile_stride;   // from one tile's bytes to the next one's
  const float* scales;   // [segments or 1][kPanelTiles][16]: S, or S * c
  const int32_t* zeros;  // null: symmetric; otherwise likewise, biased as the bytes are
  int64_t scale_step;    // from a segment's scales, and zero points, to the next one's: kPanelTiles * 16 or 0
  bool codes;            // the bytes are 8-bit codes as they are stored
};

// Where one tile of a panel goes.
struct PanelTile {
  uint8_t* bytes;
  float* scales;
  int32_t* zeros;
  int64_t scale_step;
};

struct PanelFunctions {
  // Rows a block may have, ascending, ended by 0; and from how many rows on a panel pays.
  const int* block_rows;
  int64_t least_rows;
  // Computes the outputs of one tile for one block, and keeps what it decodes.
  void (*keep)(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out);
  void (*keep_vq)(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out);
  // Scales and zero points of 8-bit codes.
  void (*keep_scales)(const LinearJob& job, int64_t tile, const PanelTile& out);
  // Computes the outputs of `tiles` tiles, at most kPanelTiles, from `tile` on, for row blocks [block_begin, block_end).
  void (*multiply)(const LinearJob& job, const Panel& panel, int64_t tile, int64_t tiles, int64_t block_begin,
                   int64_t block_end);
};

// A LinearFunction's work. False when memory ran out.
bool run_panels(const PanelFunctions& functions, const LinearJob& job, int64_t tile_begin, int64_t tile_end,
                int64_t block_begin, int64_t block_end);

}  // namespace qc
#endif
