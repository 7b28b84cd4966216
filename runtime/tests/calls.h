// A generated case as a call of the library, wherever its arrays lie.
#ifndef QCOMPILER_TESTS_CALLS_H
#define QCOMPILER_TESTS_CALLS_H

#include "cases.h"

// The arrays of a case; null for an empty one.
struct Arrays {
  const uint8_t *codes, *zeros;
  const uint16_t *scales, *codebook_scales, *outliers;
  const int8_t *codebooks, *range_zero;
  const int32_t* columns;
  const int64_t* indices;
  const float *x, *bias, *range_offset, *norm, *residual;

  // Those of the case itself.
  static Arrays of(const Case& c);
};

// The linear op of a case into y [rows][columns_of_y], or the embedding of its matrix into y [indices][k]. Returns the library's code.
int32_t call(const Case& c, const Arrays& arrays, const qc_context& context, bool embedding, float* y);

// What `y` of such a call holds.
int64_t values_of(const Case& c, bool embedding);

// qc_isas, one by one.
std::vector<std::string> isas();

#endif
