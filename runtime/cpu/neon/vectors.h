// Decoding of W16x4 units with NEON, shared by the kernels of this folder: a tile is four quads of 4 rows, quad q of a 64-byte
// vector being its bytes 16q .. 16q+15. Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_NEON_VECTORS_H
#define QCOMPILER_NEON_VECTORS_H

#include <arm_neon.h>

#include <type_traits>
#include <utility>

#include "../tile_codes.h"

namespace qc {
namespace {

constexpr int kQuadRows = 4;

// A number that a lambda may use as a constant: lanes and shifts are part of an instruction.
template <int I>
struct Index {
  static constexpr int value = I;
};

template <class Use, int... I>
QC_INLINE void each_of(std::integer_sequence<int, I...>, Use&& use) {
  (use(Index<I>()), ...);
}

// use(Index<0>()) .. use(Index<N - 1>()).
template <int N, class Use>
QC_INLINE void unrolled(Use&& use) {
  each_of(std::make_integer_sequence<int, N>(), use);
}

// The same vector of Q quads of a tile.
template <int Q>
struct Quads {
  uint8x16_t v[Q];

  // The first quad lies at p.
  static QC_INLINE Quads load(const uint8_t* p) {
    Quads out;
    for (int q = 0; q < Q; ++q) out.v[q] = vld1q_u8(p + 16 * q);
    return out;
  }
  template <int Count>
  QC_INLINE Quads shifted() const {
    Quads out;
    for (int q = 0; q < Q; ++q) out.v[q] = vshrq_n_u8(v[q], Count);
    return out;
  }
  template <int Count>
  QC_INLINE Quads shifted_up() const {
    Quads out;
    for (int q = 0; q < Q; ++q) out.v[q] = vshlq_n_u8(v[q], Count);
    return out;
  }
  QC_INLINE Quads masked(int byte) const {
    Quads out;
    for (int q = 0; q < Q; ++q) out.v[q] = vandq_u8(v[q], vdupq_n_u8(uint8_t(byte)));
    return out;
  }
  // The top Count bits of each byte, and below them those of `next`.
  template <int Count>
  QC_INLINE Quads followed_by(const Quads& next) const {
    Quads out;
    for (int q = 0; q < Q; ++q) out.v[q] = vsriq_n_u8(v[q], next.v[q], Count);
    return out;
  }
};

// The fourth vector of 6-bit indices, from the top two bits of three vectors.
template <int Q>
QC_INLINE Quads<Q> fourth_of_six_bits(const Quads<Q>& b0, const Quads<Q>& b1, const Quads<Q>& b2) {
  return b0.template followed_by<2>(b1).template followed_by<4>(b2).template shifted<2>();
}

// Calls use(Index<j>(), v) for j = 0 .. 7 in this order, where v holds the codes of columns 4j .. 4j+3 of the chunk, for the
// quads of the tile from p on: dword = row, byte = column. 8-bit codes are signed. Of fewer bits only the low `Bits` of each
// byte count unless Exact, the others are whatever lay beside them.
template <int Bits, bool Exact, int Q, class Use>
QC_INLINE void each_vector(const uint8_t* p, Use&& use) {
  using V = Quads<Q>;
  const auto field = [](const V& v) QC_LAMBDA_INLINE { return Exact ? v.masked((1 << Bits) - 1) : v; };
  if constexpr (Bits == 8) {
    unrolled<8>([&](auto j) QC_LAMBDA_INLINE { use(j, V::load(p + 64 * j.value)); });
  } else if constexpr (Bits == 4) {
    unrolled<4>([&](auto u) QC_LAMBDA_INLINE {
      const V v = V::load(p + 64 * u.value);
      use(Index<2 * u.value>(), field(v));
      use(Index<2 * u.value + 1>(), v.template shifted<4>());
    });
  } else if constexpr (Bits == 2) {
    unrolled<2>([&](auto u) QC_LAMBDA_INLINE {
      const V v = V::load(p + 64 * u.value);
      use(Index<4 * u.value>(), field(v));
      use(Index<4 * u.value + 1>(), field(v.template shifted<2>()));
      use(Index<4 * u.value + 2>(), field(v.template shifted<4>()));
      use(Index<4 * u.value + 3>(), v.template shifted<6>());
    });
  } else {
    static_assert(Bits == 3);
    const V b0 = V::load(p), b1 = V::load(p + 64), b2 = V::load(p + 128);
    use(Index<0>(), field(b0));
    use(Index<1>(), field(b0.template shifted<3>()));
    use(Index<2>(), field(b1));
    use(Index<3>(), field(b1.template shifted<3>()));
    use(Index<4>(), field(b2));
    use(Index<5>(), field(b2.template shifted<3>()));
    const V b3 = fourth_of_six_bits(b0, b1, b2);
    use(Index<6>(), field(b3));
    use(Index<7>(), b3.template shifted<3>());
  }
}

// The zero points of quad q of a (tile, group).
template <int Bits>
QC_INLINE int32x4_t load_zeros(const uint8_t* zeros, int q) {
  if constexpr (Bits == 8) {
    int32_t word;
    std::memcpy(&word, zeros + kQuadRows * q, 4);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(word)))));
  } else {
    uint64_t word = 0;
    std::memcpy(&word, zeros, size_t(tile_zero_bytes(Bits)));
    const int32x4_t right = {0, -Bits, -2 * Bits, -3 * Bits};
    const uint32x4_t fields = vshlq_u32(vdupq_n_u32(uint32_t(word >> (kQuadRows * Bits * q))), right);
    return vreinterpretq_s32_u32(vandq_u32(fields, vdupq_n_u32((1 << Bits) - 1)));
  }
}

QC_INLINE float32x4_t load_scales(const uint16_t* scales, int q) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(scales + kQuadRows * q)));
}

// `count` floats (1 .. 4, more count as 4), then zeros.
QC_INLINE float32x4_t load_first(const float* p, int64_t count) {
  if (count >= kQuadRows) return vld1q_f32(p);
  float values[kQuadRows] = {};
  std::memcpy(values, p, size_t(count) * sizeof(float));
  return vld1q_f32(values);
}

QC_INLINE void store_first(float* p, float32x4_t v, int64_t count) {
  if (count >= kQuadRows) {
    vst1q_f32(p, v);
  } else {
    float values[kQuadRows];
    vst1q_f32(values, v);
    std::memcpy(p, values, size_t(count) * sizeof(float));
  }
}

// One NaN for all ISAs.
QC_INLINE float32x4_t with_one_nan(float32x4_t v) {
  return vbslq_f32(vceqq_f32(v, v), v, vreinterpretq_f32_u32(vdupq_n_u32(0x7fc00000)));
}

// Adds the bias and writes the rows of quad q of the tile that exist.
QC_INLINE void store(const LinearJob& job, int64_t tile, int q, int64_t row, float32x4_t acc) {
  const int64_t first = tile * kTileRows + kQuadRows * q, left = job.weight.n - first;
  if (row >= job.rows || left <= 0) return;
  if (job.offset) acc = vaddq_f32(acc, load_first(job.offset + first, left));
  if (job.bias) acc = vaddq_f32(acc, load_first(job.bias + first, left));
  store_first(job.y + row * job.y_stride + first, with_one_nan(acc), left);
}

// `run` on each tile, block by block.
QC_INLINE void each_tile(const LinearJob& job, TileFunction run, int64_t tile_begin, int64_t tile_end, int64_t block_begin,
                         int64_t block_end) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) run(job, tile, block);
  }
}

// choose(Index<bits>()) of a matrix.
template <class Choose>
TileFunction with_bits(int bits, Choose&& choose) {
  switch (bits) {
    case 8: return choose(Index<8>());
    case 4: return choose(Index<4>());
    case 3: return choose(Index<3>());
    default: return choose(Index<2>());
  }
}

}  // namespace
}  // namespace qc
#endif
