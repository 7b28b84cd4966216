// int8 activations with sdot.
#include "../int8_kernels.h"
#include "../isa.h"

namespace qc {
namespace {

template <int Bits>
TileFunction of_rows(int64_t rows) {
  switch (rows) {
    case 1: return tile_int8<Lanes, Bits, 1>;
    case 2: return tile_int8<Lanes, Bits, 2>;
    case 4: return tile_int8<Lanes, Bits, 4>;
    default: return tile_int8<Lanes, Bits, 8>;
  }
}

}  // namespace

namespace neon {
namespace dotprod {

const int kInt8BlockRows[] = {1, 2, 4, 8, 0};

void linear_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  const TileFunction run = with_bits(job.weight.bits, [&](auto bits) { return of_rows<decltype(bits)::value>(job.block_rows); });
  each_tile(job, run, tile_begin, tile_end, block_begin, block_end);
}

}  // namespace dotprod
}  // namespace neon
}  // namespace qc
