// int8 activations with sdot.
#include "../int8_kernels.h"
#include "../isa.h"

namespace qc {
namespace neon {
namespace dotprod {

const int kInt8BlockRows[] = {1, 2, 4, 8, 0};

void linear_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  all_int8<Lanes, Lanes>(job, tile_begin, tile_end, block_begin, block_end);
}

}  // namespace dotprod
}  // namespace neon
}  // namespace qc
