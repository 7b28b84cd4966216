#include "arguments.h"

#include <cstring>

#include "failure.h"

namespace qc::ort {
namespace {

const char* type_text(int type) {
  switch (type) {
    case kFloat: return "float";
    case kUint8: return "uint8";
    case kInt8: return "int8";
    case kInt32: return "int32";
    case kInt64: return "int64";
    case kFloat16: return "float16";
    default: return "another type";
  }
}

// Bytes of an element, which is also the alignment that it needs.
size_t element_bytes(int type) {
  switch (type) {
    case kFloat:
    case kInt32: return 4;
    case kInt64: return 8;
    case kFloat16: return 2;
    default: return 1;
  }
}

}  // namespace

Tensor AlignedCopies::of(const Tensor& found) {
  const size_t size = element_bytes(found.type);
  if (reinterpret_cast<uintptr_t>(found.data) % size == 0) return found;
  size_t bytes = size;
  for (const int64_t axis : found.shape) bytes *= static_cast<size_t>(axis);
  held_.push_back(std::make_unique<unsigned char[]>(bytes));  // as aligned as any type needs
  std::memcpy(held_.back().get(), found.data, bytes);
  Tensor copy = found;
  copy.data = held_.back().get();
  return copy;
}

std::string name_text(const InputName& input) { return "input " + std::to_string(input.index) + " (" + input.name + ")"; }

const OrtValue* constant_input(const Api& api, const OrtKernelInfo* info, size_t index) {
  size_t count = 0;
  check(api, api.KernelInfo_GetInputCount(info, &count));
  if (index >= count) return nullptr;
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(api, api.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  return is_constant ? value : nullptr;
}

void expect(const InputName& input, const Tensor& found, int type, const Shape& shape, const std::string& because) {
  if (found.type == type && found.shape == shape) return;
  throw Failure{kInvalidArgument, name_text(input) + " is " + type_text(found.type) + " " + text(found.shape) + ", expected " +
                                      type_text(type) + " " + text(shape) + because};
}

std::string text(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

std::string node_text(const Api& api, const OrtKernelInfo* info, const char* op) {
  size_t bytes = 0;
  std::string name;
  if (succeeded(api, api.KernelInfo_GetNodeName(info, nullptr, &bytes)) && bytes > 1) {
    name.resize(bytes);
    if (succeeded(api, api.KernelInfo_GetNodeName(info, name.data(), &bytes))) name.resize(bytes - 1);
  }
  return std::string(op) + " node '" + (name.empty() ? "(unnamed)" : name) + "'";
}

int64_t int_attribute(const Api& api, const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  if (!succeeded(api, api.KernelInfoGetAttribute_int64(info, name, &value)))
    throw Failure{kInvalidGraph, std::string("attribute '") + name + "' is missing or not an integer"};
  return value;
}

// ONNX Runtime has one answer to an attribute that is not there and to one of another type.
int64_t int_attribute(const Api& api, const OrtKernelInfo* info, const char* name, int64_t fallback) {
  int64_t value = 0;
  if (succeeded(api, api.KernelInfoGetAttribute_int64(info, name, &value))) return value;
  float other = 0;
  if (!succeeded(api, api.KernelInfoGetAttribute_float(info, name, &other))) return fallback;
  throw Failure{kInvalidGraph, std::string("attribute '") + name + "' is a float, expected an integer"};
}

float float_attribute(const Api& api, const OrtKernelInfo* info, const char* name, float fallback) {
  float value = 0;
  if (succeeded(api, api.KernelInfoGetAttribute_float(info, name, &value))) return value;
  int64_t other = 0;
  if (!succeeded(api, api.KernelInfoGetAttribute_int64(info, name, &other))) return fallback;
  throw Failure{kInvalidGraph, std::string("attribute '") + name + "' is an integer, expected a float"};
}

Tensor tensor(const Api& api, const OrtValue* value) {
  struct Info {
    const Api& api;
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    ~Info() {
      if (raw) api.ReleaseTensorTypeAndShapeInfo(raw);
    }
  } info{api};
  check(api, api.GetTensorTypeAndShape(value, &info.raw));
  Tensor out;
  check(api, api.GetTensorElementType(info.raw, &out.type));
  size_t rank = 0;
  check(api, api.GetDimensionsCount(info.raw, &rank));
  out.shape.resize(rank);
  check(api, api.GetDimensions(info.raw, out.shape.data(), rank));
  check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &out.data));
  return out;
}

const OrtValue* find_input(const Api& api, const OrtKernelContext* context, size_t index) {
  size_t count = 0;
  check(api, api.KernelContext_GetInputCount(context, &count));
  if (index >= count) return nullptr;
  const OrtValue* value = nullptr;
  check(api, api.KernelContext_GetInput(context, index, &value));
  return value;
}

Tensor required_input(const Api& api, const OrtKernelContext* context, InputName input) {
  const OrtValue* value = find_input(api, context, input.index);
  if (value == nullptr) throw Failure{kInvalidArgument, name_text(input) + " is missing"};
  return tensor(api, value);
}

void check_layout(const Api& api, const OrtKernelInfo* info) {
  const int64_t layout = int_attribute(api, info, "layout_version");
  if (layout != qc_layout_version())
    throw Failure{kNotImplemented, "the weights have packed layout " + std::to_string(layout) +
                                       ", this library reads layout " + std::to_string(qc_layout_version()) +
                                       "; run `qcompiler repack` on the artifact"};
}

MatrixShape matrix_shape(const Api& api, const OrtKernelInfo* info) {
  const int64_t group = int_attribute(api, info, "group");
  const int64_t n = int_attribute(api, info, "n");
  const int64_t k = int_attribute(api, info, "k");
  if (group != 0 && group != 32 && group != 64 && group != 128)
    throw Failure{kInvalidGraph,
                  "attribute 'group' is " + std::to_string(group) + ", expected 0 (the whole row), 32, 64 or 128"};
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (n < 1 || n >= kLimit || k < 1 || k >= kLimit)
    throw Failure{kInvalidGraph, "attributes 'n' and 'k' are " + std::to_string(n) + " and " + std::to_string(k) +
                                     ", expected 1 to " + std::to_string(kLimit - 1)};
  return {n, k, static_cast<int32_t>(group)};
}

// ---- weight

static constexpr const char* kPartNames[] = {"codes", "scales", "zeros"};

Weight::Weight(const Api& api, const OrtKernelInfo* info, size_t first, int64_t matrices)
    : first_(first), matrices_(matrices) {
  check_layout(api, info);
  const int64_t bits = int_attribute(api, info, "bits");
  if (bits != 8 && bits != 4 && bits != 3 && bits != 2)
    throw Failure{kInvalidGraph, "attribute 'bits' is " + std::to_string(bits) + ", expected 8, 4, 3 or 2"};
  const MatrixShape shape = matrix_shape(api, info);
  description_.n = shape.n;
  description_.k = shape.k;
  description_.bits = static_cast<int32_t>(bits);
  description_.group = shape.group;

  for (int part = kCodes; part < kParts; ++part)
    if (const OrtValue* value = constant_input(api, info, first_ + part))
      constant_[part] = checked(static_cast<Part>(part), copies_.of(tensor(api, value)));
}

Shape Weight::expected_shape(Part part) const {
  const qc_weight& w = description_;
  const int64_t tiles = matrices_ * ceil_div(w.n, 16);
  const int64_t groups = w.group == 0 ? 1 : ceil_div(w.k, w.group);
  if (part == kScales) return {tiles, groups, 16};
  if (part == kZeros) return {tiles, groups, 2 * w.bits};
  const int64_t unit_bytes = w.bits == 3 ? 192 : 64;
  const int64_t unit_k = w.bits == 3 ? 32 : 32 / w.bits;
  return {tiles, ceil_div(w.k, unit_k), unit_bytes};
}

const void* Weight::checked(Part part, const Tensor& found) const {
  const qc_weight& w = description_;
  const Shape shape = expected_shape(part);
  expect({first_ + part, kPartNames[part]}, found, part == kScales ? kFloat16 : kUint8, shape,
         " (bits " + std::to_string(w.bits) + ", group " + std::to_string(w.group) + ", n " + std::to_string(w.n) +
             ", k " + std::to_string(w.k) + ")");
  // The kernels trust these lengths, so what they will read must be what the shape holds.
  const int64_t needed = part == kCodes    ? qc_codes_bytes(w.n, w.k, w.bits)
                         : part == kScales ? qc_scales_count(w.n, w.k, w.group)
                                           : qc_zeros_bytes(w.n, w.k, w.bits, w.group);
  if (matrices_ * needed != shape[0] * shape[1] * shape[2])
    throw Failure{kFail, "the kernels read " + std::to_string(matrices_ * needed) + " elements of " + kPartNames[part] +
                             ", the layout has " + text(shape)};
  return found.data;
}

qc_weight Weight::resolve(const Api& api, const OrtKernelContext* context) const {
  const void* data[kParts];
  for (int part = kCodes; part < kParts; ++part) {
    data[part] = constant_[part];
    if (data[part] != nullptr) continue;
    if (const OrtValue* value = find_input(api, context, first_ + part))
      data[part] = checked(static_cast<Part>(part), tensor(api, value));
    else if (part != kZeros)
      throw Failure{kInvalidArgument, name_text({first_ + part, kPartNames[part]}) + " is missing"};
  }
  qc_weight out = description_;
  out.codes = static_cast<const uint8_t*>(data[kCodes]);
  out.scales = static_cast<const uint16_t*>(data[kScales]);
  out.zeros = static_cast<const uint8_t*>(data[kZeros]);
  return out;
}

// ---- indices

const int64_t* normalized(const int64_t* indices, int64_t count, int64_t n, std::vector<int64_t>& storage) {
  bool any_negative = false;
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < -n || indices[i] >= n)
      throw Failure{kInvalidArgument, "input 0 (indices) holds " + std::to_string(indices[i]) + " at position " +
                                          std::to_string(i) + ", expected " + std::to_string(-n) + " to " +
                                          std::to_string(n - 1)};
    any_negative |= indices[i] < 0;
  }
  if (!any_negative) return indices;
  storage.assign(indices, indices + count);
  for (int64_t& index : storage) index += index < 0 ? n : 0;
  return storage.data();
}

// ---- activations

Activations::Activations(const Api& api, const OrtKernelInfo* info, size_t first, int64_t n)
    : n_(n), first_(first), kind_(static_cast<int32_t>(int_attribute(api, info, "activation"))) {
  if (kind_ < QC_ACT_FLOAT || kind_ > QC_ACT_INT8_STATIC)
    throw Failure{kInvalidGraph, "attribute 'activation' is " + std::to_string(kind_) +
                                     ", expected 0 (float), 1 (int8 per token), 2 (int8 per block of 128) or 3 (static int8)"};
  for (int part = kScale; part < kParts; ++part)
    if (const OrtValue* value = constant_input(api, info, first_ + part))
      constant_[part] = checked(static_cast<Part>(part), copies_.of(tensor(api, value)));
}

const void* Activations::checked(Part part, const Tensor& found) const {
  static constexpr const char* kNames[] = {"activation_scale", "activation_zero", "activation_offset"};
  const Shape shape{part == kOffset ? n_ : 1};
  expect({first_ + part, kNames[part]}, found, part == kZero ? kInt8 : kFloat, shape, "");
  return found.data;
}

const qc_activation_range* Activations::resolve(const Api& api, const OrtKernelContext* context,
                                                qc_activation_range& range) const {
  const void* data[kParts];
  for (int part = kScale; part < kParts; ++part) {
    data[part] = constant_[part];
    if (data[part] != nullptr) continue;
    const OrtValue* value = find_input(api, context, first_ + part);
    if (value != nullptr) data[part] = checked(static_cast<Part>(part), tensor(api, value));
  }
  if (data[kScale] == nullptr) {
    if (kind_ == QC_ACT_INT8_STATIC || data[kZero] != nullptr || data[kOffset] != nullptr)
      throw Failure{kInvalidArgument, name_text({first_, "activation_scale"}) + " is missing"};
    return nullptr;
  }
  range = {*static_cast<const float*>(data[kScale]), static_cast<const int8_t*>(data[kZero]),
           static_cast<const float*>(data[kOffset])};
  return &range;
}

// ---- bias

Bias::Bias(const Api& api, const OrtKernelInfo* info, size_t index, int64_t n, int64_t matrices)
    : index_(index), n_(n), matrices_(matrices) {
  if (const OrtValue* value = constant_input(api, info, index)) constant_ = checked(copies_.of(tensor(api, value)));
}

const float* Bias::checked(const Tensor& found) const {
  const Shape shape = matrices_ ? Shape{matrices_, n_} : Shape{n_};
  expect({index_, "bias"}, found, kFloat, shape, " (n " + std::to_string(n_) + ")");
  return static_cast<const float*>(found.data);
}

const float* Bias::resolve(const Api& api, const OrtKernelContext* context) const {
  if (constant_ != nullptr) return constant_;
  const OrtValue* value = find_input(api, context, index_);
  return value == nullptr ? nullptr : checked(tensor(api, value));
}

}  // namespace qc::ort
