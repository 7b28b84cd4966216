// Activations to int8: the scalar reference's operations (divide, round half to even, clamp), 16 columns at a time.
#include "isa.h"
#include "vectors.h"

namespace qc {
namespace {

constexpr int64_t kWidth = 16;

struct Quantizer {
  float32x4_t divisor, lower, limit;
  int32x4_t zero;

  QC_INLINE int16x4_t four(const float* x) const {
    const float32x4_t ratio = vdivq_f32(vld1q_f32(x), divisor);
    const int32x4_t level = vcvtnq_s32_f32(vminq_f32(vmaxq_f32(ratio, lower), limit));
    return vmovn_s32(vaddq_s32(level, zero));
  }
  QC_INLINE int8x16_t operator()(const float* x) const {
    return vcombine_s8(vmovn_s16(vcombine_s16(four(x), four(x + 4))), vmovn_s16(vcombine_s16(four(x + 8), four(x + 12))));
  }
};

QC_INLINE uint32x4_t magnitudes(const float* x) {
  return vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x)), vdupq_n_u32(0x7fffffff));
}

// What lies at x, where fewer than 16 columns are left: a copy, followed by zeros.
struct Rest {
  float values[kWidth] = {};
  QC_INLINE Rest(const float* x, int64_t count) { std::memcpy(values, x, size_t(count) * sizeof(float)); }
};

QC_INLINE uint32x4_t larger(uint32x4_t largest, const float* x) {
  for (int i = 0; i < kWidth; i += 4) largest = vmaxq_u32(largest, magnitudes(x + i));
  return largest;
}

}  // namespace

namespace neon {

bool quantize_row(const float* x, int64_t k, int64_t block, int64_t segment, const ActivationRange* range, int8_t* a,
                  float* sa, int32_t* sums) {
  for (int64_t begin = 0; begin < k; begin += block) {
    const int64_t end = begin + block < k ? begin + block : k;
    // As integers, absolute values order like floats, and everything not finite lies above.
    uint32x4_t largest = vdupq_n_u32(0);
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) largest = larger(largest, x + i);
    if (i < end) largest = larger(largest, Rest(x + i, end - i).values);
    const uint32_t absmax_bits = vmaxvq_u32(largest);
    if (absmax_bits >= 0x7f800000) return false;
    float absmax;
    std::memcpy(&absmax, &absmax_bits, 4);
    const float scale = range ? range->scale : absmax / 127.0f;
    *sa++ = scale;

    // The limits are whole numbers: clamping before rounding, and before the zero point is added, gives the same.
    const float largest_a = scale > 0 ? 127.0f : 0.0f;
    const Quantizer quantize{vdupq_n_f32(scale > 0 ? scale : 1.0f),
                             vdupq_n_f32(range ? float(range->low - range->zero) : -largest_a),
                             vdupq_n_f32(range ? float(range->high - range->zero) : largest_a),
                             vdupq_n_s32(range ? range->zero : 0)};
    for (int64_t first = begin; first < end; first += segment) {
      const int64_t last = first + segment < end ? first + segment : end;
      int32x4_t sum = vdupq_n_s32(0);
      for (i = first; i + kWidth <= last; i += kWidth) {
        const int8x16_t q = quantize(x + i);
        vst1q_s8(a + i, q);
        sum = vpadalq_s16(sum, vpaddlq_s8(q));
      }
      int32_t total = vaddvq_s32(sum);
      if (i < last) {
        int8_t rest[kWidth];
        vst1q_s8(rest, quantize(Rest(x + i, last - i).values));
        std::memcpy(a + i, rest, size_t(last - i));
        for (int64_t j = 0; j < last - i; ++j) total += rest[j];
      }
      *sums++ = total;
    }
  }
  return true;
}

}  // namespace neon
}  // namespace qc
