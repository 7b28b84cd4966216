// Float products of a group: Q quads of levels with the activations of R rows, [k][R], in four parts, one for each k mod 4.
// Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_NEON_FLOAT_PARTS_H
#define QCOMPILER_NEON_FLOAT_PARTS_H

#include "isa.h"
#include "vectors.h"

namespace qc {
namespace {

template <int Bits, int R, int Q>
struct FloatParts {
  static constexpr uint32_t kField = (1u << Bits) - 1;
  float32x4_t part[Q][R][4];
  float32x4_t base0[Q], base8[Q];  // 2^23 and 2^15, and what else is to come off a code

  QC_INLINE explicit FloatParts(const float32x4_t (&zero)[Q]) {
    for (int q = 0; q < Q; ++q) {
      base0[q] = vaddq_f32(vdupq_n_f32(8388608.0f), zero[q]);
      base8[q] = vaddq_f32(vdupq_n_f32(32768.0f), zero[q]);
      for (int m = 0; m < R; ++m) {
        for (int i = 0; i < 4; ++i) part[q][m][i] = vdupq_n_f32(0);
      }
    }
  }

  // Columns 4J .. 4J+3 of the chunk whose activations lie at x. 8-bit codes are signed.
  template <int J>
  QC_INLINE void add(const float* x, const Quads<Q>& v) {
    const uint32x4_t field0 = vdupq_n_u32(kField), field8 = vdupq_n_u32(kField << 8);
    const uint32x4_t one0 = vdupq_n_u32(0x4b000000), one8 = vdupq_n_u32(0x47000000);  // 2^23, 2^15
    uint32x4_t low[Q], high[Q];
    for (int q = 0; q < Q; ++q) {
      low[q] = vreinterpretq_u32_u8(Bits == 8 ? veorq_u8(v.v[q], vdupq_n_u8(0x80)) : v.v[q]);
      high[q] = vshrq_n_u32(low[q], 16);
    }
    float32x4_t lanes = vdupq_n_f32(0);
    unrolled<4>([&](auto column) QC_LAMBDA_INLINE {
      constexpr int i = decltype(column)::value;
      float32x4_t level[Q];
      for (int q = 0; q < Q; ++q) {
        const uint32x4_t biased = vbslq_u32(i % 2 ? field8 : field0, i < 2 ? low[q] : high[q], i % 2 ? one8 : one0);
        level[q] = vsubq_f32(vreinterpretq_f32_u32(biased), i % 2 ? base8[q] : base0[q]);
      }
      unrolled<R>([&](auto row) QC_LAMBDA_INLINE {
        constexpr int m = decltype(row)::value, at = (4 * J + i) * R + m;
        if constexpr (at % 4 == 0) lanes = vld1q_f32(x + at);
        for (int q = 0; q < Q; ++q) part[q][m][i] = vfmaq_laneq_f32(part[q][m][i], level[q], lanes, at % 4);
      });
    });
  }

  QC_INLINE float32x4_t dot(int q, int m) const {
    return vaddq_f32(vaddq_f32(part[q][m][0], part[q][m][1]), vaddq_f32(part[q][m][2], part[q][m][3]));
  }
};

}  // namespace
}  // namespace qc
#endif
