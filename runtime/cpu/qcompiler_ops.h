// The C interface of the op library: what ctypes (torch, numpy) calls, and what the ONNX Runtime face wraps.
//
// Every weight tensor is read exactly as it lies in the artifact (layout W16x4, see docs/layout.md); nothing is
// repacked. Pointers need the alignment of the type that they point to, and no more. All functions are thread-safe. A function
// that can fail returns 0 on success, otherwise a non-zero code, and qc_last_error() of the same thread then says what was found
// and what was expected.
#ifndef QCOMPILER_OPS_H
#define QCOMPILER_OPS_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define QC_EXPORT __declspec(dllexport)
#else
#define QC_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Bumped when a signature or a struct below changes; the Python side refuses any other.
#define QC_ABI_VERSION 5
// The packed layout that these kernels read; carried by every op as attribute `layout_version`.
#define QC_LAYOUT_VERSION 1

// What the activations become before they meet the weights.
enum qc_activation {
  QC_ACT_FLOAT = 0,       // stay fp32
  QC_ACT_INT8_TOKEN = 1,  // symmetric int8, one fp32 scale a row (token):   absmax / 127, round half to even
  QC_ACT_INT8_BLOCK = 2,  // the same, one scale per 128 consecutive inputs of a row (the last block may be short)
  QC_ACT_INT8_STATIC = 3  // int8 with a scale and a zero point that are given, see qc_activation_range
};

// The range of static int8 activations: a = clamp(round_half_even(x / scale) + Z), x ~ scale * (a - Z).
//   scale   finite and above 0
//   zero    Z, and a in [-128, 127]; null: Z = 0 and a in [-127, 127]
//   offset  [n], -scale * Z * sum over k of W[n, k]: what the product with a instead of a - Z is off by. Given where
//           zero is, null where it is null.
typedef struct qc_activation_range {
  float scale;
  const int8_t* zero;
  const float* offset;
} qc_activation_range;

// Columns of x that stay in float beside a packed product.
//   columns  [count], ascending, each once, in [0, k)
//   weights  fp16, [tiles, count, 16]: 16 rows of a tile side by side, like the scales of a packed weight
typedef struct qc_outliers {
  int64_t count;
  const int32_t* columns;
  const uint16_t* weights;
} qc_outliers;

// The activation of a gated product, see qc_linear_edges.
enum qc_gate {
  QC_GATE_NONE = 0,
  QC_GATE_SILU = 1,
  QC_GATE_GELU_TANH = 2,
  QC_GATE_GELU = 3  // with erf
};

// What a linear op does besides its product P = x . W^T (+ bias). All zeros: nothing.
//   norm      [k], null: none. The product is taken of RMSNorm(x) = x * (1 / sqrt(mean(x^2) + epsilon)) * norm.
//   epsilon   finite and at least 0; 0 without norm
//   residual  of the shape of y, which it must not overlap; null: none. Added at the very end.
//   gate      a qc_gate. With one, W has n = 2h rows, h a multiple of 16, and y has h columns:
//             y[:, j] = activation(P[:, j]) * P[:, h + j]
typedef struct qc_linear_edges {
  const float* norm;
  float epsilon;
  const float* residual;
  int32_t gate;
} qc_linear_edges;

// A packed affine weight matrix W[n, k], W = S * (q - Z).
//   bits      8, 4, 3, 2
//   group     columns that share a scale: 32, 64, 128, or 0 = the whole row. The last group may be short.
//   codes     uint8, units of W16x4. 8 bits: signed bytes. Fewer bits: unsigned codes 0 .. 2^bits - 1.
//   scales    fp16, [tiles, groups, 16]: 16 rows of a tile side by side; rows beyond n hold 0.
//   zeros     null when symmetric (then Z = 0 for 8 bits, 2^(bits-1) otherwise); else b-bit integers, [tiles, groups,
//             2*bits bytes]: row r of the tile at bit offset bits*r, least significant bit first (8 bits: signed bytes).
typedef struct qc_weight {
  int64_t n, k;
  int32_t bits, group;
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;
} qc_weight;

// A packed vector-quantized matrix: W[r, k] = (S * c) * C[index][j], the vector of `dim` columns at distance 4 (docs/layout.md).
//   dim, centroids   1: 4, 8, 16; 2: 16, 32, 64, 256; 4: 256
//   block_rows       rows that share a codebook: a multiple of 16, or 0 = all. The last block may be short.
//   block_columns    columns that share a codebook: a multiple of 128, or 0 = all
//   group            columns that share a scale S: 32, 64, 128, or 0 = the whole row
//   codes            uint8, [tiles, units, unit bytes]: packed indices
//   codebooks        int8, [blocks down, blocks across, dim, centroids]: a table for each dimension of the vectors
//   codebook_scales  fp16, [blocks down, blocks across]: c
//   scales           fp16, [tiles, groups, 16]: S, as in qc_weight
typedef struct qc_vq_weight {
  int64_t n, k;
  int32_t dim, centroids, block_rows, block_columns, group;
  const uint8_t* codes;
  const int8_t* codebooks;
  const uint16_t* codebook_scales;
  const uint16_t* scales;
} qc_vq_weight;

// Runs body(user, i) for every i in [0, count), in any order and possibly at once; returns when all are done.
typedef void (*qc_parallel_for)(void* pool, void (*body)(void* user, size_t index), size_t count, void* user);

// Where work runs. parallel_for == null: on the calling thread. threads is a hint for cutting the work (>= 1).
// isa == null: the one chosen at load (best of the CPU, or environment variable QCOMPILER_ISA).
typedef struct qc_context {
  qc_parallel_for parallel_for;
  void* pool;
  int32_t threads;
  const char* isa;
} qc_context;

QC_EXPORT int32_t qc_abi_version(void);
QC_EXPORT int32_t qc_layout_version(void);
QC_EXPORT const char* qc_last_error(void);
// Comma-separated: the CPU's features that matter here ("avx2,avx512f,avx512vnni,..."); the ISAs compiled in and
// executable on this CPU, best first ("avx512vbmi,avx512vnni,avx512vl,avx2,generic"); and the one in use.
QC_EXPORT const char* qc_cpu_features(void);
QC_EXPORT const char* qc_isas(void);
QC_EXPORT const char* qc_isa(void);

// Bytes of each tensor of a weight matrix in this layout; 0 when the description is invalid.
QC_EXPORT int64_t qc_codes_bytes(int64_t n, int64_t k, int32_t bits);
QC_EXPORT int64_t qc_scales_count(int64_t n, int64_t k, int32_t group);
QC_EXPORT int64_t qc_zeros_bytes(int64_t n, int64_t k, int32_t bits, int32_t group);

// The same for a vector-quantized matrix, and the number of its codebooks, which is that of codebook_scales.
QC_EXPORT int64_t qc_vq_codes_bytes(int64_t n, int64_t k, int32_t dim, int32_t centroids);
QC_EXPORT int64_t qc_vq_codebook_count(int64_t n, int64_t k, int32_t block_rows, int32_t block_columns);
QC_EXPORT int64_t qc_vq_codebooks_bytes(int64_t n, int64_t k, int32_t dim, int32_t centroids, int32_t block_rows,
                                        int32_t block_columns);

// y[rows, n] = x[rows, k] . W^T (+ bias[n]); x, y, bias fp32, row-major, contiguous; bias may be null.
// Bit-equal for every ISA, every number of threads and every number of rows (a row's result never depends on the
// others). Order of operations per output: docs/layout.md, "Arithmetic". `range` is that of static int8 activations, and
// null with any other. With `edges` (null: none) y[rows, n or n / 2] is what they make of this product.
QC_EXPORT int32_t qc_linear_nbit(const qc_context* context, const qc_weight* weight, int32_t activation,
                                 const qc_activation_range* range, const qc_linear_edges* edges, int64_t rows,
                                 const float* x, const float* bias, float* y);

// y = qc_linear_nbit of x with the outlier columns set to 0, + x[:, columns] . outliers^T.
QC_EXPORT int32_t qc_linear_mixed(const qc_context* context, const qc_weight* weight, int32_t activation,
                                  const qc_activation_range* range, const qc_outliers* outliers, int64_t rows,
                                  const float* x, const float* bias, float* y);

// y[rows, n]: row i of x[rows, k] times the matrix of expert[i] (+ bias[expert[i], n]). `weight` describes one matrix; `experts`
// of them lie one after another in each of its tensors, every one padded to its own tiles. An index outside [0, experts) is
// an error. Every row is what qc_linear_nbit gives with its expert's matrix, bit for bit.
QC_EXPORT int32_t qc_linear_experts_nbit(const qc_context* context, const qc_weight* weight, int64_t experts,
                                         int32_t activation, int64_t rows, const float* x, const int64_t* expert,
                                         const float* bias, float* y);

// y[count, k] = W[indices]: rows decoded to fp32. An index outside [0, n) is an error.
QC_EXPORT int32_t qc_embedding_nbit(const qc_context* context, const qc_weight* weight, int64_t count,
                                    const int64_t* indices, float* y);

// The same two with a vector-quantized matrix. `activation` is QC_ACT_FLOAT or QC_ACT_INT8_BLOCK.
QC_EXPORT int32_t qc_linear_vq(const qc_context* context, const qc_vq_weight* weight, int32_t activation,
                               const qc_linear_edges* edges, int64_t rows, const float* x, const float* bias, float* y);
QC_EXPORT int32_t qc_embedding_vq(const qc_context* context, const qc_vq_weight* weight, int64_t count,
                                  const int64_t* indices, float* y);

// One call of attention over a key/value cache: `rows` new positions of one sequence behind `past` filled ones. Rotates q and k, puts
// k and v into the cache, and gives y[r] = softmax(scale * q[r] . K^T + bias[r]) . V over the positions that row r sees: those up to its
// own, of which with a window the last `window`. docs/layout.md, "Attention".
//   heads, kv_heads   of q, and of k and v: the first a multiple of the second; query head h reads kv head h / (heads / kv_heads)
//   rotary            leading columns of a head that are rotated, even; 0: none. interleaved: pairs are neighbours, not halves
//   window            0: none
//   q, k, v           [rows, heads or kv_heads, head_size], rows *_stride floats apart (they may be parts of one packed tensor)
//   past_*            [kv_heads, past_capacity, head_size], not read where past is 0
//   present_*         [kv_heads, capacity, head_size]: the past itself, or elsewhere; then the filled part is copied
//   cosines, sines    [rotary_rows, rotary / 2], read at positions[r], or where that is null at past + r
//   bias              null: none; of head h and row r at bias + h * bias_head_stride + r * bias_row_stride: [past + rows]
//   y                 [rows, heads, head_size], which must not overlap the others
typedef struct qc_attention_call {
  int32_t heads, kv_heads, head_size, rotary, interleaved, window;
  float scale;
  int64_t rows, past;
  const float *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
  const float *past_key, *past_value;
  int64_t past_capacity;
  float *present_key, *present_value;
  int64_t capacity;
  const float *cosines, *sines;
  int64_t rotary_rows;
  const int64_t* positions;
  const float* bias;
  int64_t bias_head_stride, bias_row_stride;
  float* y;
} qc_attention_call;

// Bit-equal for every ISA, every number of threads and every cut of the rows into calls.
QC_EXPORT int32_t qc_attention(const qc_context* context, const qc_attention_call* call);

// The library's own thread pool, for callers that have none (ctypes from torch and numpy).
QC_EXPORT void qc_pool_parallel_for(void* pool, void (*body)(void* user, size_t index), size_t count, void* user);
QC_EXPORT void qc_pool_set_threads(int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
