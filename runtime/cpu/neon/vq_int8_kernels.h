// int8 activations and vector-quantized matrices: entries are signed bytes like 8-bit codes (see int8_kernels.h).
// Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_NEON_VQ_INT8_KERNELS_H
#define QCOMPILER_NEON_VQ_INT8_KERNELS_H

#include "dots.h"
#include "vq_walk.h"

namespace qc {
namespace {

template <class With, class Decoder, int R, int Q>
QC_INLINE void vq_int8_quads(const LinearJob& job, const VqCodes<Decoder::kBits>& codes, int64_t tile, int64_t block,
                             int first) {
  const int8_t* x = static_cast<const int8_t*>(job.x) + block * job.x_block_bytes;
  const float* sa = job.sa + block * job.segments * R;
  using Dots = typename With::template Dots<R, Q>;

  float32x4_t acc[Q][R];
  for (int q = 0; q < Q; ++q) {
    for (int m = 0; m < R; ++m) acc[q][m] = vdupq_n_f32(0);
  }
  Dots dots;
  each_segment<Decoder, Q>(
      job, codes, tile, first, [&]() QC_LAMBDA_INLINE { dots = Dots(); },
      [&](auto j, const Quads<Q>& v, int64_t chunk) QC_LAMBDA_INLINE {
        dots.template add<decltype(j)::value>(x + chunk * kChunk * R, v);
      },
      [&](int64_t s, const float32x4_t (&factors)[Q]) QC_LAMBDA_INLINE {
        for (int q = 0; q < Q; ++q) {
          unrolled<R>([&](auto m) QC_LAMBDA_INLINE {
            constexpr int M = decltype(m)::value;
            const float32x4_t factor = vmulq_n_f32(factors[q], sa[s * R + M]);
            acc[q][M] = vfmaq_f32(acc[q][M], vcvtq_f32_s32(dots.template sum<M>(q)), factor);
          });
        }
      });
  for (int q = 0; q < Q; ++q) {
    for (int m = 0; m < R; ++m) store(job, tile, first + q, block * R + m, acc[q][m]);
  }
}

template <class With, class Decoder, int R>
void tile_vq_int8(const LinearJob& job, int64_t tile, int64_t block) {
  constexpr int Q = quads_at_once(R);
  const VqCodes<Decoder::kBits> codes(job.weight, tile);
  for (int first = 0; first < 4; first += Q) vq_int8_quads<With, Decoder, R, Q>(job, codes, tile, block, first);
}

}  // namespace
}  // namespace qc
#endif
