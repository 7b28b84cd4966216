// Many rows of int8 activations: panels, see ../panel.h.
#include "isa.h"
#include "vectors.h"

#include "../vnni_panel.h"

namespace qc {
namespace {

struct Wide {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int64_t kLanes = 16;
  static constexpr int kLeastRows = 4, kMostRows = 8;

  static QC_INLINE const uint8_t* bytes(const Panel& panel, int64_t part) { return panel.bytes + part * panel.tile_stride; }
  static QC_INLINE int64_t stride(const Panel& panel) { return panel.tile_stride; }
  static QC_INLINE void store(const LinearJob& job, int64_t tile, int64_t part, int64_t row, Float acc) {
    qc::store(job, tile + part, row, acc);
  }

  template <bool Flip>
  static QC_INLINE Int load(const uint8_t* p) {
    return Flip ? kept(_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(char(0x80)))) : load_codes(p);
  }
  static QC_INLINE Int kept(Int v) {
    __asm__("" : "+v"(v));
    return v;
  }
  static QC_INLINE Int broadcast(int32_t word) { return _mm512_set1_epi32(word); }
  static QC_INLINE Int dot(Int sum, Int bytes, Int activations) { return _mm512_dpbusd_epi32(sum, bytes, activations); }
  static QC_INLINE Int load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
  static QC_INLINE Int minus_product(Int sum, Int zeros, int32_t factor) {
    return _mm512_sub_epi32(sum, _mm512_mullo_epi32(zeros, _mm512_set1_epi32(factor)));
  }
  static QC_INLINE Float zero() { return _mm512_setzero_ps(); }
  static QC_INLINE Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  static QC_INLINE Float add_scaled(Float acc, Int sum, Float scale, float activation_scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_set1_ps(activation_scale)), acc);
  }
};

}  // namespace

namespace avx512 {

const int kPanelRows[] = {Wide::kLeastRows, 6, Wide::kMostRows, 0};

void keep_scales(const LinearJob& job, int64_t tile, const PanelTile& out) {
  const Matrix& w = job.weight;
  const int64_t groups = out.scale_step ? job.segments : 1;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = tile * w.groups + g;
    _mm512_storeu_ps(out.scales + g * out.scale_step, load_scales(w.scales + at * kTileRows));
    if (w.zeros) {
      _mm512_storeu_si512(out.zeros + g * out.scale_step, load_zeros<8>(w.zeros + at * tile_zero_bytes(8)));
    }
  }
}

void multiply_panel(const LinearJob& job, const Panel& panel, int64_t tile, int64_t tiles, int64_t block_begin,
                    int64_t block_end) {
  qc::multiply_panel<Wide>(job, panel, tile, tiles, block_begin, block_end);
}

}  // namespace avx512
}  // namespace qc
