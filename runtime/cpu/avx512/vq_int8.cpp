#include "isa.h"
#include "vq_decoders.h"

namespace qc {
namespace avx512 {

void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  all_int8<Shuffled>(job, tile_begin, tile_end, block_begin, block_end);
}

void keep_vq(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out) {
  keep_any<Shuffled>(job, tile, block, out);
}

}  // namespace avx512
}  // namespace qc
