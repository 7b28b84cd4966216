// The linear op on vector-quantized matrices with AVX-512, for whatever looks indices up in codebooks: `Decoders` is a template
// whose members are the decoders of the eight codebooks. A decoder keeps the tables of one codebook and
//   Decoder(entries, dim)   loads them: int8 [dim][centroids]
//   kBits                   of a column, for CodeStream
//   each(p, half, use)      calls use(j, v) for j = 0 .. 7 in this order, where v holds the entries of columns 4j .. 4j+3 of the
//                           chunk of 32 columns at p, biased by 128: dword = row, byte = column
// Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_AVX512_VQ_KERNELS_H
#define QCOMPILER_AVX512_VQ_KERNELS_H

#include "../vq_tiles.h"
#include "isa.h"
#include "vectors.h"

namespace qc {
namespace {

// The codes of one tile, walked chunk by chunk. Bits: of a column (see vq_layout.h), 5 for the 5-bit indices of pairs, whose
// units are two chunks each.
template <int Bits>
struct CodeStream {
  const uint8_t* p;
  int64_t whole;  // chunks that are all there and lie ahead
  bool rest;      // after them one of which a part is there, to be read from a padded copy
  alignas(64) uint8_t tail[Bits == 5 ? 64 : chunk_bytes(Bits)];

  QC_INLINE CodeStream(const Matrix& w, int64_t tile) : p(w.codes + tile * w.tile_bytes) {
    const bool padded = Bits == 5 || Bits == 3;  // units of a chunk or more
    whole = padded ? ceil_div(w.k, kChunk) : w.k / kChunk;
    rest = !padded && w.k % kChunk;
    if (rest) {
      const int64_t before = whole * chunk_bytes(Bits == 5 ? 4 : Bits);
      std::memset(tail, 0, sizeof tail);
      std::memcpy(tail, p + before, size_t(w.tile_bytes - before));
    }
  }

  // Calls use(p, half) for the next `count` chunks, or as many as there are.
  template <class Use>
  QC_INLINE void next(int64_t count, Use&& use) {
    const uint8_t* at = p;  // in a register: the padded copy keeps this object in memory
    int64_t run = count < whole ? count : whole;
    whole -= run;
    bool last = rest && run < count;
    while (true) {
      if (Bits == 5) {
        bool second = half;
        for (; run > 0; --run, second = !second) {
          use(at, second);
          at += second ? vq_unit_bytes(2, 32) : 0;
        }
        half = second;
      } else {
        for (; run > 0; --run, at += chunk_bytes(Bits)) use(at, false);
      }
      if (!last) break;
      at = tail;
      run = 1;
      last = rest = false;
    }
    p = at;
  }

 private:
  bool half = false;
};

// One row meets each weight once, and looking it up takes long enough for a core to run out of loads in flight: asked for a page
// ahead, codes arrive as fast as memory delivers them.
template <int Bits>
QC_INLINE void prefetch_ahead(const uint8_t* p, bool half) {
  constexpr int64_t kAhead = 4096;
  const int64_t first = Bits == 5 && half ? 192 : 0, end = Bits == 5 ? half ? 320 : 192 : chunk_bytes(Bits == 5 ? 4 : Bits);
  for (int64_t i = first; i < end; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + kAhead + i), _MM_HINT_T0);
}

struct TileBooks : BooksOfTile {
  using BooksOfTile::BooksOfTile;
  QC_INLINE __m512 scale() const { return _mm512_cvtph_ps(_mm256_set1_epi16(short(*scales))); }
};

// vpdpbusd's unsigned operand is biased by 128: the sums that a segment starts from take that off (see linear.cpp).
template <class Decoder, int R, class Keep>
QC_INLINE void rows_int8(const LinearJob& job, int64_t tile, int64_t block, Keep keep) {
  // vpdpbusd has a latency of 4 and a throughput of 1: few rows need several chains each.
  constexpr int kChains = R == 1 ? 4 : R <= 3 ? 2 : 1;
  const Matrix& w = job.weight;
  CodeStream<Decoder::kBits> codes(w, tile);
  TileBooks books(*w.codebooks, tile);
  const int32_t* x = reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  const float* sa = job.sa + block * job.segments * R;
  const int32_t* sums = job.sums + block * job.segments * R;
  const uint16_t* scales = w.scales + tile * w.groups * kTileRows;
  const int64_t per_segment = job.segment / kChunk;
  const int64_t segments_per_book = w.codebooks->block_columns / job.segment;

  __m512 acc[R];
  for (int m = 0; m < R; ++m) acc[m] = _mm512_setzero_ps();
  for (int64_t s = 0; s < job.segments; books.next()) {
    const Decoder decoder(books.entries, w.codebooks->dim);
    const __m512 shared = books.scale();
    const int64_t book_end = s + segments_per_book < job.segments ? s + segments_per_book : job.segments;
    for (; s < book_end; ++s) {
      __m512i dot[R][kChains];
      for (int m = 0; m < R; ++m) {
        dot[m][0] = _mm512_set1_epi32(sums[m]);
        for (int c = 1; c < kChains; ++c) dot[m][c] = _mm512_setzero_si512();
      }
      codes.next(per_segment, [&](const uint8_t* p, bool half) QC_LAMBDA_INLINE {
        if (R == 1 || Keep::kAhead) prefetch_ahead<Decoder::kBits>(p, half);
        decoder.each(p, half, [&](int j, __m512i v) QC_LAMBDA_INLINE {
          keep.vector(j, v);
          for (int m = 0; m < R; ++m) {
            __m512i& d = dot[m][j % kChains];
            d = _mm512_dpbusd_epi32(d, v, _mm512_set1_epi32(x[j * R + m]));
          }
        });
        x += 8 * R;
        keep.chunk();
      });
      const __m512 scale = _mm512_mul_ps(load_scales(scales), shared);
      keep.segment(scale, __m512i(), false);
      for (int m = 0; m < R; ++m) {
        __m512i d = dot[m][0];
        if (kChains > 1) d = _mm512_add_epi32(d, dot[m][1]);
        if (kChains > 2) d = _mm512_add_epi32(d, _mm512_add_epi32(dot[m][2 % kChains], dot[m][3 % kChains]));
        acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), _mm512_mul_ps(scale, _mm512_set1_ps(sa[m])), acc[m]);
      }
      sa += R;
      sums += R;
      scales += job.groups_per_segment * kTileRows;
    }
  }
  for (int m = 0; m < R; ++m) store(job, tile, block * R + m, acc[m]);
}

template <class Decoder, int R>
void tile_int8(const LinearJob& job, int64_t tile, int64_t block) {
  rows_int8<Decoder, R>(job, tile, block, KeepNothing());
}

template <class Decoder, int R>
void keep_int8(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out) {
  rows_int8<Decoder, R>(job, tile, block, KeepTile{out});
}

// As linear_float.cpp makes floats of 8-bit codes.
template <class Decoder, int R>
void tile_float(const LinearJob& job, int64_t tile, int64_t block) {
  const Matrix& w = job.weight;
  CodeStream<Decoder::kBits> codes(w, tile);
  TileBooks books(*w.codebooks, tile);
  const float* x = reinterpret_cast<const float*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  const uint16_t* scales = w.scales + tile * w.groups * kTileRows;
  const int64_t per_segment = job.segment / kChunk;
  const int64_t segments_per_book = w.codebooks->block_columns / job.segment;

  constexpr int kAndOr = 0xea;  // (a & b) | c
  const __m512i field0 = _mm512_set1_epi32(0xff), field8 = _mm512_set1_epi32(0xff00);
  const __m512i one0 = _mm512_set1_epi32(0x4b000000), one8 = _mm512_set1_epi32(0x47000000);  // 2^23, 2^15
  const __m512 base0 = _mm512_set1_ps(8388608.0f + 128.0f), base8 = _mm512_set1_ps(32768.0f + 128.0f);

  __m512 acc[R];
  for (int m = 0; m < R; ++m) acc[m] = _mm512_setzero_ps();
  for (int64_t s = 0; s < job.segments; books.next()) {
    const Decoder decoder(books.entries, w.codebooks->dim);
    const __m512 shared = books.scale();
    const int64_t book_end = s + segments_per_book < job.segments ? s + segments_per_book : job.segments;
    for (; s < book_end; ++s) {
      __m512 part[R][4];
      for (int m = 0; m < R; ++m) {
        for (int i = 0; i < 4; ++i) part[m][i] = _mm512_setzero_ps();
      }
      codes.next(per_segment, [&](const uint8_t* p, bool half) QC_LAMBDA_INLINE {
        decoder.each(p, half, [&](int j, __m512i low) QC_LAMBDA_INLINE {
          const __m512i high = _mm512_srli_epi32(low, 16);
          for (int i = 0; i < 4; ++i) {
            const __m512i codes4 = i < 2 ? low : high;
            const __m512i biased = i % 2 ? _mm512_ternarylogic_epi32(codes4, field8, one8, kAndOr)
                                         : _mm512_ternarylogic_epi32(codes4, field0, one0, kAndOr);
            const __m512 entry = _mm512_sub_ps(_mm512_castsi512_ps(biased), i % 2 ? base8 : base0);
            for (int m = 0; m < R; ++m) {
              part[m][i] = _mm512_fmadd_ps(entry, _mm512_set1_ps(x[(4 * j + i) * R + m]), part[m][i]);
            }
          }
        });
        x += 32 * R;
      });
      const __m512 scale = _mm512_mul_ps(load_scales(scales), shared);
      for (int m = 0; m < R; ++m) {
        const __m512 dot = _mm512_add_ps(_mm512_add_ps(part[m][0], part[m][1]), _mm512_add_ps(part[m][2], part[m][3]));
        acc[m] = _mm512_fmadd_ps(dot, scale, acc[m]);
      }
      scales += job.groups_per_segment * kTileRows;
    }
  }
  for (int m = 0; m < R; ++m) store(job, tile, block * R + m, acc[m]);
}

template <class Decoder>
TileFunction int8_of_rows(int64_t rows) {
  switch (rows) {
    case 1: return tile_int8<Decoder, 1>;
    case 2: return tile_int8<Decoder, 2>;
    case 3: return tile_int8<Decoder, 3>;
    case 4: return tile_int8<Decoder, 4>;
    case 6: return tile_int8<Decoder, 6>;
    case 8: return tile_int8<Decoder, 8>;
    default: return tile_int8<Decoder, 12>;
  }
}

template <class Decoder>
TileFunction float_of_rows(int64_t rows) {
  switch (rows) {
    case 1: return tile_float<Decoder, 1>;
    case 2: return tile_float<Decoder, 2>;
    case 4: return tile_float<Decoder, 4>;
    default: return tile_float<Decoder, 6>;
  }
}

template <class Decoders>
void all_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  const TileFunction run = with_decoder<Decoders>(*job.weight.codebooks, [&](auto tag) {
    return int8_of_rows<typename decltype(tag)::type>(job.block_rows);
  });
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) run(job, tile, block);
  }
}

template <class Decoders>
void all_float(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  const TileFunction run = with_decoder<Decoders>(*job.weight.codebooks, [&](auto tag) {
    return float_of_rows<typename decltype(tag)::type>(job.block_rows);
  });
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) run(job, tile, block);
  }
}

template <class Decoders>
void keep_any(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out) {
  const KeepFunction run = with_decoder<Decoders, KeepFunction>(*job.weight.codebooks, [&](auto tag) -> KeepFunction {
    using Decoder = typename decltype(tag)::type;
    switch (job.block_rows) {
      case 4: return keep_int8<Decoder, 4>;
      case 6: return keep_int8<Decoder, 6>;
      default: return keep_int8<Decoder, 8>;
    }
  });
  run(job, tile, block, out);
}

constexpr int kSelect = 0xca;  // vpternlog: a ? b : c

// The four vectors of 6-bit indices of 32 columns: only the low 6 bits of each byte count.
struct SixBits {
  __m512i v[4];

  QC_INLINE explicit SixBits(const uint8_t* p) : v{load_codes(p), load_codes(p + 64), load_codes(p + 128), {}} {
    const __m512i low = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x03), _mm512_srli_epi16(v[2], 6),
                                                  _mm512_srli_epi16(v[1], 4), kSelect);
    v[3] = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x0f), low, _mm512_srli_epi16(v[0], 2), kSelect);
  }
};

// The four vectors of 5-bit indices of one half of a unit: only the low 5 bits of each byte count.
struct FiveBits {
  __m512i v[4];

  QC_INLINE FiveBits(const uint8_t* p, bool half) {
    const __m512i v3 = load_codes(p + 192), low3 = _mm512_set1_epi8(0x07);
    if (!half) {
      v[0] = load_codes(p), v[1] = load_codes(p + 64), v[2] = load_codes(p + 128), v[3] = v3;
      return;
    }
    const auto top = [&](int from) { return _mm512_srli_epi16(load_codes(p + 64 * from), 5); };
    const __m512i v4 = load_codes(p + 256);
    const __m512i tops = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x08), _mm512_srli_epi16(v3, 4),
                                                   _mm512_srli_epi16(v4, 3), kSelect);
    v[0] = v4;
    v[1] = _mm512_ternarylogic_epi32(low3, top(0), _mm512_srli_epi16(v3, 2), kSelect);
    v[2] = _mm512_ternarylogic_epi32(low3, top(1), _mm512_srli_epi16(v4, 2), kSelect);
    v[3] = _mm512_ternarylogic_epi32(low3, top(2), tops, kSelect);
  }
};

QC_INLINE __m512i biased(__m512i entries) { return _mm512_xor_si512(entries, _mm512_set1_epi8(char(0x80))); }
QC_INLINE __m512i repeat4(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
QC_INLINE __m512i repeat8(const int8_t* p) {
  int64_t word;
  std::memcpy(&word, p, 8);
  return _mm512_set1_epi64(word);
}
QC_INLINE __m512i repeat16(const int8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// The tables of 4-bit indices of pairs, 16 entries repeated. One column's 4 entries make those of a pair of 2-bit indices.
struct PairTables16 {
  __m512i x, y;

  QC_INLINE PairTables16(const int8_t* entries, int dim) {
    if (dim == 2) {
      x = biased(repeat16(entries));
      y = biased(repeat16(entries + 16));
    } else {
      const __m512i fours = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
      x = biased(repeat4(entries));
      y = _mm512_shuffle_epi8(x, fours);
    }
  }
};

}  // namespace
}  // namespace qc
#endif
