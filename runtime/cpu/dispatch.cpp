#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "cpu_features.h"
#include "error.h"

namespace qc {
namespace {

// Everything the first use decides; fixed buffers, so that nothing here can throw.
struct Dispatch {
  const Kernels* available[6] = {};  // what one architecture has
  int count = 0;
  const Kernels* chosen = nullptr;
  char requested[32] = "";
  char names[96] = "";
  char features[160] = "";

  void add(const Kernels& kernels, bool executable) {
    if (!executable) return;
    available[count++] = &kernels;
    append(names, sizeof names, kernels.name);
  }

  static void append(char* list, size_t size, const char* name) {
    if (*list) std::strncat(list, ",", size - std::strlen(list) - 1);
    std::strncat(list, name, size - std::strlen(list) - 1);
  }

  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(available[i]->name, name) == 0) return available[i];
    }
    return nullptr;
  }

  Dispatch() {
    const CpuFeatures& cpu = cpu_features();
#if defined(QC_HAVE_X86_KERNELS)
    const bool avx2 = cpu.avx2 && cpu.fma && cpu.f16c;
    const bool avx512vnni = avx2 && cpu.avx512f && cpu.avx512bw && cpu.avx512vl && cpu.avx512dq && cpu.avx512vnni;
    add(kAvx512VbmiKernels, avx512vnni && cpu.avx512vbmi);
    add(kAvx512VnniKernels, avx512vnni);
    add(kAvxVnniKernels, avx2 && cpu.avxvnni);
    add(kAvx512VlKernels, avx2 && cpu.avx512f && cpu.avx512vl && cpu.avx512vnni);
    add(kAvx2Kernels, avx2);
#endif
#if defined(QC_HAVE_NEON_KERNELS)
    add(kNeonI8mmKernels, cpu.neon && cpu.dotprod && cpu.i8mm);
    add(kNeonDotprodKernels, cpu.neon && cpu.dotprod);
#endif
    add(kGenericKernels, true);

    const struct {
      bool present;
      const char* name;
    } table[] = {{cpu.avx2, "avx2"},             {cpu.fma, "fma"},           {cpu.f16c, "f16c"},
                 {cpu.avxvnni, "avxvnni"},       {cpu.avx512f, "avx512f"},   {cpu.avx512bw, "avx512bw"},
                 {cpu.avx512vl, "avx512vl"},     {cpu.avx512dq, "avx512dq"}, {cpu.avx512vnni, "avx512vnni"},
                 {cpu.avx512vbmi, "avx512vbmi"}, {cpu.neon, "neon"},         {cpu.dotprod, "dotprod"},
                 {cpu.i8mm, "i8mm"}};
    for (const auto& row : table) {
      if (row.present) append(features, sizeof features, row.name);
    }

    const char* environment = std::getenv("QCOMPILER_ISA");
    if (environment && *environment) {
      std::strncpy(requested, environment, sizeof requested - 1);
      chosen = find(environment);
    } else {
      chosen = available[0];
    }
  }
};

const Dispatch& dispatch() {
  static const Dispatch instance;
  return instance;
}

}  // namespace

const Kernels* select_kernels(const char* name) {
  const Dispatch& d = dispatch();
  const Kernels* kernels = name ? d.find(name) : d.chosen;
  if (!kernels && name) {
    fail(kUnavailable, "context.isa is \"%.32s\", expected one that this CPU executes: %s", name, d.names);
  } else if (!kernels) {
    fail(kUnavailable, "environment variable QCOMPILER_ISA is \"%s\", expected one that this CPU executes: %s",
         d.requested, d.names);
  }
  return kernels;
}

const char* isa_names() { return dispatch().names; }
const char* default_isa() { return dispatch().chosen ? dispatch().chosen->name : ""; }
const char* feature_names() { return dispatch().features; }

}  // namespace qc
