// Activations to int8: the scalar reference's operations (divide, round half to even, clamp), 16 columns at a time.
#include "isa.h"
#include "vectors.h"

namespace qc {
namespace avx512 {

bool quantize_row(const float* x, int64_t k, int64_t block, int64_t segment, const ActivationRange* range, int8_t* a,
                  float* sa, int32_t* sums) {
  const auto lanes = [](int64_t left) { return left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1); };
  for (int64_t begin = 0; begin < k; begin += block) {
    const int64_t end = begin + block < k ? begin + block : k;
    // As integers, absolute values order like floats, and everything not finite lies above.
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = begin; i < end; i += 16) {
      const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes(end - i), x + i));
      largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    const int absmax_bits = _mm512_reduce_max_epi32(largest);
    if (absmax_bits >= 0x7f800000) return false;
    float absmax;
    std::memcpy(&absmax, &absmax_bits, 4);
    const float scale = range ? range->scale : absmax / 127.0f;
    *sa++ = scale;

    const __m512 divisor = _mm512_set1_ps(scale > 0 ? scale : 1.0f);
    // The limits are whole numbers: clamping before rounding, and before the zero point is added, gives the same.
    const float largest_a = scale > 0 ? 127.0f : 0.0f;
    const __m512 limit = _mm512_set1_ps(range ? float(range->high - range->zero) : largest_a);
    const __m512 lower = _mm512_set1_ps(range ? float(range->low - range->zero) : -largest_a);
    const __m512i zero = _mm512_set1_epi32(range ? range->zero : 0);
    for (int64_t first = begin; first < end; first += segment) {
      const int64_t last = first + segment < end ? first + segment : end;
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = first; i < last; i += 16) {
        const __mmask16 mask = lanes(last - i);
        const __m512 ratio = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), divisor);
        const __m512i level = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(ratio, lower), limit));
        const __m512i q = _mm512_add_epi32(level, zero);
        sum = _mm512_mask_add_epi32(sum, mask, sum, q);
        _mm512_mask_cvtepi32_storeu_epi8(a + i, mask, q);
      }
      *sums++ = _mm512_reduce_add_epi32(sum);
    }
  }
  return true;
}

}  // namespace avx512
}  // namespace qc
