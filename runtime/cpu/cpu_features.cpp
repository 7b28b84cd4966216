#include "cpu_features.h"

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER) && !defined(__clang__)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qc {
namespace {

#if defined(__x86_64__) || defined(_M_X64)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
#if defined(_MSC_VER) && !defined(__clang__)
  int out[4];
  __cpuid(out, 0);
  if (uint32_t(out[0]) < leaf) return r;
  __cpuidex(out, int(leaf), int(subleaf));
  r.a = out[0], r.b = out[1], r.c = out[2], r.d = out[3];
#else
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

// The register files that the operating system saves; call only when OSXSAVE is set.
uint64_t xgetbv() {
#if defined(_MSC_VER) && !defined(__clang__)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
#endif
}

CpuFeatures detect() {
  CpuFeatures f;
  const auto bit = [](uint32_t value, int index) { return ((value >> index) & 1) != 0; };
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, seven.a >= 1 ? 1 : 0);
  if (!bit(one.c, 27)) return f;  // OSXSAVE
  const uint64_t saved = xgetbv();
  const bool ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6;
  if (!ymm || !bit(one.c, 28)) return f;
  f.fma = bit(one.c, 12);
  f.f16c = bit(one.c, 29);
  f.avx2 = bit(seven.b, 5);
  f.avxvnni = seven.a >= 1 && bit(seven_one.a, 4);
  if (!zmm) return f;
  f.avx512f = bit(seven.b, 16);
  f.avx512dq = bit(seven.b, 17);
  f.avx512bw = bit(seven.b, 30);
  f.avx512vl = bit(seven.b, 31);
  f.avx512vbmi = bit(seven.c, 1);
  f.avx512vnni = bit(seven.c, 11);
  return f;
}

#elif defined(__aarch64__) || defined(_M_ARM64)

#if defined(__linux__)

// Bits of the auxiliary vector, which older headers lack (arch/arm64/include/uapi/asm/hwcap.h).
constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13;

bool has_dotprod() { return (getauxval(AT_HWCAP) & kDotprod) != 0; }
bool has_i8mm() { return (getauxval(AT_HWCAP2) & kI8mm) != 0; }

#elif defined(__APPLE__)

bool has(const char* feature) {
  int present = 0;
  size_t size = sizeof present;
  return sysctlbyname(feature, &present, &size, nullptr, 0) == 0 && present == 1;
}

bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }

#else

bool has_dotprod() { return false; }
bool has_i8mm() { return false; }

#endif

CpuFeatures detect() {
  CpuFeatures f;
  f.neon = true;
  f.dotprod = has_dotprod();
  f.i8mm = has_i8mm();
  return f;
}

#else

CpuFeatures detect() { return {}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace qc
