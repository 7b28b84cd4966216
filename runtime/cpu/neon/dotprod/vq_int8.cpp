// int8 activations and vector-quantized matrices with sdot.
#include "../isa.h"
#include "../vq_int8_kernels.h"

namespace qc {
namespace neon {
namespace dotprod {

void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  all_vq_int8<Lanes, Lanes>(job, tile_begin, tile_end, block_begin, block_end);
}

}  // namespace dotprod
}  // namespace neon
}  // namespace qc
