// What a linear op does to the rows before and to the pieces after its product (qc_linear_edges).
#ifndef QCOMPILER_EDGES_H
#define QCOMPILER_EDGES_H

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "layout.h"
#include "qcompiler_ops.h"
#include "scratch.h"

namespace qc {

// The rows that become activations: those of x, or with a norm a normalized copy of one at a time.
struct InputRows {
  const EdgeFunctions& functions;
  const qc_linear_edges& edges;
  int64_t k;
  const float* x;
  float* copies;  // [pieces][k]

  const float* operator()(int64_t index, int64_t piece) const {
    const float* row = x + index * k;
    if (!edges.norm) return row;
    float* copy = copies + piece * k;
    functions.normalize(row, edges.norm, edges.epsilon, k, copy);
    return copy;
  }
};

// Gate and residual, applied to each piece of y right after its product, where its values still lie in the cache.
struct OutputEdges {
  const EdgeFunctions& functions;
  const qc_linear_edges& edges;

  // Tiles to cut into pieces, and the bytes of weights behind each: with a gate, one of either half.
  int64_t tiles(const Matrix& w) const { return edges.gate ? w.tiles / 2 : w.tiles; }
  int64_t tile_bytes(const Matrix& w) const { return edges.gate ? 2 * w.tile_bytes : w.tile_bytes; }

  // A piece of y; `product` is that of a job's tiles and row blocks. False when memory ran out.
  template <class Product>
  bool compute(const LinearJob& job, int64_t tile, int64_t tile_end, int64_t block, int64_t block_end,
               Product&& product) const {
    product(job, tile, tile_end, block, block_end);
    if (!edges.gate && !edges.residual) return true;
    const int64_t row = block * job.block_rows, row_end = std::min(block_end * job.block_rows, job.rows);
    const int64_t first = tile * kTileRows, count = std::min(tile_end * kTileRows, job.y_stride) - first;
    if (edges.gate) {
      const ScratchLease lease(size_t((row_end - row) * count) * sizeof(float));
      if (!lease.data()) return false;
      float* other = reinterpret_cast<float*>(lease.data());
      // The second half of the columns, to the scratch, which holds this piece alone.
      const int64_t half = tiles(job.weight);
      LinearJob second = job;
      second.y_stride = count;
      second.y = other - (row * count + half * kTileRows + first);
      product(second, tile + half, tile_end + half, block, block_end);
      for (int64_t r = row; r < row_end; ++r) {
        functions.gate(edges.gate, other + (r - row) * count, count, job.y + r * job.y_stride + first);
      }
    }
    if (edges.residual) {
      for (int64_t r = row; r < row_end; ++r) {
        const int64_t at = r * job.y_stride + first;
        functions.add(edges.residual + at, count, job.y + at);
      }
    }
    return true;
  }
};

}  // namespace qc
#endif
