// int8 activations and vector-quantized matrices with sdot.
#include "../isa.h"
#include "../vq_int8_kernels.h"

namespace qc {
namespace {

template <class Decoder>
TileFunction of_rows(int64_t rows) {
  switch (rows) {
    case 1: return tile_vq_int8<Lanes, Decoder, 1>;
    case 2: return tile_vq_int8<Lanes, Decoder, 2>;
    case 4: return tile_vq_int8<Lanes, Decoder, 4>;
    default: return tile_vq_int8<Lanes, Decoder, 8>;
  }
}

}  // namespace

namespace neon {
namespace dotprod {

void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  const TileFunction run = with_decoder<Decoders>(*job.weight.codebooks, [&](auto tag) {
    return of_rows<typename decltype(tag)::type>(job.block_rows);
  });
  each_tile(job, run, tile_begin, tile_end, block_begin, block_end);
}

}  // namespace dotprod
}  // namespace neon
}  // namespace qc
