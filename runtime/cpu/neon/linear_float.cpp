// Float activations: a code becomes a float without conversion. In the mantissa of a power of two whose unit in the last place
// is the code's own bit position, it reads 2^23 + q (bits 0 .. 7 of a dword) or 2^15 + q (bits 8 .. 15); subtracting 2^23 + Z
// or 2^15 + Z leaves q - Z, exactly.
#include "float_parts.h"
#include "isa.h"

namespace qc {
namespace {

template <int Bits, int R, int Q>
QC_INLINE void float_quads(const LinearJob& job, const TileCodes<Bits>& codes, int64_t tile, int64_t block, int first) {
  const Matrix& w = job.weight;
  const float* x = reinterpret_cast<const float*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  const uint16_t* scales = w.scales + tile * w.groups * kTileRows;
  const uint8_t* zeros = w.zeros ? w.zeros + tile * w.groups * tile_zero_bytes(Bits) : nullptr;
  const int64_t chunks = ceil_div(w.k, kChunk), per_group = ceil_div(job.segment, kChunk);
  constexpr float kBias = float(code_bias(Bits)), kSymmetric = float(symmetric_zero(Bits)) + kBias;

  float32x4_t acc[Q][R], zero[Q];
  for (int q = 0; q < Q; ++q) {
    zero[q] = vdupq_n_f32(kSymmetric);
    for (int m = 0; m < R; ++m) acc[q][m] = vdupq_n_f32(0);
  }
  int64_t chunk = 0;
  for (int64_t g = 0; g < job.segments; ++g) {
    if (zeros) {
      for (int q = 0; q < Q; ++q) {
        zero[q] = vaddq_f32(vcvtq_f32_s32(load_zeros<Bits>(zeros, first + q)), vdupq_n_f32(kBias));
      }
      zeros += tile_zero_bytes(Bits);
    }
    FloatParts<Bits, R, Q> parts(zero);
    const int64_t end = chunk + per_group < chunks ? chunk + per_group : chunks;
    for (; chunk < end; ++chunk, x += kChunk * R) {
      each_vector<Bits, false, Q>(codes.chunk(chunk) + 16 * first, [&](auto j, const Quads<Q>& v) QC_LAMBDA_INLINE {
        parts.template add<decltype(j)::value>(x, v);
      });
    }
    for (int q = 0; q < Q; ++q) {
      const float32x4_t scale = load_scales(scales, first + q);
      for (int m = 0; m < R; ++m) acc[q][m] = vfmaq_f32(acc[q][m], parts.dot(q, m), scale);
    }
    scales += kTileRows;
  }
  for (int q = 0; q < Q; ++q) {
    for (int m = 0; m < R; ++m) store(job, tile, first + q, block * R + m, acc[q][m]);
  }
}

// Compute-bound: further quads find their codes in the cache.
template <int Bits, int R>
void tile_float(const LinearJob& job, int64_t tile, int64_t block) {
  constexpr int Q = 4 / R;
  const TileCodes<Bits> codes(job.weight, tile);
  for (int first = 0; first < 4; first += Q) float_quads<Bits, R, Q>(job, codes, tile, block, first);
}

template <int Bits>
TileFunction of_rows(int64_t rows) {
  switch (rows) {
    case 1: return tile_float<Bits, 1>;
    case 2: return tile_float<Bits, 2>;
    default: return tile_float<Bits, 4>;
  }
}

}  // namespace

namespace neon {

const int kFloatBlockRows[] = {1, 2, 4, 0};

void linear_float(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  const TileFunction run = with_bits(job.weight.bits, [&](auto bits) { return of_rows<decltype(bits)::value>(job.block_rows); });
  each_tile(job, run, tile_begin, tile_end, block_begin, block_end);
}

}  // namespace neon
}  // namespace qc
