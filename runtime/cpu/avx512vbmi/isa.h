// The functions of this folder; all others are those of avx512/.
#ifndef QCOMPILER_AVX512VBMI_ISA_H
#define QCOMPILER_AVX512VBMI_ISA_H

#include "../panel.h"

namespace qc {
namespace avx512vbmi {

void vq_int8(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);
void keep_vq(const LinearJob& job, int64_t tile, int64_t block, const PanelTile& out);
void vq_float(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end);

}  // namespace avx512vbmi
}  // namespace qc
#endif
