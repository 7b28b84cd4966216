#include "vq_weight.h"

#include "failure.h"

namespace qc::ort {
namespace {

constexpr size_t kFirst = 1;
constexpr const char* kNames[] = {"codes", "codebooks", "codebook_scales", "scales"};

// A side of a codebook's block: a multiple of `step`, or 0 for all of the matrix.
int32_t block_side(const Api& api, const OrtKernelInfo* info, const char* name, int64_t step) {
  const int64_t side = int_attribute(api, info, name);
  if (side >= 0 && side < int64_t{1} << 31 && side % step == 0) return static_cast<int32_t>(side);
  throw Failure{kInvalidGraph, std::string("attribute '") + name + "' is " + std::to_string(side) +
                                   ", expected a multiple of " + std::to_string(step) + ", or 0 (all of the matrix)"};
}

int64_t blocks(int64_t length, int32_t side) { return side ? ceil_div(length, side) : 1; }

}  // namespace

VqWeight::VqWeight(const Api& api, const OrtKernelInfo* info) {
  check_layout(api, info);
  const int64_t dim = int_attribute(api, info, "dim");
  const int64_t centroids = int_attribute(api, info, "centroids");
  if (dim != 1 && dim != 2 && dim != 4)
    throw Failure{kInvalidGraph, "attribute 'dim' is " + std::to_string(dim) + ", expected 1, 2 or 4"};
  const bool small = centroids == 4 || centroids == 8 || centroids == 16;
  const bool large = centroids == 16 || centroids == 32 || centroids == 64 || centroids == 256;
  if (dim == 1 ? !small : dim == 2 ? !large : centroids != 256)
    throw Failure{kInvalidGraph, "attribute 'centroids' is " + std::to_string(centroids) + " with dim " +
                                     std::to_string(dim) + ", expected " +
                                     (dim == 1   ? "4, 8 or 16"
                                      : dim == 2 ? "16, 32, 64 or 256"
                                                 : "256")};
  const MatrixShape shape = matrix_shape(api, info);
  description_.n = shape.n;
  description_.k = shape.k;
  description_.group = shape.group;
  description_.dim = static_cast<int32_t>(dim);
  description_.centroids = static_cast<int32_t>(centroids);
  description_.block_rows = block_side(api, info, "block_rows", 16);
  description_.block_columns = block_side(api, info, "block_columns", 128);

  for (int part = kCodes; part < kParts; ++part)
    if (const OrtValue* value = constant_input(api, info, kFirst + part))
      constant_[part] = checked(static_cast<Part>(part), copies_.of(tensor(api, value)));
}

Shape VqWeight::expected_shape(Part part) const {
  const qc_vq_weight& w = description_;
  const int64_t down = blocks(w.n, w.block_rows), across = blocks(w.k, w.block_columns), tiles = ceil_div(w.n, 16);
  if (part == kCodebooks) return {down, across, w.dim, w.centroids};
  if (part == kCodebookScales) return {down, across};
  if (part == kScales) return {tiles, blocks(w.k, w.group), 16};
  if (w.centroids == 32) return {tiles, ceil_div(w.k, 64), 320};
  int64_t index_bits = 0;
  while (1 << index_bits < w.centroids) ++index_bits;
  const int64_t bits = index_bits / w.dim;
  return {tiles, ceil_div(w.k, bits == 3 ? 32 : 32 / bits), bits == 3 ? 192 : 64};
}

const void* VqWeight::checked(Part part, const Tensor& found) const {
  const qc_vq_weight& w = description_;
  const Shape shape = expected_shape(part);
  const int type = part == kCodes ? kUint8 : part == kCodebooks ? kInt8 : kFloat16;
  expect({kFirst + part, kNames[part]}, found, type, shape,
         " (dim " + std::to_string(w.dim) + ", centroids " + std::to_string(w.centroids) + ", block_rows " +
             std::to_string(w.block_rows) + ", block_columns " + std::to_string(w.block_columns) + ", group " +
             std::to_string(w.group) + ", n " + std::to_string(w.n) + ", k " + std::to_string(w.k) + ")");
  // The kernels trust these lengths, so what they will read must be what the shape holds.
  const int64_t needed =
      part == kCodes       ? qc_vq_codes_bytes(w.n, w.k, w.dim, w.centroids)
      : part == kCodebooks ? qc_vq_codebooks_bytes(w.n, w.k, w.dim, w.centroids, w.block_rows, w.block_columns)
      : part == kScales    ? qc_scales_count(w.n, w.k, w.group)
                           : qc_vq_codebook_count(w.n, w.k, w.block_rows, w.block_columns);
  int64_t held = 1;
  for (int64_t dimension : shape) held *= dimension;
  if (needed != held)
    throw Failure{kFail, "the kernels read " + std::to_string(needed) + " elements of " + kNames[part] +
                             ", the layout has " + text(shape)};
  return found.data;
}

qc_vq_weight VqWeight::resolve(const Api& api, const OrtKernelContext* context) const {
  const void* data[kParts];
  for (int part = kCodes; part < kParts; ++part) {
    data[part] = constant_[part];
    if (data[part] != nullptr) continue;
    data[part] = checked(static_cast<Part>(part), required_input(api, context, {kFirst + part, kNames[part]}));
  }
  qc_vq_weight out = description_;
  out.codes = static_cast<const uint8_t*>(data[kCodes]);
  out.codebooks = static_cast<const int8_t*>(data[kCodebooks]);
  out.codebook_scales = static_cast<const uint16_t*>(data[kCodebookScales]);
  out.scales = static_cast<const uint16_t*>(data[kScales]);
  return out;
}

}  // namespace qc::ort
