// Decoding of W16x4 units with AVX-512, shared by the kernels of this folder. Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_AVX512_VECTORS_H
#define QCOMPILER_AVX512_VECTORS_H

#include <immintrin.h>

#include "../tile_codes.h"
#include "../panel.h"

namespace qc {
namespace {

// One load, kept in a register: given the chance, the compiler loads a vector again for every shift of it, and a core has
// fewer loads than shifts to spare.
QC_INLINE __m512i load_codes(const uint8_t* p) {
  __m512i v = _mm512_loadu_si512(p);
  __asm__("" : "+v"(v));
  return v;
}

// Calls use(j, v) for j = 0 .. 7 in this order, where v holds the codes of columns 4j .. 4j+3 of the chunk at p: dword =
// row, byte = column. Of fewer than 8 bits only the low `Bits` of each byte count, the others are whatever lay beside
// them; 8-bit codes come biased by 128.
template <int Bits, class Use>
QC_INLINE void each_vector(const uint8_t* p, Use&& use) {
  if constexpr (Bits == 8) {
    const __m512i flip = _mm512_set1_epi8(char(0x80));
    for (int j = 0; j < 8; ++j) use(j, _mm512_xor_si512(load_codes(p + 64 * j), flip));
  } else if constexpr (Bits == 4) {
    for (int u = 0; u < 4; ++u) {
      const __m512i v = load_codes(p + 64 * u);
      use(2 * u, v);
      use(2 * u + 1, _mm512_srli_epi16(v, 4));
    }
  } else if constexpr (Bits == 2) {
    for (int u = 0; u < 2; ++u) {
      const __m512i v = load_codes(p + 64 * u);
      use(4 * u, v);
      use(4 * u + 1, _mm512_srli_epi16(v, 2));
      use(4 * u + 2, _mm512_srli_epi16(v, 4));
      use(4 * u + 3, _mm512_srli_epi16(v, 6));
    }
  } else {
    static_assert(Bits == 3);
    const __m512i b0 = load_codes(p), b1 = load_codes(p + 64), b2 = load_codes(p + 128);
    // The fourth index vector from the top two bits of each: what a shift brings in from the neighbouring byte lands in
    // bits that are selected away or do not count.
    constexpr int kSelect = 0xca;  // a ? b : c
    __m512i b3 = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x03), _mm512_srli_epi16(b2, 6), _mm512_srli_epi16(b1, 4),
                                           kSelect);
    b3 = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0f), b3, _mm512_srli_epi16(b0, 2), kSelect);
    use(0, b0);
    use(1, _mm512_srli_epi16(b0, 3));
    use(2, b1);
    use(3, _mm512_srli_epi16(b1, 3));
    use(4, b2);
    use(5, _mm512_srli_epi16(b2, 3));
    use(6, b3);
    use(7, _mm512_srli_epi16(b3, 3));
  }
}

// The 16 zero points of a (tile, group) as int32, biased like the codes.
template <int Bits>
QC_INLINE __m512i load_zeros(const uint8_t* zeros) {
  if constexpr (Bits == 8) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros));
    return _mm512_add_epi32(_mm512_cvtepi8_epi32(bytes), _mm512_set1_epi32(code_bias(8)));
  } else {
    // 2 * Bits bytes: rows 0 .. 7 from the first dword, rows 8 .. 15 from the last one, whose upper bits they fill.
    constexpr int kSkip = 32 - 8 * Bits;
    int first, last;
    std::memcpy(&first, zeros, 4);
    std::memcpy(&last, zeros + 2 * Bits - 4, 4);
    const __m512i halves = _mm512_mask_set1_epi32(_mm512_set1_epi32(first), 0xff00, last);
    const __m512i shifts = _mm512_setr_epi32(0, Bits, 2 * Bits, 3 * Bits, 4 * Bits, 5 * Bits, 6 * Bits, 7 * Bits, kSkip,
                                             kSkip + Bits, kSkip + 2 * Bits, kSkip + 3 * Bits, kSkip + 4 * Bits,
                                             kSkip + 5 * Bits, kSkip + 6 * Bits, kSkip + 7 * Bits);
    return _mm512_and_si512(_mm512_srlv_epi32(halves, shifts), _mm512_set1_epi32((1 << Bits) - 1));
  }
}

QC_INLINE __m512 load_scales(const uint16_t* scales) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
}

// Adds the bias and writes the rows of the tile that exist, with one NaN for all ISAs.
QC_INLINE void store(const LinearJob& job, int64_t tile, int64_t row, __m512 acc) {
  if (row >= job.rows) return;
  const int64_t first = tile * kTileRows, left = job.weight.n - first;
  const __mmask16 mask = left >= kTileRows ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
  if (job.offset) acc = _mm512_add_ps(acc, _mm512_maskz_loadu_ps(mask, job.offset + first));
  if (job.bias) acc = _mm512_add_ps(acc, _mm512_maskz_loadu_ps(mask, job.bias + first));
  const __mmask16 nan = _mm512_cmp_ps_mask(acc, acc, _CMP_UNORD_Q);
  acc = _mm512_mask_mov_ps(acc, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
  _mm512_mask_storeu_ps(job.y + row * job.y_stride + first, mask, acc);
}

// What becomes of decoded vectors, of a segment's scales and zero points beside the product: nothing, or a tile of a panel.
struct KeepNothing {
  static constexpr bool kAhead = false;
  QC_INLINE void vector(int, __m512i) {}
  QC_INLINE void chunk() {}
  QC_INLINE void segment(__m512, __m512i, bool) {}
};

struct KeepTile {
  static constexpr bool kAhead = true;
  PanelTile out;

  QC_INLINE void vector(int j, __m512i v) { _mm512_store_si512(out.bytes + kVectorBytes * j, v); }
  QC_INLINE void chunk() { out.bytes += 8 * kVectorBytes; }
  QC_INLINE void segment(__m512 scale, __m512i zero, bool asymmetric) {
    _mm512_storeu_ps(out.scales, scale);
    out.scales += out.scale_step;
    if (!asymmetric) return;
    _mm512_storeu_si512(out.zeros, zero);
    out.zeros += out.scale_step;
  }
};

using KeepFunction = void (*)(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out);

}  // namespace
}  // namespace qc
#endif
