// The functions of this folder: 256-bit vectors with vpdpbusd. The same kernels are compiled twice, as avxvnni/ with the VEX
// encoding (CPUs with AVX-VNNI and no AVX-512) and as avx512vl/ with the EVEX encoding. All else is that of avx2/.
#ifndef QCOMPILER_AVX2VNNI_ISA_H
#define QCOMPILER_AVX2VNNI_ISA_H

#include "../panel.h"

namespace qc {

namespace avxvnni {
extern const int kInt8BlockRows[];
extern const PanelFunctions kPanel;
void keep(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out);
void keep_vq(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out);
void linear_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
}  // namespace avxvnni

namespace avx512vl {
extern const int kInt8BlockRows[];
extern const PanelFunctions kPanel;
void keep(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out);
void keep_vq(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out);
void linear_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
}  // namespace avx512vl

}  // namespace qc
#endif
