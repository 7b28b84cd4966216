// Generated calls of the library: every form that a kernel has, with shapes and values at random. The same seed gives the same
// calls on every machine.
#ifndef QCOMPILER_TESTS_CASES_H
#define QCOMPILER_TESTS_CASES_H

#include <cstdint>
#include <string>
#include <vector>

#include "qcompiler_ops.h"

// xorshift64*.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) { bits(), bits(); }
  uint64_t bits() {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }
  int64_t below(int64_t end) { return int64_t((bits() >> 33) % uint64_t(end)); }
  int64_t from(int64_t first, int64_t last) { return first + below(last - first + 1); }
  bool one_in(int64_t count) { return below(count) == 0; }
  float unit() { return float(int32_t(bits() >> 40) - (1 << 23)) * 1.1920928955078125e-07f; }  // [-1, 1)

 private:
  uint64_t state_;
};

// What is called, and with what kind of weight and activations: for each of these there is a kernel in every ISA.
struct Form {
  enum Op { kLinear, kMixed, kExperts, kVq } op;
  int32_t activation, group;
  int32_t bits;  // affine
  bool asymmetric;
  int32_t dim, centroids, block_rows, block_columns;  // kVq

  std::string name() const;
  std::string op_name() const;  // the op and whether its activations are "float" or "int8"
};

std::vector<Form> all_forms();

// The arguments of one call. Codes and zero points are any bytes: every one of them means something.
struct Case {
  Form form;
  int64_t n, k, rows, experts = 1;
  int32_t threads = 1;
  std::vector<uint8_t> codes, zeros;
  std::vector<uint16_t> scales, codebook_scales, outliers;
  std::vector<int8_t> codebooks, range_zero;
  std::vector<int32_t> columns;
  std::vector<int64_t> indices;  // experts of the rows; rows of the matrix for the embedding
  std::vector<float> x, bias, range_offset, norm, residual;
  float range_scale = 0, epsilon = 0;
  int32_t gate = QC_GATE_NONE;

  bool has_edges() const { return !norm.empty() || !residual.empty() || gate != QC_GATE_NONE; }
  int64_t columns_of_y() const { return gate == QC_GATE_NONE ? n : n / 2; }
  std::string name() const;
};

Case make_case(const Form& form, int64_t n, int64_t k, int64_t rows, Random& random);
// The rows of the i-th call of a form: few, in turn, and now and then many.
int64_t some_rows(int64_t i, Random& random);
// The shape at random too but for the rows; now and then with edges (qc_linear_edges), where the op has them.
Case random_case(const Form& form, int64_t rows, Random& random);
// The longest rows, all of whose values are of the largest magnitude, and matrices large enough to be cut into pieces.
std::vector<Case> special_cases(Random& random);

#endif
