// The functions of this folder.
#ifndef QCOMPILER_AVX512_ISA_H
#define QCOMPILER_AVX512_ISA_H

#include "../panel.h"

// Between a lambda's parameters and its body: the kernels rely on everything meeting in one function's registers.
#define QC_LAMBDA_INLINE __attribute__((always_inline))

namespace qc {
namespace avx512 {

extern const int kInt8BlockRows[];
extern const int kFloatBlockRows[];
extern const int kPanelRows[];
constexpr int64_t kPanelLeastRows = 16;  // from there on no format is slower (measured)
bool quantize_row(const float* x, int64_t k, int64_t block, int64_t segment, const ActivationRange* range, int8_t* a,
                  float* sa, int32_t* sums);
void linear_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
void linear_float(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
void vq_float(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
void keep(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out);
void keep_vq(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out);
void keep_scales(const LinearJob& job, int64_t tile, const PanelTile& out);
void multiply_panel(const LinearJob& job, const Panel& panel, int64_t tile, int64_t tiles, int64_t block_begin,
                    int64_t block_end);
void add_outliers(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t row_begin, int64_t row_end);

}  // namespace avx512
}  // namespace qc
#endif
