// Activations to int8: the scalar reference's operations (divide, round half to even, clamp), 8 columns at a time.
#include "isa.h"
#include "vectors.h"

namespace qc {
namespace {

QC_INLINE int reduce_add(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

QC_INLINE int reduce_max(__m256i v) {
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// The low bytes of 8 dwords.
QC_INLINE void store_bytes(int8_t* a, __m256i q, int64_t count) {
  const __m256i gather = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m256i bytes = _mm256_shuffle_epi8(q, gather);
  const uint64_t low = uint32_t(_mm_cvtsi128_si32(_mm256_castsi256_si128(bytes)));
  const uint64_t high = uint32_t(_mm_cvtsi128_si32(_mm256_extracti128_si256(bytes, 1)));
  const uint64_t word = low | high << 32;
  std::memcpy(a, &word, size_t(count < 8 ? count : 8));
}

}  // namespace

namespace avx2 {

bool quantize_row(const float* x, int64_t k, int64_t block, int64_t segment, const ActivationRange* range, int8_t* a,
                  float* sa, int32_t* sums) {
  for (int64_t begin = 0; begin < k; begin += block) {
    const int64_t end = begin + block < k ? begin + block : k;
    // As integers, absolute values order like floats, and everything not finite lies above.
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = begin; i < end; i += 8) {
      const __m256i bits = _mm256_castps_si256(_mm256_maskload_ps(x + i, first_lanes(end - i)));
      largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    const int absmax_bits = reduce_max(largest);
    if (absmax_bits >= 0x7f800000) return false;
    float absmax;
    std::memcpy(&absmax, &absmax_bits, 4);
    const float scale = range ? range->scale : absmax / 127.0f;
    *sa++ = scale;

    const __m256 divisor = _mm256_set1_ps(scale > 0 ? scale : 1.0f);
    // The limits are whole numbers: clamping before rounding, and before the zero point is added, gives the same.
    const float largest_a = scale > 0 ? 127.0f : 0.0f;
    const __m256 limit = _mm256_set1_ps(range ? float(range->high - range->zero) : largest_a);
    const __m256 lower = _mm256_set1_ps(range ? float(range->low - range->zero) : -largest_a);
    const __m256i zero = _mm256_set1_epi32(range ? range->zero : 0);
    for (int64_t first = begin; first < end; first += segment) {
      const int64_t last = first + segment < end ? first + segment : end;
      __m256i sum = _mm256_setzero_si256();
      for (int64_t i = first; i < last; i += 8) {
        const __m256 ratio = _mm256_div_ps(_mm256_maskload_ps(x + i, first_lanes(last - i)), divisor);
        const __m256i level = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(ratio, lower), limit));
        const __m256i q = _mm256_add_epi32(level, zero);
        sum = _mm256_add_epi32(sum, _mm256_and_si256(q, first_lanes(last - i)));
        store_bytes(a + i, q, last - i);
      }
      *sums++ = reduce_add(sum);
    }
  }
  return true;
}

}  // namespace avx2
}  // namespace qc
