// Float activations and vector-quantized matrices: entries become floats as 8-bit codes do (see float_parts.h).
#include "float_parts.h"
#include "isa.h"
#include "vq_walk.h"

namespace qc {
namespace {

template <class Decoder, int R, int Q>
QC_INLINE void vq_float_quads(const LinearJob& job, const VqCodes<Decoder::kBits>& codes, int64_t tile, int64_t block,
                              int first) {
  const float* x = reinterpret_cast<const float*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  using Parts = FloatParts<8, R, Q>;

  float32x4_t acc[Q][R], bias[Q];
  for (int q = 0; q < Q; ++q) {
    bias[q] = vdupq_n_f32(float(code_bias(8)));
    for (int m = 0; m < R; ++m) acc[q][m] = vdupq_n_f32(0);
  }
  Parts parts(bias);
  each_segment<Decoder, Q>(
      job, codes, tile, first, [&]() QC_LAMBDA_INLINE { parts = Parts(bias); },
      [&](auto j, const Quads<Q>& v, int64_t chunk) QC_LAMBDA_INLINE {
        parts.template add<decltype(j)::value>(x + chunk * kChunk * R, v);
      },
      [&](int64_t, const float32x4_t (&factors)[Q]) QC_LAMBDA_INLINE {
        for (int q = 0; q < Q; ++q) {
          for (int m = 0; m < R; ++m) acc[q][m] = vfmaq_f32(acc[q][m], parts.dot(q, m), factors[q]);
        }
      });
  for (int q = 0; q < Q; ++q) {
    for (int m = 0; m < R; ++m) store(job, tile, first + q, block * R + m, acc[q][m]);
  }
}

template <class Decoder, int R>
void tile_vq_float(const LinearJob& job, int64_t tile, int64_t block) {
  constexpr int Q = 4 / R;
  const VqCodes<Decoder::kBits> codes(job.weight, tile);
  for (int first = 0; first < 4; first += Q) vq_float_quads<Decoder, R, Q>(job, codes, tile, block, first);
}

template <class Decoder>
TileFunction of_rows(int64_t rows) {
  switch (rows) {
    case 1: return tile_vq_float<Decoder, 1>;
    case 2: return tile_vq_float<Decoder, 2>;
    default: return tile_vq_float<Decoder, 4>;
  }
}

}  // namespace

namespace neon {

void vq_float(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  const TileFunction run = with_decoder<Decoders>(*job.weight.codebooks, [&](auto tag) {
    return of_rows<typename decltype(tag)::type>(job.block_rows);
  });
  each_tile(job, run, tile_begin, tile_end, block_begin, block_end);
}

}  // namespace neon
}  // namespace qc
