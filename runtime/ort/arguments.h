// A node's attributes and weight tensors: read, checked, and reported in words when they do not fit.
#ifndef QCOMPILER_ORT_ARGUMENTS_H
#define QCOMPILER_ORT_ARGUMENTS_H

#include <memory>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "qcompiler_ops.h"

namespace qc::ort {

using Shape = std::vector<int64_t>;

struct Tensor {
  int type = kUndefined;
  Shape shape;
  void* data = nullptr;
};

// Tensors at addresses that their types may have. A small initializer lies inside the model's own bytes wherever those put it: it is
// copied, and the copy lives as long as this does. What lies in a mapped file is aligned and stays where it is.
class AlignedCopies {
 public:
  Tensor of(const Tensor& found);

 private:
  std::vector<std::unique_ptr<unsigned char[]>> held_;
};

// An input as messages name it.
struct InputName {
  size_t index;
  const char* name;
};

int64_t int_attribute(const Api& api, const OrtKernelInfo* info, const char* name);

// The same where a node may leave it out; throws where it has another type.
int64_t int_attribute(const Api& api, const OrtKernelInfo* info, const char* name, int64_t fallback);
float float_attribute(const Api& api, const OrtKernelInfo* info, const char* name, float fallback);

// Throws unless the node's attribute `layout_version` is the layout that this library reads.
void check_layout(const Api& api, const OrtKernelInfo* info);

// The attributes n, k and group of a weight matrix, within what the kernels take.
struct MatrixShape {
  int64_t n, k;
  int32_t group;
};
MatrixShape matrix_shape(const Api& api, const OrtKernelInfo* info);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tensor tensor(const Api& api, const OrtValue* value);

// The input as a constant initializer, null where it is none.
const OrtValue* constant_input(const Api& api, const OrtKernelInfo* info, size_t index);

// The node's input, or null where it is left out.
const OrtValue* find_input(const Api& api, const OrtKernelContext* context, size_t index);
Tensor required_input(const Api& api, const OrtKernelContext* context, InputName input);

std::string text(const Shape& shape);
// "input 1 (codes)".
std::string name_text(const InputName& input);

// Throws unless the input is of this type and shape; `because` ends the message.
void expect(const InputName& input, const Tensor& found, int type, const Shape& shape, const std::string& because);

// "LinearNBit node '/model/layers.0/mlp/up_proj'".
std::string node_text(const Api& api, const OrtKernelInfo* info, const char* op);

// The tensors of a packed weight matrix. Those that are constant initializers are checked once, at session creation,
// and their pointer is kept: it lies in the mapped file. Any other is checked on each call.
class Weight {
 public:
  // `first` is the input index of codes; scales and zeros follow it. `matrices` of the described shape lie one after another.
  Weight(const Api& api, const OrtKernelInfo* info, size_t first, int64_t matrices = 1);

  qc_weight resolve(const Api& api, const OrtKernelContext* context) const;

  int64_t n() const { return description_.n; }
  int64_t k() const { return description_.k; }

 private:
  enum Part { kCodes, kScales, kZeros, kParts };

  Shape expected_shape(Part part) const;
  const void* checked(Part part, const Tensor& found) const;

  qc_weight description_{};
  size_t first_;
  int64_t matrices_;
  const void* constant_[kParts] = {};
  AlignedCopies copies_;
};

// Indices of rows with -n ... -1 counted from the end: `indices`, or `storage` where one is negative. Throws where one is out of
// range.
const int64_t* normalized(const int64_t* indices, int64_t count, int64_t n, std::vector<int64_t>& storage);

// The attribute `activation` and the inputs activation_scale, activation_zero and activation_offset, likewise.
class Activations {
 public:
  // `first` is the input index of activation_scale; the others follow it.
  Activations(const Api& api, const OrtKernelInfo* info, size_t first, int64_t n);

  int32_t kind() const { return kind_; }

  // `range` filled in and its address, or null where the node has none.
  const qc_activation_range* resolve(const Api& api, const OrtKernelContext* context, qc_activation_range& range) const;

 private:
  enum Part { kScale, kZero, kOffset, kParts };

  const void* checked(Part part, const Tensor& found) const;

  int64_t n_;
  size_t first_;
  int32_t kind_;
  const void* constant_[kParts] = {};
  AlignedCopies copies_;
};

// The same for an optional float vector of n elements, or `matrices` of them (0: one, without an axis of its own).
class Bias {
 public:
  Bias(const Api& api, const OrtKernelInfo* info, size_t index, int64_t n, int64_t matrices = 0);

  const float* resolve(const Api& api, const OrtKernelContext* context) const;

 private:
  const float* checked(const Tensor& found) const;

  size_t index_;
  int64_t n_, matrices_;
  const float* constant_ = nullptr;
  AlignedCopies copies_;
};

}  // namespace qc::ort

#endif
