// GroupQueryAttention: attention over a key/value cache, with the inputs, outputs and attributes of com.microsoft's as far as its
// caches are one buffer for past and present. One sequence.
#include <algorithm>
#include <cmath>
#include <vector>

#include "arguments.h"
#include "failure.h"
#include "ops.h"

namespace qc::ort {
namespace {

enum Index : size_t { kQuery, kKey, kValue, kPastKey, kPastValue, kLast, kTotal, kCosines, kSines, kPositions, kBias };

constexpr const char* kNames[] = {"query",     "key",       "value",     "past_key",     "past_value",    "seqlens_k",
                                  "total_sequence_length", "cos_cache", "sin_cache", "position_ids", "attention_bias"};

constexpr OpInput kInputs[] = {
    {kFloat, kRequired},  // query, or query, key and value side by side
    {kFloat, kOptional},  // key
    {kFloat, kOptional},  // value
    {kFloat, kRequired},  // past_key
    {kFloat, kRequired},  // past_value
    {kInt32, kRequired},  // seqlens_k: positions after this call, less one
    {kInt32, kRequired},  // total_sequence_length
    {kFloat, kOptional},  // cos_cache
    {kFloat, kOptional},  // sin_cache
    {kInt64, kOptional},  // position_ids
    {kFloat, kOptional},  // attention_bias
};

InputName name(Index index) { return {index, kNames[index]}; }

Tensor input(const Api& api, const OrtKernelContext* context, Index index) {
  return required_input(api, context, name(index));
}

// False where the node leaves it out.
bool optional_input(const Api& api, const OrtKernelContext* context, Index index, Tensor& out) {
  const OrtValue* value = find_input(api, context, index);
  if (value == nullptr) return false;
  out = tensor(api, value);
  return true;
}

Failure wrong(Index index, const Shape& found, const std::string& expected) {
  return {kInvalidArgument, name_text(name(index)) + " has shape " + text(found) + ", expected " + expected};
}

// The one number of a tensor of one element.
int64_t number(const Api& api, const OrtKernelContext* context, Index index) {
  const Tensor found = input(api, context, index);
  for (const int64_t axis : found.shape) {
    if (axis != 1) throw wrong(index, found.shape, "one element (one sequence)");
  }
  return *static_cast<const int32_t*>(found.data);
}

class Attention final : public Kernel {
 public:
  Attention(const Api& api, const OrtKernelInfo* info)
      : heads_(head_count(api, info, "num_heads")),
        kv_heads_(head_count(api, info, "kv_num_heads")),
        window_(int_attribute(api, info, "local_window_size", -1)),
        rotary_(int_attribute(api, info, "do_rotary", 0)),
        interleaved_(int_attribute(api, info, "rotary_interleaved", 0)),
        scale_(float_attribute(api, info, "scale", 0)) {
    if (heads_ % kv_heads_ != 0)
      throw Failure{kInvalidGraph, "attribute 'num_heads' is " + std::to_string(heads_) + ", expected a multiple of the " +
                                       std::to_string(kv_heads_) + " of 'kv_num_heads'"};
    if (window_ != -1 && (window_ < 1 || window_ > INT32_MAX))
      throw Failure{kInvalidGraph, "attribute 'local_window_size' is " + std::to_string(window_) + ", expected -1 (none) or at least 1"};
    if (!std::isfinite(scale_))
      throw Failure{kInvalidGraph, "attribute 'scale' is " + std::to_string(scale_) + ", expected a finite number"};
  }

  void compute(const Api& api, OrtKernelContext* context) const override {
    qc_attention_call call{};
    const Tensor query = input(api, context, kQuery);
    const Tensor past_key = input(api, context, kPastKey), past_value = input(api, context, kPastValue);
    const Shape& past = past_key.shape;
    if (past.size() != 4 || past[0] != 1 || past[1] != kv_heads_ || past[3] < 1)
      throw wrong(kPastKey, past, "[1, " + std::to_string(kv_heads_) + ", capacity, head size] (one sequence)");
    if (past_value.shape != past) throw wrong(kPastValue, past_value.shape, text(past) + ", that of past_key");
    const int64_t head = past[3];
    if (head > INT32_MAX / (heads_ + 2 * kv_heads_)) throw wrong(kPastKey, past, "a head size that fits in 32 bits");
    call.heads = static_cast<int32_t>(heads_);
    call.kv_heads = static_cast<int32_t>(kv_heads_);
    call.head_size = static_cast<int32_t>(head);
    call.window = window_ < 0 ? 0 : static_cast<int32_t>(window_);
    call.interleaved = interleaved_ != 0;
    call.scale = scale_ == 0 ? 1 / std::sqrt(static_cast<float>(head)) : scale_;
    set_new(api, context, query, call);
    const int64_t total = number(api, context, kTotal), last = number(api, context, kLast);
    if (last + 1 != total)
      throw Failure{kInvalidArgument, name_text(name(kLast)) + " is " + std::to_string(last) + ", expected the last of the " +
                                          std::to_string(total) + " positions of " + name_text(name(kTotal))};
    if (total < call.rows || total - call.rows > past[2])
      throw Failure{kInvalidArgument, name_text(name(kTotal)) + " is " + std::to_string(total) + " with " +
                                          std::to_string(call.rows) + " new positions, expected at most the " +
                                          std::to_string(past[2]) + " of past_key before them"};
    call.past = total - call.rows;
    call.past_key = static_cast<const float*>(past_key.data);
    call.past_value = static_cast<const float*>(past_value.data);
    call.past_capacity = past[2];
    set_rotary(api, context, call);
    set_bias(api, context, total, call);

    const Shape shape{1, call.rows, heads_ * head}, present{1, kv_heads_, std::max(past[2], total), head};
    call.y = output(api, context, 0, shape);
    call.present_key = output(api, context, 1, present);
    call.present_value = output(api, context, 2, present);
    call.capacity = present[2];
    SessionPool pool(api, context);
    const qc_context where = pool.context();
    if (qc_attention(&where, &call) != 0) throw Failure{kFail, qc_last_error()};
  }

 private:
  static int64_t head_count(const Api& api, const OrtKernelInfo* info, const char* attribute) {
    const int64_t count = int_attribute(api, info, attribute);
    if (count < 1 || count > (1 << 20))
      throw Failure{kInvalidGraph, std::string("attribute '") + attribute + "' is " + std::to_string(count) + ", expected at least 1"};
    return count;
  }

  static float* output(const Api& api, OrtKernelContext* context, size_t index, const Shape& shape) {
    OrtValue* value = nullptr;
    check(api, api.KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(api, api.GetTensorMutableData(value, &data));
    return static_cast<float*>(data);
  }

  // Query, key and value of the new positions, one packed tensor or three.
  void set_new(const Api& api, const OrtKernelContext* context, const Tensor& query, qc_attention_call& call) const {
    const int64_t head = call.head_size, width = heads_ * head, kv_width = kv_heads_ * head;
    Tensor key, value;
    const bool packed = !optional_input(api, context, kKey, key);
    const int64_t columns = packed ? width + 2 * kv_width : width;
    if (query.shape.size() != 3 || query.shape[0] != 1 || query.shape[2] != columns)
      throw wrong(kQuery, query.shape, "[1, length, " + std::to_string(columns) + "] (one sequence)");
    call.rows = query.shape[1];
    call.q = static_cast<const float*>(query.data);
    call.q_stride = columns;
    if (optional_input(api, context, kValue, value) == packed)
      throw Failure{kInvalidArgument, "of inputs 1 (key) and 2 (value) one is missing, expected both or neither"};
    if (packed) {
      call.k = call.q + width;
      call.v = call.k + kv_width;
      call.k_stride = call.v_stride = columns;
      return;
    }
    const Shape expected{1, call.rows, kv_width};
    expect(name(kKey), key, kFloat, expected, "");
    expect(name(kValue), value, kFloat, expected, "");
    call.k = static_cast<const float*>(key.data);
    call.v = static_cast<const float*>(value.data);
    call.k_stride = call.v_stride = kv_width;
  }

  void set_rotary(const Api& api, const OrtKernelContext* context, qc_attention_call& call) const {
    if (rotary_ == 0) return;
    const Tensor cosines = input(api, context, kCosines), sines = input(api, context, kSines);
    if (cosines.shape.size() != 2 || 2 * cosines.shape[1] > call.head_size)
      throw wrong(kCosines, cosines.shape, "[positions, at most half of the head size " + std::to_string(call.head_size) + "]");
    expect(name(kSines), sines, kFloat, cosines.shape, ", the shape of cos_cache");
    call.rotary = static_cast<int32_t>(2 * cosines.shape[1]);
    call.cosines = static_cast<const float*>(cosines.data);
    call.sines = static_cast<const float*>(sines.data);
    call.rotary_rows = cosines.shape[0];
    Tensor positions;
    if (!optional_input(api, context, kPositions, positions)) return;
    expect(name(kPositions), positions, kInt64, {1, call.rows}, ", one for each new position");
    call.positions = static_cast<const int64_t*>(positions.data);
  }

  void set_bias(const Api& api, const OrtKernelContext* context, int64_t total, qc_attention_call& call) const {
    Tensor bias;
    if (!optional_input(api, context, kBias, bias)) return;
    const Shape& shape = bias.shape;
    if (shape.size() != 4 || shape[0] != 1 || (shape[1] != 1 && shape[1] != heads_) || shape[2] != call.rows || shape[3] < total)
      throw wrong(kBias, shape, "[1, 1 or " + std::to_string(heads_) + ", " + std::to_string(call.rows) + ", " +
                                    std::to_string(total) + "]");
    call.bias = static_cast<const float*>(bias.data);
    call.bias_row_stride = shape[3];
    call.bias_head_stride = shape[1] == 1 ? 0 : shape[2] * shape[3];
  }

  int64_t heads_, kv_heads_, window_, rotary_, interleaved_;
  float scale_;
};

std::unique_ptr<Kernel> create(const Api& api, const OrtKernelInfo* info) { return std::make_unique<Attention>(api, info); }

}  // namespace

const OpDescription kGroupQueryAttention = {
    "GroupQueryAttention", kInputs, sizeof(kInputs) / sizeof(kInputs[0]), "num_heads", true, create, false, 3};

}  // namespace qc::ort
