// How the kernels of vector-quantized matrices walk a tile, for integer and float products alike.
// Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_NEON_VQ_WALK_H
#define QCOMPILER_NEON_VQ_WALK_H

#include "vq_decoders.h"

namespace qc {
namespace {

// Walks one tile's segments from left to right. For each: start(), then add(j, v, chunk) with the entries v of columns
// 32 chunk + 4j and on for quads first .. first + Q - 1, then end(s, factors S * c of these quads).
template <class Decoder, int Q, class Start, class Add, class End>
QC_INLINE void each_segment(const LinearJob& job, const VqCodes<Decoder::kBits>& codes, int64_t tile, int first,
                            Start&& start, Add&& add, End&& end) {
  const Matrix& w = job.weight;
  const Codebooks& books = *w.codebooks;
  const int64_t first_book = tile * kTileRows / books.block_rows * books.across;
  const int8_t* entries = books.entries + first_book * books.dim * books.centroids;
  const uint16_t* book_scale = books.scales + first_book;
  const uint16_t* scales = w.scales + tile * w.groups * kTileRows;
  const int64_t chunks = ceil_div(w.k, kChunk), per_segment = job.segment / kChunk;
  const int64_t segments_per_book = books.block_columns / job.segment;

  int64_t chunk = 0;
  for (int64_t s = 0; s < job.segments; entries += books.dim * books.centroids, ++book_scale) {
    const Decoder decoder(entries, books.dim);
    const float32x4_t shared = vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(*book_scale)));
    const int64_t book_end = s + segments_per_book < job.segments ? s + segments_per_book : job.segments;
    for (; s < book_end; ++s) {
      start();
      const int64_t last = chunk + per_segment < chunks ? chunk + per_segment : chunks;
      for (; chunk < last; ++chunk) {
        decoder.template each<Q>(codes.chunk(chunk) + 16 * first, chunk % 2 != 0,
                                 [&](auto j, const Quads<Q>& v) QC_LAMBDA_INLINE { add(j, v, chunk); });
      }
      float32x4_t factors[Q];
      for (int q = 0; q < Q; ++q) factors[q] = vmulq_f32(load_scales(scales, first + q), shared);
      end(s, factors);
      scales += job.groups_per_segment * kTileRows;
    }
  }
}

}  // namespace
}  // namespace qc
#endif
