// What the CPU and the operating system allow. Compiled without ISA flags.
#ifndef QCOMPILER_CPU_FEATURES_H
#define QCOMPILER_CPU_FEATURES_H

namespace qc {

struct CpuFeatures {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false;
  bool avx512vnni = false, avx512vbmi = false, avxvnni = false;
  bool neon = false, dotprod = false, i8mm = false;
};

const CpuFeatures& cpu_features();

}  // namespace qc
#endif
