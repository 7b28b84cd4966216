// int8 activations and vector-quantized matrices with smmla, from four rows on (see linear_int8.cpp).
#include "../isa.h"
#include "../vq_int8_kernels.h"

namespace qc {
namespace neon {
namespace i8mm {

void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  if (job.block_rows < 4) return dotprod::vq_int8(job, tile_begin, tile_end, block_begin, block_end);
  const TileFunction run = with_decoder<Decoders>(*job.weight.codebooks, [&](auto tag) -> TileFunction {
    using Decoder = typename decltype(tag)::type;
    return job.block_rows == 4 ? tile_vq_int8<Matrices, Decoder, 4> : tile_vq_int8<Matrices, Decoder, 8>;
  });
  each_tile(job, run, tile_begin, tile_end, block_begin, block_end);
}

}  // namespace i8mm
}  // namespace neon
}  // namespace qc
