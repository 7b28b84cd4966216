// int8 activations with smmla, from four rows on: for fewer, zipping costs what it saves.
#include "../int8_kernels.h"
#include "../isa.h"

namespace qc {
namespace neon {
namespace i8mm {

const int kInt8BlockRows[] = {1, 2, 4, 8, 0};

void linear_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  all_int8<Lanes, Matrices>(job, tile_begin, tile_end, block_begin, block_end);
}

}  // namespace i8mm
}  // namespace neon
}  // namespace qc
