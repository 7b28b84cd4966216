#include "panel.h"

#include <algorithm>

#include "scratch.h"

namespace qc {

bool run_panels(const PanelFunctions& functions, const LinearJob& job, int64_t tile_begin, int64_t tile_end,
                int64_t block_begin, int64_t block_end) {
  const Matrix& w = job.weight;
  // Nothing is read beyond the codes, as long as steps are whole.
  const bool codes = w.bits == 8 && !w.codebooks && w.k % kPanelStep == 0;
  // A line beyond a power of two: the tiles' bytes of one column fall into different sets of the cache.
  const int64_t tile_bytes = codes ? 0 : ceil_div(w.k, kVqChunk) * kVqChunk * kTileRows + kVectorBytes;
  const int64_t scale_step = job.groups_per_segment || w.codebooks ? kPanelTiles * kTileRows : 0;
  const int64_t scales = scale_step ? job.segments * scale_step : kPanelTiles * kTileRows;
  const ScratchLease lease(size_t(kPanelTiles * tile_bytes + scales * 4 * (w.zeros ? 2 : 1)));
  if (!lease.data()) return false;
  float* const own_scales = reinterpret_cast<float*>(lease.data() + kPanelTiles * tile_bytes);
  int32_t* const own_zeros = w.zeros ? reinterpret_cast<int32_t*>(own_scales + scales) : nullptr;
  for (int64_t tile = tile_begin; tile < tile_end; tile += kPanelTiles) {
    const int64_t tiles = std::min(kPanelTiles, tile_end - tile);
    for (int64_t t = 0; t < tiles; ++t) {
      const PanelTile out{lease.data() + t * tile_bytes, own_scales + t * kTileRows,
                          own_zeros ? own_zeros + t * kTileRows : nullptr, scale_step};
      if (codes) {
        functions.keep_scales(job, tile + t, out);
      } else {
        (w.codebooks ? functions.keep_vq : functions.keep)(job, tile + t, block_begin, out);
      }
    }
    const Panel panel{codes ? w.codes + tile * w.tile_bytes : lease.data(), codes ? w.tile_bytes : tile_bytes, own_scales,
                      own_zeros, scale_step, codes};
    functions.multiply(job, panel, tile, tiles, codes ? block_begin : block_begin + 1, block_end);
  }
  return true;
}

}  // namespace qc
