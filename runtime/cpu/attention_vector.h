// A vector of 16 floats, for every instruction set the same values: what attention_functions.h computes with. The sums of its lanes are
// taken by halves: lanes 0 to 7 plus lanes 8 to 15, and so on. Included with different ISA flags, so nothing here may have linkage.
#ifndef QCOMPILER_ATTENTION_VECTOR_H
#define QCOMPILER_ATTENTION_VECTOR_H

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "inline.h"

namespace qc {
namespace {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

constexpr int kScoreRows = 4;                 // rows that meet a vector of positions at once
constexpr int kValueRows = 6, kValueVectors = 4;  // rows and vectors of a value that are summed at once
constexpr int kFolds = 2;                     // quads of positions whose products are summed at once

struct Vec {
  __m512 v;
};
QC_INLINE __mmask16 first(int64_t n) { return __mmask16(n >= 16 ? 0xffff : (1u << n) - 1); }
QC_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
QC_INLINE Vec all(float x) { return {_mm512_set1_ps(x)}; }
QC_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
QC_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
QC_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
QC_INLINE void store(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
QC_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
QC_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
QC_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
QC_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
QC_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
QC_INLINE Vec greater(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
// power times 2 to the whole number in the low bits of `shifted`; 0 where x < low, x where it is no number.
QC_INLINE Vec raised(Vec power, Vec shifted, Vec x, float low) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(power.v), _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23));
  const __mmask16 in = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(low), _CMP_NLT_UQ);
  const __m512 value = _mm512_maskz_mov_ps(in, _mm512_castsi512_ps(bits));
  return {_mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), x.v)};
}
QC_INLINE Vec one_nan(Vec a) {
  return {_mm512_mask_mov_ps(a.v, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_ps(__builtin_nanf("")))};
}
// Sums of four vectors' lanes, down to four lanes each: those of `a` in lanes 0 to 3, of `b` in 4 to 7, and so on.
QC_INLINE Vec fold(Vec a, Vec b, Vec c, Vec d) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44), _mm512_shuffle_f32x4(c.v, d.v, 0xee));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd))};
}
QC_INLINE __m512 low_pairs(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
QC_INLINE __m512 high_pairs(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
// Four such vectors to their sums: lane 4 i + r holds that of quarter i of vector r.
QC_INLINE Vec finish(Vec a, Vec b, Vec c, Vec d) {
  const __m512 ab = _mm512_add_ps(low_pairs(a.v, b.v), high_pairs(a.v, b.v));
  const __m512 cd = _mm512_add_ps(low_pairs(c.v, d.v), high_pairs(c.v, d.v));
  return {_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd))};
}
// out[c] = column c of 16 rows.
QC_INLINE void transpose(const Vec (&rows)[16], float* out) {
  __m512 t[16], u[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = low_pairs(t[i], t[i + 2]);
    u[i + 1] = high_pairs(t[i], t[i + 2]);
    u[i + 2] = low_pairs(t[i + 1], t[i + 3]);
    u[i + 3] = high_pairs(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // u[4 r + c]: quarter q holds column 4 q + c of rows 4 r to 4 r + 3
    const __m512 a = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88), b = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd), e = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    _mm512_storeu_ps(out + 16 * c, _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_storeu_ps(out + 16 * (8 + c), _mm512_shuffle_f32x4(a, b, 0xdd));
    _mm512_storeu_ps(out + 16 * (4 + c), _mm512_shuffle_f32x4(d, e, 0x88));
    _mm512_storeu_ps(out + 16 * (12 + c), _mm512_shuffle_f32x4(d, e, 0xdd));
  }
}

#else

constexpr int kScoreRows = 2;
constexpr int kValueRows = 3, kValueVectors = 2;
constexpr int kFolds = 1;

#if defined(__AVX2__) && defined(__FMA__)

struct Vec {
  __m256 a, b;
};
QC_INLINE __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n < 0 ? 0 : n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
QC_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
QC_INLINE Vec all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
QC_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
QC_INLINE Vec load(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
}
QC_INLINE void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
QC_INLINE void store(float* p, Vec x, int64_t n) {
  _mm256_maskstore_ps(p, first(n), x.a);
  _mm256_maskstore_ps(p + 8, first(n - 8), x.b);
}
QC_INLINE Vec fma(Vec x, Vec y, Vec z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
QC_INLINE Vec operator+(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
QC_INLINE Vec operator-(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
QC_INLINE Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
QC_INLINE Vec operator/(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
QC_INLINE Vec greater(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
QC_INLINE __m256 raised(__m256 power, __m256 shifted, __m256 x, float low) {
  const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(power), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
  const __m256 value = _mm256_and_ps(_mm256_cmp_ps(x, _mm256_set1_ps(low), _CMP_NLT_UQ), _mm256_castsi256_ps(bits));
  return _mm256_blendv_ps(value, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
QC_INLINE Vec raised(Vec power, Vec shifted, Vec x, float low) {
  return {raised(power.a, shifted.a, x.a, low), raised(power.b, shifted.b, x.b, low)};
}
QC_INLINE __m256 one_nan(__m256 x) {
  return _mm256_blendv_ps(x, _mm256_set1_ps(__builtin_nanf("")), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
QC_INLINE Vec one_nan(Vec x) { return {one_nan(x.a), one_nan(x.b)}; }
QC_INLINE __m256 fold(__m256 x, __m256 y) {
  return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
}
QC_INLINE Vec fold(Vec x, Vec y, Vec z, Vec w) {
  return {fold(_mm256_add_ps(x.a, x.b), _mm256_add_ps(y.a, y.b)), fold(_mm256_add_ps(z.a, z.b), _mm256_add_ps(w.a, w.b))};
}
QC_INLINE __m256 pairs(__m256 x, __m256 y) {
  const __m256d a = _mm256_castps_pd(x), b = _mm256_castps_pd(y);
  return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
}
QC_INLINE __m256 finish(__m256 x, __m256 y, __m256 z, __m256 w) {
  const __m256 a = pairs(x, y), b = pairs(z, w);
  return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}
QC_INLINE Vec finish(Vec x, Vec y, Vec z, Vec w) { return {finish(x.a, y.a, z.a, w.a), finish(x.b, y.b, z.b, w.b)}; }

#elif defined(__aarch64__) && defined(__ARM_NEON)

struct Vec {
  float32x4_t q[4];
};
template <class Function>
QC_INLINE Vec each(Function&& function) {
  return {{function(0), function(1), function(2), function(3)}};
}
QC_INLINE Vec all(float x) {
  return each([&](int) { return vdupq_n_f32(x); });
}
QC_INLINE Vec zero() { return all(0); }
QC_INLINE Vec load(const float* p) {
  return each([&](int i) { return vld1q_f32(p + 4 * i); });
}
QC_INLINE Vec load(const float* p, int64_t n) {
  float copy[16] = {};
  std::memcpy(copy, p, size_t(n < 0 ? 0 : n > 16 ? 16 : n) * sizeof(float));
  return load(copy);
}
QC_INLINE void store(float* p, Vec x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.q[i]);
}
QC_INLINE void store(float* p, Vec x, int64_t n) {
  float copy[16];
  store(copy, x);
  std::memcpy(p, copy, size_t(n < 0 ? 0 : n > 16 ? 16 : n) * sizeof(float));
}
QC_INLINE Vec fma(Vec x, Vec y, Vec z) {
  return each([&](int i) { return vfmaq_f32(z.q[i], x.q[i], y.q[i]); });
}
QC_INLINE Vec operator+(Vec x, Vec y) {
  return each([&](int i) { return vaddq_f32(x.q[i], y.q[i]); });
}
QC_INLINE Vec operator-(Vec x, Vec y) {
  return each([&](int i) { return vsubq_f32(x.q[i], y.q[i]); });
}
QC_INLINE Vec operator*(Vec x, Vec y) {
  return each([&](int i) { return vmulq_f32(x.q[i], y.q[i]); });
}
QC_INLINE Vec operator/(Vec x, Vec y) {
  return each([&](int i) { return vdivq_f32(x.q[i], y.q[i]); });
}
QC_INLINE Vec greater(Vec x, Vec y) {
  return each([&](int i) { return vbslq_f32(vcgtq_f32(x.q[i], y.q[i]), x.q[i], y.q[i]); });
}
QC_INLINE Vec raised(Vec power, Vec shifted, Vec x, float low) {
  return each([&](int i) {
    const int32x4_t bits = vaddq_s32(vreinterpretq_s32_f32(power.q[i]), vshlq_n_s32(vreinterpretq_s32_f32(shifted.q[i]), 23));
    const float32x4_t value = vbslq_f32(vcltq_f32(x.q[i], vdupq_n_f32(low)), vdupq_n_f32(0), vreinterpretq_f32_s32(bits));
    return vbslq_f32(vceqq_f32(x.q[i], x.q[i]), value, x.q[i]);
  });
}
QC_INLINE Vec one_nan(Vec x) {
  return each([&](int i) { return vbslq_f32(vceqq_f32(x.q[i], x.q[i]), x.q[i], vdupq_n_f32(__builtin_nanf(""))); });
}
QC_INLINE float32x4_t fold(const Vec& x) { return vaddq_f32(vaddq_f32(x.q[0], x.q[2]), vaddq_f32(x.q[1], x.q[3])); }
QC_INLINE Vec fold(Vec x, Vec y, Vec z, Vec w) { return {{fold(x), fold(y), fold(z), fold(w)}}; }
QC_INLINE float32x4_t pairs(float32x4_t x, float32x4_t y) {
  const float64x2_t a = vreinterpretq_f64_f32(x), b = vreinterpretq_f64_f32(y);
  return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(a, b)), vreinterpretq_f32_f64(vzip2q_f64(a, b)));
}
QC_INLINE Vec finish(Vec x, Vec y, Vec z, Vec w) {
  return each([&](int i) {
    const float32x4_t a = pairs(x.q[i], y.q[i]), b = pairs(z.q[i], w.q[i]);
    return vaddq_f32(vuzp1q_f32(a, b), vuzp2q_f32(a, b));
  });
}

#else

struct Vec {
  float x[16];
};
template <class Function>
QC_INLINE Vec each(Function&& function) {
  Vec out;
  for (int i = 0; i < 16; ++i) out.x[i] = function(i);
  return out;
}
QC_INLINE Vec all(float x) {
  return each([&](int) { return x; });
}
QC_INLINE Vec zero() { return all(0); }
QC_INLINE Vec load(const float* p, int64_t n) {
  return each([&](int i) { return i < n ? p[i] : 0.0f; });
}
QC_INLINE Vec load(const float* p) { return load(p, 16); }
QC_INLINE void store(float* p, Vec a, int64_t n) {
  for (int i = 0; i < 16 && i < n; ++i) p[i] = a.x[i];
}
QC_INLINE void store(float* p, Vec a) { store(p, a, 16); }
QC_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return __builtin_fmaf(a.x[i], b.x[i], c.x[i]); });
}
QC_INLINE Vec operator+(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] + b.x[i]; });
}
QC_INLINE Vec operator-(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] - b.x[i]; });
}
QC_INLINE Vec operator*(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] * b.x[i]; });
}
QC_INLINE Vec operator/(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] / b.x[i]; });
}
QC_INLINE Vec greater(Vec a, Vec b) {
  return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
}
QC_INLINE Vec raised(Vec power, Vec shifted, Vec x, float low) {
  return each([&](int i) {
    uint32_t bits, exponent;
    std::memcpy(&bits, &power.x[i], 4);
    std::memcpy(&exponent, &shifted.x[i], 4);
    bits += exponent << 23;
    float value;
    std::memcpy(&value, &bits, 4);
    return x.x[i] != x.x[i] ? x.x[i] : x.x[i] < low ? 0.0f : value;
  });
}
QC_INLINE Vec one_nan(Vec a) {
  return each([&](int i) { return a.x[i] != a.x[i] ? __builtin_nanf("") : a.x[i]; });
}
QC_INLINE Vec fold(Vec a, Vec b, Vec c, Vec d) {
  const Vec* all[] = {&a, &b, &c, &d};
  return each([&](int i) {
    const float* x = all[i / 4]->x + i % 4;
    return (x[0] + x[8]) + (x[4] + x[12]);
  });
}
QC_INLINE Vec finish(Vec a, Vec b, Vec c, Vec d) {
  const Vec* all[] = {&a, &b, &c, &d};
  return each([&](int i) {
    const float* x = all[i % 4]->x + i / 4 * 4;
    return (x[0] + x[2]) + (x[1] + x[3]);
  });
}

#endif

QC_INLINE void transpose(const Vec (&rows)[16], float* out) {
  float lanes[16][16];
  for (int i = 0; i < 16; ++i) store(lanes[i], rows[i]);
  for (int c = 0; c < 16; ++c) {
    for (int i = 0; i < 16; ++i) out[16 * c + i] = lanes[i][c];
  }
}

#endif

// The sum of all lanes, by halves, in every lane.
QC_INLINE Vec sum(Vec a) {
  const Vec four = fold(a, a, a, a);
  return finish(four, four, four, four);
}

QC_INLINE float greatest(Vec a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(a.v);
#else
  float x[kLanes];
  store(x, a);
  for (int width = kLanes / 2; width; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
  }
  return x[0];
#endif
}

// e^x for x <= 0 to 1.1 units in the last place; 0 below -87, where the result would leave the normal numbers.
QC_INLINE Vec exponential(Vec x) {
  constexpr float kRound = 0x1.8p+23f;  // added, it leaves the nearest whole number in the low bits
  const Vec shifted = fma(x, all(0x1.715476p+0f), all(kRound)), n = shifted - all(kRound);
  const Vec r = fma(n, all(0x1.05c610p-29f), fma(n, all(-0x1.62e430p-1f), x));
  Vec p = all(1.0f / 5040);
  p = fma(p, r, all(1.0f / 720));
  p = fma(p, r, all(1.0f / 120));
  p = fma(p, r, all(1.0f / 24));
  p = fma(p, r, all(1.0f / 6));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1));
  p = fma(p, r, all(1));
  return raised(p, shifted, x, -87);
}

}  // namespace
}  // namespace qc
#endif
