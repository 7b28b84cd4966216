// The attributes and tensors of a vector-quantized matrix, checked like those of an affine one (arguments.h).
#ifndef QCOMPILER_ORT_VQ_WEIGHT_H
#define QCOMPILER_ORT_VQ_WEIGHT_H

#include "arguments.h"

namespace qc::ort {

class VqWeight {
 public:
  // Input 1 is codes; codebooks, codebook_scales and scales follow it.
  VqWeight(const Api& api, const OrtKernelInfo* info);

  qc_vq_weight resolve(const Api& api, const OrtKernelContext* context) const;

  int64_t n() const { return description_.n; }
  int64_t k() const { return description_.k; }

 private:
  enum Part { kCodes, kCodebooks, kCodebookScales, kScales, kParts };

  Shape expected_shape(Part part) const;
  const void* checked(Part part, const Tensor& found) const;

  qc_vq_weight description_{};
  const void* constant_[kParts] = {};
  AlignedCopies copies_;
};

}  // namespace qc::ort

#endif
