// int8 activations and vector-quantized matrices with smmla, from four rows on (see linear_int8.cpp).
#include "../isa.h"
#include "../vq_int8_kernels.h"

namespace qc {
namespace neon {
namespace i8mm {

void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  all_vq_int8<Lanes, Matrices>(job, tile_begin, tile_end, block_begin, block_end);
}

}  // namespace i8mm
}  // namespace neon
}  // namespace qc
