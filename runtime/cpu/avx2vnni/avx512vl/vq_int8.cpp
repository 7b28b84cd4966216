#include "../vq_int8.h"

namespace qc {
namespace avx512vl {

void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  each_tile(job, tile_function(job), tile_begin, tile_end, block_begin, block_end);
}

void keep_vq(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out) { keep_function(job)(job, tile, block, out); }

}  // namespace avx512vl
}  // namespace qc
