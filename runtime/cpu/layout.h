// Geometry of the packed layout W16x4 (docs/layout.md). Included by every ISA, so nothing here may have linkage: a
// shared inline function compiled with AVX-512 flags could be the copy that the linker keeps for all.
#ifndef QCOMPILER_LAYOUT_H
#define QCOMPILER_LAYOUT_H

#include <cstdint>
#include <cstring>

namespace qc {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kVectorBytes = 64;  // 16 rows x 4 positions
// Kernels walk k in chunks of 32 columns: a whole number of units for every width, and 64 * bits bytes of codes.
constexpr int64_t kChunk = 32;
constexpr int64_t kActivationBlock = 128;
// The same for vector-quantized matrices: the largest of their units.
constexpr int64_t kVqChunk = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

constexpr int64_t unit_columns(int bits) { return bits == 8 ? 4 : bits == 4 ? 8 : bits == 2 ? 16 : 32; }
constexpr int64_t unit_bytes(int bits) { return bits == 3 ? 3 * kVectorBytes : kVectorBytes; }
constexpr int64_t chunk_bytes(int bits) { return kChunk / unit_columns(bits) * unit_bytes(bits); }
static_assert(chunk_bytes(8) == 512 && chunk_bytes(4) == 256 && chunk_bytes(3) == 192 && chunk_bytes(2) == 128,
              "a chunk is 64 * bits bytes");

// The zero point of a symmetric matrix and the bias that makes 8-bit codes unsigned: q + bias in [0, 2^bits).
constexpr int symmetric_zero(int bits) { return bits == 8 ? 0 : 1 << (bits - 1); }
constexpr int code_bias(int bits) { return bits == 8 ? 128 : 0; }

// The largest |q - Z|.
constexpr int64_t largest_level(int bits, bool asymmetric) {
  return asymmetric ? (1 << bits) - 1 : 1 << (bits - 1);
}

// Bytes of one tile of codes.
constexpr int64_t tile_code_bytes(int64_t k, int bits) { return ceil_div(k, unit_columns(bits)) * unit_bytes(bits); }
constexpr int64_t group_count(int64_t k, int group) { return group ? ceil_div(k, group) : 1; }
constexpr int64_t tile_zero_bytes(int bits) { return 2 * bits; }

// fp16 -> fp32, exact; subnormals, infinities and NaN included.
static inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, mantissa = half & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    const float magnitude = float(mantissa) * 5.9604644775390625e-08f;  // 2^-24
    std::memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Row r's zero point of a (tile, group): a b-bit field at bit b*r, least significant bit first.
static inline int zero_point(const uint8_t* zeros, int bits, int r) {
  if (bits == 8) return int8_t(zeros[r]);
  const int bit = bits * r;
  int value = zeros[bit / 8] >> (bit % 8);
  if (bit % 8 + bits > 8) value |= zeros[bit / 8 + 1] << (8 - bit % 8);
  return value & ((1 << bits) - 1);
}

// Decodes one chunk of 32 columns to q (8 bits: signed), column by column: out[column * 16 + row].
static inline void decode_chunk(const uint8_t* codes, int bits, int8_t* out) {
  for (int row = 0; row < kTileRows; ++row) {
    for (int i = 0; i < 4; ++i) {
      const uint8_t* p = codes + 4 * row + i;
      int8_t* q = out + i * kTileRows + row;  // column 4 * j + i lies at q[64 * j]
      if (bits == 8) {
        for (int j = 0; j < 8; ++j) q[64 * j] = int8_t(p[64 * j]);
      } else if (bits == 4) {
        for (int j = 0; j < 8; ++j) q[64 * j] = int8_t((p[64 * (j / 2)] >> (4 * (j % 2))) & 15);
      } else if (bits == 2) {
        for (int j = 0; j < 8; ++j) q[64 * j] = int8_t((p[64 * (j / 4)] >> (2 * (j % 4))) & 3);
      } else {
        const int b0 = p[0], b1 = p[64], b2 = p[128];
        const int index[4] = {b0 & 63, b1 & 63, b2 & 63, (b0 >> 6) << 4 | (b1 >> 6) << 2 | b2 >> 6};
        for (int j = 0; j < 8; ++j) q[64 * j] = int8_t((index[j / 2] >> (3 * (j % 2))) & 7);
      }
    }
  }
}

// Asks for the codes a page ahead of p. One row meets each weight once: where decoding a byte or ending a group takes long enough
// for a core to run out of loads in flight, codes asked for by hand arrive as fast as memory delivers them. Elsewhere
// the core's own prefetcher is ahead of that already, and is only disturbed (measured; docs/kernels.md).
template <int64_t Bytes>
inline __attribute__((always_inline)) void ask_ahead(const uint8_t* p) {
  constexpr uintptr_t kAhead = 4096;  // as a number: what lies there need not belong to the tensor
  for (uintptr_t i = 0; i < Bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(p) + kAhead + i), 0, 3);
}

// Whether affine codes of so many bits are asked for, with so many inputs to a scale.
constexpr bool asks_ahead(int bits, int64_t segment) { return bits == 2 || segment < kActivationBlock; }

}  // namespace
}  // namespace qc
#endif
