#include "decoders.h"
#include "isa.h"

namespace qc {
namespace avx512vbmi {

void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  all_int8<Permuted>(job, tile_begin, tile_end, block_begin, block_end);
}

void keep_vq(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out) {
  keep_any<Permuted>(job, tile, block, out);
}

}  // namespace avx512vbmi
}  // namespace qc
