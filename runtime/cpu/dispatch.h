// Which kernels run: the table of what is compiled in and executable here, and the choice among it.
#ifndef QCOMPILER_DISPATCH_H
#define QCOMPILER_DISPATCH_H

#include "kernels.h"

namespace qc {

// The kernels of ISA `name`; null: the default one (best of this CPU, or environment variable QCOMPILER_ISA, read once).
// Returns null, with the reason as last error, where the name is unknown or this CPU cannot execute it.
const Kernels* select_kernels(const char* name);

const char* isa_names();      // comma-separated, best first
const char* default_isa();    // "" when QCOMPILER_ISA names none of isa_names()
const char* feature_names();  // comma-separated

}  // namespace qc
#endif
