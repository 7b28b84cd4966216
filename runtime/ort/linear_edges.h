// The attributes gate and epsilon and the inputs residual and norm of a linear op (qc_linear_edges), checked like its weight.
#ifndef QCOMPILER_ORT_LINEAR_EDGES_H
#define QCOMPILER_ORT_LINEAR_EDGES_H

#include "arguments.h"

namespace qc::ort {

class LinearEdges {
 public:
  // `first` is the input index of residual; norm follows it. The weight is n x k.
  LinearEdges(const Api& api, const OrtKernelInfo* info, size_t first, int64_t n, int64_t k);

  // Columns of the output.
  int64_t columns() const { return gate_ ? n_ / 2 : n_; }

  // `shape` is that of the output.
  qc_linear_edges resolve(const Api& api, const OrtKernelContext* context, const Shape& shape) const;

 private:
  const float* checked_norm(const Tensor& found) const;

  int64_t n_, k_;
  size_t first_;
  int32_t gate_;
  float epsilon_;
  const float* constant_norm_ = nullptr;
  AlignedCopies copies_;
};

}  // namespace qc::ort

#endif
