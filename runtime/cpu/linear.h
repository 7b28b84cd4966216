// Drivers of the two ops on validated arguments.
#ifndef QCOMPILER_LINEAR_H
#define QCOMPILER_LINEAR_H

#include "kernels.h"
#include "qcompiler_ops.h"

namespace qc {

// Where pieces of work run; a null parallel_for means the calling thread.
struct Workers {
  qc_parallel_for parallel_for;
  void* pool;
  int threads;

  // body(i) for i in [0, count). The body must not throw.
  template <class Body>
  void run(int64_t count, Body&& body) const {
    if (count <= 1 || threads <= 1 || !parallel_for) {
      for (int64_t i = 0; i < count; ++i) body(i);
    } else {
      parallel_for(pool, [](void* user, size_t i) { (*static_cast<Body*>(user))(int64_t(i)); }, size_t(count), &body);
    }
  }
};

// Columns of y: half of the rows of a gated weight.
inline int64_t output_columns(const Matrix& weight, const qc_linear_edges& edges) {
  return edges.gate ? weight.n / 2 : weight.n;
}

// What a linear op may have besides a weight, activations and a bias.
struct LinearExtras {
  const ActivationRange* range = nullptr;  // of static int8 activations
  const float* offset = nullptr;           // [n], added before the bias
  qc_outliers outliers{};                  // count 0: none
  qc_linear_edges edges{};                 // null and 0: none
};

// False when memory ran out.
bool run_linear(const Kernels& kernels, const Workers& workers, const Matrix& weight, qc_activation activation,
                int64_t rows, const float* x, const float* bias, float* y, const LinearExtras& extras = {});

// Whether run_linear would cut this into no pieces: a small matrix, few products.
bool stays_on_caller(const Matrix& weight, int64_t rows);

// y[i] = W[expert[i]] . x[i] (+ bias[expert[i]]): `first` of `experts` matrices that lie one after another; every index is
// within [0, experts). False when memory ran out.
bool run_experts(const Kernels& kernels, const Workers& workers, const Matrix& first, int64_t experts,
                 qc_activation activation, int64_t rows, const float* x, const int64_t* expert, const float* bias,
                 float* y);

// Rows of an affine or of a vector-quantized matrix.
void run_embedding(const Workers& workers, const Matrix& weight, int64_t count, const int64_t* indices, float* y);

}  // namespace qc
#endif
