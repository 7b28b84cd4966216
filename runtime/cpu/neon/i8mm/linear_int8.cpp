// int8 activations with smmla, from four rows on: for fewer, zipping costs what it saves.
#include "../int8_kernels.h"
#include "../isa.h"

namespace qc {
namespace neon {
namespace i8mm {

void linear_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  if (job.block_rows < 4) return dotprod::linear_int8(job, tile_begin, tile_end, block_begin, block_end);
  const TileFunction run = with_bits(job.weight.bits, [&](auto bits) -> TileFunction {
    constexpr int kBits = decltype(bits)::value;
    return job.block_rows == 4 ? tile_int8<Matrices, kBits, 4> : tile_int8<Matrices, kBits, 8>;
  });
  each_tile(job, run, tile_begin, tile_end, block_begin, block_end);
}

}  // namespace i8mm
}  // namespace neon
}  // namespace qc
