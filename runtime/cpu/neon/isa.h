// The functions of this folder: those that need no more than the base architecture, and in dotprod/ and i8mm/ those that do.
#ifndef QCOMPILER_NEON_ISA_H
#define QCOMPILER_NEON_ISA_H

#include "../kernels.h"

// Between a lambda's parameters and its body: the kernels rely on everything meeting in one function's registers.
#define QC_LAMBDA_INLINE __attribute__((always_inline))

namespace qc {
namespace neon {

extern const int kFloatBlockRows[];
bool quantize_row(const float* x, int64_t k, int64_t block, int64_t segment, const ActivationRange* range, int8_t* a,
                  float* sa, int32_t* sums);
void linear_float(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
void vq_float(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
void add_outliers(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t row_begin, int64_t row_end);

namespace dotprod {
extern const int kInt8BlockRows[];
void linear_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
}  // namespace dotprod

namespace i8mm {
void linear_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
}  // namespace i8mm

}  // namespace neon
}  // namespace qc
#endif
