// What the kernels of this folder do with decoded weights, of levels and of codebooks alike: unsigned bytes meet R rows through
// vpdpbusd, whose other operand is a dword (4 consecutive k) of one row, broadcast. Lane = output row. vpdpbusd does not saturate,
// so every sum is exact modulo 2^32, and a segment's true sum fits (checked by the caller).
// Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_AVX2VNNI_PRODUCTS_H
#define QCOMPILER_AVX2VNNI_PRODUCTS_H

#include "../avx2/isa.h"
#include "../avx2/vectors.h"
#include "../panel.h"
#include "isa.h"

namespace qc {
namespace {

QC_INLINE __m256i dpbusd(__m256i sum, __m256i bytes, __m256i activations) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(sum, bytes, activations);
#else
  return _mm256_dpbusd_avx_epi32(sum, bytes, activations);
#endif
}

// The sums of one segment, for H halves of a tile and R rows.
template <int R, int H>
struct Sums {
  // vpdpbusd has a latency of 4 or 5 and a throughput of 2: few rows need several chains each.
  static constexpr int kChains = R * H <= 2 ? 4 : R * H <= 4 ? 2 : 1;
  __m256i dot[H][R][kChains];

  // The first chain starts from start[m]; null: from 0.
  QC_INLINE explicit Sums(const int32_t* start) {
    for (int h = 0; h < H; ++h) {
      for (int m = 0; m < R; ++m) {
        dot[h][m][0] = start ? _mm256_set1_epi32(start[m]) : _mm256_setzero_si256();
        for (int c = 1; c < kChains; ++c) dot[h][m][c] = _mm256_setzero_si256();
      }
    }
  }

  // The bytes of columns 4j .. 4j+3 of a chunk whose activations are x.
  QC_INLINE void add(int j, const Halves<H>& bytes, const int32_t* x) {
    for (int m = 0; m < R; ++m) {
      const __m256i a = _mm256_set1_epi32(x[j * R + m]);
      for (int h = 0; h < H; ++h) {
        __m256i& d = dot[h][m][j % kChains];
        d = dpbusd(d, bytes.v[h], a);
      }
    }
  }

  QC_INLINE __m256i total(int h, int m) const {
    __m256i d = dot[h][m][0];
    if (kChains > 1) d = _mm256_add_epi32(d, dot[h][m][1]);
    if (kChains > 2) d = _mm256_add_epi32(d, _mm256_add_epi32(dot[h][m][2 % kChains], dot[h][m][3 % kChains]));
    return d;
  }
};

// What becomes of decoded halves, of a segment's scales and zero points beside the product: nothing, or a tile of a panel.
struct KeepNothing {
  static constexpr bool kAhead = false;
  template <int H>
  QC_INLINE void vector(int, int, const Halves<H>&) {}
  QC_INLINE void chunk() {}
  QC_INLINE void segment(int, __m256, __m256i, bool) {}
  QC_INLINE void next() {}
};

struct KeepTile {
  static constexpr bool kAhead = true;
  PanelTile out;

  template <int H>
  QC_INLINE void vector(int j, int first, const Halves<H>& bytes) {
    for (int h = 0; h < H; ++h) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.bytes + kVectorBytes * j + 32 * (first + h)), bytes.v[h]);
    }
  }
  QC_INLINE void chunk() { out.bytes += 8 * kVectorBytes; }
  QC_INLINE void segment(int half, __m256 scale, __m256i zero, bool asymmetric) {
    _mm256_storeu_ps(out.scales + kHalfRows * half, scale);
    if (asymmetric) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.zeros + kHalfRows * half), zero);
  }
  QC_INLINE void next() {
    out.scales += out.scale_step;
    if (out.zeros) out.zeros += out.scale_step;
  }
};

using KeepFunction = void (*)(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out);

// Both halves of a tile at once where the registers hold their sums: codes and activations are then loaded once.
constexpr int halves_at_once(int rows) { return rows <= 4 ? 2 : 1; }

inline void each_tile(const LinearJob& job, TileFunction run, int64_t tile_begin, int64_t tile_end, int64_t block_begin,
                      int64_t block_end) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) run(job, tile, block);
  }
}

}  // namespace
}  // namespace qc
#endif
