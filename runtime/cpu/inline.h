// For functions that a kernel relies on meeting in one function's registers.
#ifndef QCOMPILER_INLINE_H
#define QCOMPILER_INLINE_H

#define QC_INLINE inline __attribute__((always_inline))

#endif
