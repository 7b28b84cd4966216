// Many rows of int8 activations: panels, see ../panel.h. Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_AVX2VNNI_PANEL_H
#define QCOMPILER_AVX2VNNI_PANEL_H

#include "products.h"

#include "../vnni_panel.h"

namespace qc {
namespace {

struct Half {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int64_t kLanes = 8;
  // vpdpbusd has a latency of 4 or 5 and a throughput of 2: 10 sums at least. 12 sums, 2 vectors of weights and one of activations
  // take 15 of 16 registers.
  static constexpr int kLeastRows = 5, kMostRows = 6;

  static QC_INLINE const uint8_t* bytes(const Panel& panel, int64_t part) {
    return panel.bytes + part / 2 * panel.tile_stride + 32 * (part % 2);
  }
  static QC_INLINE int64_t stride(const Panel&) { return 32; }
  static QC_INLINE void store(const LinearJob& job, int64_t tile, int64_t part, int64_t row, Float acc) {
    qc::store(job, tile + part / 2, int(part % 2), row, acc);
  }

  template <bool Flip>
  static QC_INLINE Int load(const uint8_t* p) {
    const Halves<1> v = Halves<1>::load(p);
    return Flip ? kept(v.flipped().v[0]) : v.v[0];
  }
  static QC_INLINE Int kept(Int v) {
    __asm__("" : "+v"(v));
    return v;
  }
  static QC_INLINE Int broadcast(int32_t word) { return _mm256_set1_epi32(word); }
  static QC_INLINE Int dot(Int sum, Int bytes, Int activations) { return dpbusd(sum, bytes, activations); }
  static QC_INLINE Int load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static QC_INLINE Int minus_product(Int sum, Int zeros, int32_t factor) {
    return _mm256_sub_epi32(sum, _mm256_mullo_epi32(zeros, _mm256_set1_epi32(factor)));
  }
  static QC_INLINE Float zero() { return _mm256_setzero_ps(); }
  static QC_INLINE Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static QC_INLINE Float add_scaled(Float acc, Int sum, Float scale, float activation_scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale, _mm256_set1_ps(activation_scale)), acc);
  }
};

// Scales and zero points of 8-bit codes.
inline void scales_of_codes(const LinearJob& job, int64_t tile, const PanelTile& out) {
  const Matrix& w = job.weight;
  const int64_t groups = out.scale_step ? job.segments : 1;
  KeepTile keep{out};
  for (int64_t at = tile * w.groups; at < tile * w.groups + groups; ++at, keep.next()) {
    for (int h = 0; h < 2; ++h) {
      const __m256i zero = w.zeros ? load_zeros<8>(w.zeros + at * tile_zero_bytes(8), h) : _mm256_setzero_si256();
      keep.segment(h, load_scales(w.scales + at * kTileRows, h), _mm256_add_epi32(zero, _mm256_set1_epi32(code_bias(8))),
                   w.zeros != nullptr);
    }
  }
}

}  // namespace
}  // namespace qc
#endif
