// int8 activations: each unit is decoded in registers to signed bytes and meets R rows. Lane = output row.
// Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_NEON_INT8_KERNELS_H
#define QCOMPILER_NEON_INT8_KERNELS_H

#include "dots.h"

namespace qc {
namespace {

// Quads first .. first + Q - 1 of a tile.
template <class With, int Bits, int R, int Q>
QC_INLINE void int8_quads(const LinearJob& job, const TileCodes<Bits>& codes, int64_t tile, int64_t block, int first) {
  const Matrix& w = job.weight;
  const int8_t* x = static_cast<const int8_t*>(job.x) + block * job.x_block_bytes;
  const float* sa = job.sa + block * job.segments * R;
  const int32_t* sums = job.sums + block * job.segments * R;
  const uint16_t* scales = w.scales + tile * w.groups * kTileRows;
  const uint8_t* zeros = w.zeros ? w.zeros + tile * w.groups * tile_zero_bytes(Bits) : nullptr;
  const int64_t chunks = ceil_div(w.k, kChunk), per_segment = ceil_div(job.segment, kChunk);

  float32x4_t acc[Q][R];
  for (int q = 0; q < Q; ++q) {
    for (int m = 0; m < R; ++m) acc[q][m] = vdupq_n_f32(0);
  }
  int64_t chunk = 0;
  for (int64_t s = 0; s < job.segments; ++s) {
    typename With::template Dots<R, Q> dots;
    const int64_t end = chunk + per_segment < chunks ? chunk + per_segment : chunks;
    for (; chunk < end; ++chunk, x += kChunk * R) {
      each_vector<Bits, true, Q>(codes.chunk(chunk) + 16 * first, [&](auto j, const Quads<Q>& v) QC_LAMBDA_INLINE {
        dots.template add<decltype(j)::value>(x, v);
      });
    }
    for (int q = 0; q < Q; ++q) {
      const float32x4_t scale = load_scales(scales, first + q);
      const int32x4_t zero = zeros ? load_zeros<Bits>(zeros, first + q) : vdupq_n_s32(0);
      unrolled<R>([&](auto m) QC_LAMBDA_INLINE {
        constexpr int M = decltype(m)::value;
        int32x4_t d = dots.template sum<M>(q);
        if (zeros) {
          d = vmlsq_n_s32(d, zero, sums[M]);
        } else if (Bits < 8) {  // 8-bit codes are signed here: with no zero point there is nothing to correct
          d = vaddq_s32(d, vdupq_n_s32(sums[M]));
        }
        acc[q][M] = vfmaq_f32(acc[q][M], vcvtq_f32_s32(d), vmulq_n_f32(scale, sa[M]));
      });
    }
    sa += R;
    sums += R;
    scales += job.groups_per_segment * kTileRows;
    if (zeros) zeros += job.groups_per_segment * tile_zero_bytes(Bits);
  }
  for (int q = 0; q < Q; ++q) {
    for (int m = 0; m < R; ++m) store(job, tile, first + q, block * R + m, acc[q][m]);
  }
}

template <class With, int Bits, int R>
void tile_int8(const LinearJob& job, int64_t tile, int64_t block) {
  constexpr int Q = quads_at_once(R);
  const TileCodes<Bits> codes(job.weight, tile);
  for (int first = 0; first < 4; first += Q) int8_quads<With, Bits, R, Q>(job, codes, tile, block, first);
}

}  // namespace
}  // namespace qc
#endif
