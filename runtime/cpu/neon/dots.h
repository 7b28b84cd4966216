// Integer products of a chunk: Q quads of weights (dword = row, byte = column) with the activations of R rows, which lie side by
// side, [k / 4][R][4]. Sums wrap, so that they are exact modulo 2^32, and the segment's true sum fits (checked by the caller).
//   add<J>(x, v)   columns 4J .. 4J+3 of the chunk whose activations lie at x, J = 0 .. 7 in this order
//   sum<M>(q)      of row M, a lane for each row of quad q
// Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_NEON_DOTS_H
#define QCOMPILER_NEON_DOTS_H

#include "isa.h"
#include "vectors.h"

namespace qc {
namespace {

// sdot by lane: a register holds the activations of four (columns, row), and a lane of it meets 4 rows of weights.
template <int R, int Q>
struct LaneDots {
  // One row has too few sums to keep two or more pipes busy for the latency of sdot.
  static constexpr int kChains = R == 1 ? 2 : 1;
  int32x4_t total[Q][R][kChains];
  int8x16_t lanes;

  QC_INLINE LaneDots() : lanes(vdupq_n_s8(0)) {
    for (int q = 0; q < Q; ++q) {
      for (int m = 0; m < R; ++m) {
        for (int c = 0; c < kChains; ++c) total[q][m][c] = vdupq_n_s32(0);
      }
    }
  }

  template <int J>
  QC_INLINE void add(const int8_t* x, const Quads<Q>& v) {
    unrolled<R>([&](auto m) QC_LAMBDA_INLINE {
      constexpr int at = J * R + decltype(m)::value;
      if constexpr (at % 4 == 0) lanes = vld1q_s8(x + 4 * at);
      for (int q = 0; q < Q; ++q) {
        int32x4_t& t = total[q][decltype(m)::value][J % kChains];
        t = vdotq_laneq_s32(t, vreinterpretq_s8_u8(v.v[q]), lanes, at % 4);
      }
    });
  }

  template <int M>
  QC_INLINE int32x4_t sum(int q) const {
    return kChains == 1 ? total[q][M][0] : vaddq_s32(total[q][M][0], total[q][M][kChains - 1]);
  }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)
// smmla multiplies 2 rows of 8 columns by 2 rows of 8 columns: neighbouring vectors are zipped, weights and activations alike.
template <int R, int Q>
struct MatrixDots {
  static_assert(R % 4 == 0);
  int32x4_t total[Q][2][R / 2];  // [quad][rows 0, 1 or 2, 3 of it][pair of rows of x]: 2 x 2
  Quads<Q> before;

  QC_INLINE MatrixDots() {
    for (int q = 0; q < Q; ++q) {
      for (int h = 0; h < 2; ++h) {
        for (int m = 0; m < R / 2; ++m) total[q][h][m] = vdupq_n_s32(0);
      }
    }
  }

  template <int J>
  QC_INLINE void add(const int8_t* x, const Quads<Q>& v) {
    if constexpr (J % 2 == 0) {
      before = v;
    } else {
      int8x16_t w[Q][2];
      for (int q = 0; q < Q; ++q) zip(vreinterpretq_s8_u8(before.v[q]), vreinterpretq_s8_u8(v.v[q]), w[q]);
      for (int p = 0; p < R / 4; ++p) {
        int8x16_t a[2];
        zip(vld1q_s8(x + 4 * (J - 1) * R + 16 * p), vld1q_s8(x + 4 * J * R + 16 * p), a);
        for (int q = 0; q < Q; ++q) {
          for (int h = 0; h < 2; ++h) {
            for (int i = 0; i < 2; ++i) total[q][h][2 * p + i] = vmmlaq_s32(total[q][h][2 * p + i], a[i], w[q][h]);
          }
        }
      }
    }
  }

  template <int M>
  QC_INLINE int32x4_t sum(int q) const {
    const int64x2_t low = vreinterpretq_s64_s32(total[q][0][M / 2]), high = vreinterpretq_s64_s32(total[q][1][M / 2]);
    return vreinterpretq_s32_s64(M % 2 ? vzip2q_s64(low, high) : vzip1q_s64(low, high));
  }

 private:
  static QC_INLINE void zip(int8x16_t first, int8x16_t second, int8x16_t (&out)[2]) {
    const int32x4_t a = vreinterpretq_s32_s8(first), b = vreinterpretq_s32_s8(second);
    out[0] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
    out[1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
  }
};
#endif

// What a kernel is made with; in its symbol's name, so that a disassembly can be held against it.
struct Lanes {
  template <int R, int Q>
  using Dots = LaneDots<R, Q>;
};
#if defined(__ARM_FEATURE_MATMUL_INT8)
struct Matrices {
  template <int R, int Q>
  using Dots = MatrixDots<R, Q>;
};
#endif

// Quads at once: sums of all rows must stay in registers.
constexpr int quads_at_once(int64_t rows) { return rows <= 4 ? 4 : 2; }

}  // namespace
}  // namespace qc
#endif
