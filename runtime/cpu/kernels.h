// What an instruction set provides, and what the driver (linear.cpp) hands it.
#ifndef QCOMPILER_KERNELS_H
#define QCOMPILER_KERNELS_H

#include <cstdint>

namespace qc {

// What a vector-quantized matrix has beside its indices; see qc_vq_weight.
struct Codebooks {
  int32_t dim, centroids;
  int64_t block_rows, block_columns;  // never 0: all of the matrix is said in rows and columns
  int64_t across;
  const int8_t* entries;   // [down][across][dim][centroids]
  const uint16_t* scales;  // fp16 [down][across]
};

// A validated weight matrix; see qc_weight. A vector-quantized one has 8 bits (those of its codebooks' entries) and no zeros.
struct Matrix {
  int64_t n, k;
  int32_t bits, group;
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;  // null: symmetric
  int64_t tiles, groups, tile_bytes;
  const Codebooks* codebooks;  // null: codes are levels, and no indices
};

// Static int8 activations: a = clamp(round_half_even(x / scale) + zero, low, high).
struct ActivationRange {
  float scale;
  int32_t zero, low, high;
};

// One linear op on prepared activations. The row dimension is cut into blocks of `block_rows` rows (R below), padded
// with zero rows; inside a block the rows lie side by side, so that a kernel reads its activations in one stream:
//   int8   x[block][k / 4][R][4]   float  x[block][k][R]      k rounded up to 32 (codebooks: 64) with zero activations
// A segment (docs/layout.md) is `segment` columns, the last one may be short; every segment has one activation scale a
// row, sa[block][segment][R]. All its values of a row with a non-finite activation are NaN, and nothing else is.
struct LinearJob {
  Matrix weight;
  int64_t rows, block_rows, x_block_bytes;
  int64_t segment, segments;
  int64_t groups_per_segment;  // 1, or 0 when all segments share the row's only scale
  const void* x;
  const float* sa;       // int8 only
  const int32_t* sums;   // int8 only, [block][segment][R]: sum of a; symmetric: -(zero point, biased) * sum of a
  const float* offset;   // [n], may be null: added before the bias
  const float* bias;     // may be null
  float* y;             // [rows][y_stride], weight.n of a row written
  int64_t y_stride;
  bool full_range;       // int8 only: an activation may be -128; otherwise they lie in [-127, 127]
  // Columns in float beside the packed product (none: outlier_count = 0).
  int64_t outlier_count;
  const uint16_t* outliers;  // fp16 [tiles][outlier_count][16]
  const float* outlier_x;    // [rows][outlier_count]
};

// Computes the outputs of tiles [tile_begin, tile_end) for row blocks [block_begin, block_end), block by block: the tiles
// of a piece are few enough to stay in the cache meanwhile.
using LinearFunction = void (*)(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin,
                                int64_t block_end);

// Quantizes one row to int8: a[k], one scale per `block` columns in sa[ceil(k / block)], and the sum of a over every
// `segment` columns in sums. False when an activation is not finite (a, sa and sums are then unspecified but in bounds).
// With a `range` (else null) nothing is measured: its scale and zero point hold for all columns.
using QuantizeFunction = bool (*)(const float* x, int64_t k, int64_t block, int64_t segment,
                                  const ActivationRange* range, int8_t* a, float* sa, int32_t* sums);

// y += outlier_x . outliers^T for tiles and rows whose outputs are there: column by column, product and sum each rounded.
using OutlierFunction = void (*)(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t row_begin,
                                 int64_t row_end);

// What stands before and after a product (qc_linear_edges), a row at a time; the same bits from every instruction set.
struct EdgeFunctions {
  // out = x * (1 / root mean square) * norm
  void (*normalize)(const float* x, const float* norm, float epsilon, int64_t k, float* out);
  // y = activation(y) * other
  void (*gate)(int32_t activation, const float* other, int64_t count, float* y);
  void (*add)(const float* residual, int64_t count, float* y);
};
extern const EdgeFunctions kGenericEdges;
#if defined(QC_HAVE_X86_KERNELS)
extern const EdgeFunctions kAvx2Edges;
extern const EdgeFunctions kAvx512Edges;
#endif

struct PanelFunctions;

// See attention.h.
struct AttentionFunctions;
extern const AttentionFunctions kGenericAttention;
#if defined(QC_HAVE_X86_KERNELS)
extern const AttentionFunctions kAvx2Attention;
extern const AttentionFunctions kAvx512Attention;
#endif

struct Kernels {
  const char* name;
  // Rows a block may have, ascending, ended by 0.
  const int* int8_block_rows;
  const int* float_block_rows;
  QuantizeFunction quantize_row;
  LinearFunction linear_int8;
  LinearFunction linear_float;
  // The same for matrices with codebooks.
  LinearFunction vq_int8;
  LinearFunction vq_float;
  OutlierFunction add_outliers;
  const EdgeFunctions* edges = &kGenericEdges;
  const AttentionFunctions* attention = &kGenericAttention;
  // Integer activations of many rows (panel.h); null: no other way than for few.
  const PanelFunctions* panel = nullptr;
};

namespace generic {
void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
void vq_float(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
}  // namespace generic

extern const Kernels kGenericKernels;
#if defined(QC_HAVE_X86_KERNELS)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512VlKernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512VbmiKernels;
#endif
#if defined(QC_HAVE_NEON_KERNELS)
extern const Kernels kNeonDotprodKernels;
extern const Kernels kNeonI8mmKernels;
#endif

}  // namespace qc
#endif
