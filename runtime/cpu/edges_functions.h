// The edges of a linear op (docs/layout.md, "Edges"), for every instruction set the same source: loops that a compiler
// vectorizes without a change of values, for every sum and product is written with its order and its roundings.
// Included with different ISA flags, so nothing here may have linkage.
//
// Activations are computed in double and rounded to float once: the error before that is below 2^-44 of the value, so what
// comes out is the nearest float but for one value in a million, and any other way to compute it agrees.
#ifndef QCOMPILER_EDGES_FUNCTIONS_H
#define QCOMPILER_EDGES_FUNCTIONS_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "qcompiler_ops.h"

namespace qc {
namespace {

// One NaN for all ISAs: which operand's sign and payload survives is not portable.
inline float one_nan(float value) { return value != value ? std::numeric_limits<float>::quiet_NaN() : value; }

// c[0] + c[1] x + ..., from the last. Without a loop of its own, which would keep the one around it from being vectorized.
template <int First = 0, int N>
inline double horner(const double (&c)[N], double x) {
  if constexpr (First == N - 1) {
    return c[First];
  } else {
    return __builtin_fma(horner<First + 1>(c, x), x, c[First]);
  }
}

// e^x for |x| <= 700: 2^n e^r with |r| <= ln 2 / 2.
inline double exponential(double x) {
  // e^r by interpolation at the Chebyshev nodes of degree 11; within 2^-55.
  constexpr double kPowers[] = {1.0,
                                1.0,
                                0x1.0000000000011p-1,
                                0x1.555555555555ap-3,
                                0x1.555555554f0bap-5,
                                0x1.111111110f21ep-7,
                                0x1.6c16c1880029fp-10,
                                0x1.a01a01b1461c5p-13,
                                0x1.a01991a10d9aep-16,
                                0x1.71ddf56d8deb5p-19,
                                0x1.28b4101c77212p-22,
                                0x1.af632a0f7e2cep-26};
  constexpr double kLog2E = 0x1.71547652b82fep+0, kLn2High = 0x1.62e42fefa0000p-1, kLn2Low = 0x1.cf79abc9e3b3ap-40;
  constexpr double kRound = 0x1.8p+52;  // added, it leaves the nearest whole number in the low bits
  const double shifted = __builtin_fma(x, kLog2E, kRound);
  const double n = shifted - kRound;
  const double r = __builtin_fma(n, -kLn2Low, __builtin_fma(n, -kLn2High, x));
  const double power = horner(kPowers, r);
  uint64_t exponent, bits;
  std::memcpy(&exponent, &shifted, 8);
  std::memcpy(&bits, &power, 8);
  bits += exponent << 52;
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}

// value / (1 + e^-slope). Below -1000 a value is as good as -1000: the quotient rounds to -0, and infinity to no NaN.
inline double sigmoid_times(double value, double slope) {
  const double low = slope < -700.0 ? -700.0 : slope;
  const double clamped = low > 700.0 ? 700.0 : low;
  return (value < -1000.0 ? -1000.0 : value) / (1.0 + exponential(-clamped));
}

struct Silu {
  double operator()(double x) const { return sigmoid_times(x, x); }
};

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x / (1 + e^-2u), u what tanh is taken of.
struct GeluTanh {
  double operator()(double x) const {
    constexpr double kLinear = 0x1.9884533d43651p+0;  // 2 sqrt(2 / pi)
    constexpr double kCubic = 0x1.2444f2a4d8b4bp-4;   // that times 0.044715
    return sigmoid_times(x, x * __builtin_fma(x * x, kCubic, kLinear));
  }
};

// x Phi(x), Phi(x) = erfc(-x / sqrt 2) / 2.
struct GeluErf {
  double operator()(double x) const {
    // e^(z^2) erfc(z) (z + 3) in t = (z - 3) / (z + 3), 0 <= z <= 10.6, likewise of degree 18; within 2^-50.
    constexpr double kTail[] = {
        0x1.12f21ddd9f5e1p+0,   -0x1.c44c471baa35cp-1,  0x1.2e326945de47fp-1,   -0x1.3deb21415ed35p-2,  0x1.e995f11ae04d7p-4,
        -0x1.b78993d59fe2ep-6,  -0x1.3dd3e5d1c9ce1p-10, 0x1.8dae3a5036eb7p-9,   -0x1.1f78fcbbe8e00p-11, -0x1.22393fe42a23bp-12,
        0x1.c329e2ce72db8p-14,  0x1.fe26986b21b0ep-16,  -0x1.254378ab91891p-16, -0x1.414f2d44abcb2p-18, 0x1.71e2fcca30fabp-19,
        0x1.1f7a35adf177ap-20,  -0x1.65171ce945d59p-22, -0x1.197923e38054cp-22, -0x1.8a27b8aaf5dddp-25};
    // Beyond 15 Phi is 1 or, times x, rounds to 0.
    const double size = __builtin_fabs(x), bounded = size > 15.0 ? 15.0 : size;
    const double z = bounded * 0x1.6a09e667f3bcdp-1;
    const double inverse = 1.0 / (z + 3.0);
    const double t = __builtin_fma(-6.0, inverse, 1.0);
    const double tail = 0.5 * inverse * horner(kTail, t) * exponential(-0.5 * (bounded * bounded));
    const double sign = __builtin_copysign(1.0, x);
    return (x < -15.0 ? -15.0 : x) * __builtin_fma(-sign, tail, 0.5 + 0.5 * sign);  // tail or 1 - tail
  }
};

template <class Activation>
void gate_row(const float* other, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = one_nan(float(Activation()(double(y[i]))) * other[i]);
}

void gate(int32_t activation, const float* other, int64_t count, float* y) {
  if (activation == QC_GATE_SILU) return gate_row<Silu>(other, count, y);
  if (activation == QC_GATE_GELU_TANH) return gate_row<GeluTanh>(other, count, y);
  gate_row<GeluErf>(other, count, y);
}

void add(const float* residual, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = one_nan(y[i] + residual[i]);
}

constexpr int64_t kSums = 16;

// The products are exact in double, and so are rounded nowhere but in these sums.
double sum_of_squares(const float* x, int64_t k) {
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= k; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) sums[j] += double(x[i + j]) * double(x[i + j]);
  }
  for (int64_t j = 0; i + j < k; ++j) sums[j] += double(x[i + j]) * double(x[i + j]);
  for (int64_t width = kSums / 2; width; width /= 2) {
    for (int64_t j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

void normalize(const float* x, const float* norm, float epsilon, int64_t k, float* out) {
  const float factor = float(1.0 / std::sqrt(sum_of_squares(x, k) / double(k) + double(epsilon)));
  for (int64_t i = 0; i < k; ++i) out[i] = x[i] * factor * norm[i];
}

}  // namespace
}  // namespace qc
#endif
