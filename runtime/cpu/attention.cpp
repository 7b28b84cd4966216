#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "layout.h"
#include "scratch.h"

namespace qc {
namespace {

// Vector operations (16 multiply-adds) that one thread has done before others would have begun: about 20 microseconds.
constexpr int64_t kCallerOperations = 48 << 10;
// Rows (of a kv head) that a piece of a long text has at least: each transposes the keys for itself.
constexpr int64_t kPieceRows = 64;

// The filled part of the past into a present that lies elsewhere.
void copy_past(const Workers& workers, const qc_attention_call& c) {
  if (c.past == 0 || (c.past_key == c.present_key && c.past_value == c.present_value)) return;
  const size_t bytes = size_t(c.past * c.head_size) * sizeof(float);
  workers.run(c.kv_heads, [&](int64_t head) {
    const int64_t from = head * c.past_capacity * c.head_size, to = head * c.capacity * c.head_size;
    if (c.past_key != c.present_key) std::memcpy(c.present_key + to, c.past_key + from, bytes);
    if (c.past_value != c.present_value) std::memcpy(c.present_value + to, c.past_value + from, bytes);
  });
}

int64_t blocks_from(const qc_attention_call& c) {
  return c.window > 0 ? std::max<int64_t>(0, c.past - c.window + 1) / kAttentionBlock : 0;
}

int64_t blocks_to(const AttentionJob& job, int64_t row_end) { return ceil_div(job.call.past + row_end, kAttentionBlock); }

// Within memory of the thread that runs it; clears `whole` where there is none.
void attend(const AttentionFunctions& functions, const AttentionJob& job, int64_t kv_head, int64_t begin, int64_t end, int64_t block,
            int64_t block_end, float* states, std::atomic<bool>& whole) {
  const ScratchLease lease(size_t(functions.memory(job, end - begin)) * sizeof(float));
  if (lease.data()) {
    functions.attend(job, kv_head, begin, end, block, block_end, reinterpret_cast<float*>(lease.data()), states);
  } else {
    whole.store(false, std::memory_order_relaxed);
  }
}

// One piece a kv head and some rows; the last rows, which see the most, first.
bool attend_rows(const AttentionFunctions& functions, const Workers& workers, const AttentionJob& job) {
  const qc_attention_call& c = job.call;
  int64_t step = std::max<int64_t>(1, kPieceRows / job.group);
  if (workers.threads > 1 && c.kv_heads * ceil_div(c.rows, step) < 4 * workers.threads) {
    step = std::max<int64_t>(ceil_div(step, 4), ceil_div(c.rows * c.kv_heads, 4 * workers.threads));
    step = std::min(step, std::max<int64_t>(1, kPieceRows / job.group));
  }
  const int64_t pieces = ceil_div(c.rows, step);
  std::atomic<bool> whole{true};
  workers.run(c.kv_heads * pieces, [&](int64_t index) {
    const int64_t piece = pieces - 1 - index / c.kv_heads, row = piece * step, end = std::min(c.rows, row + step);
    const int64_t from = c.window > 0 ? std::max<int64_t>(0, c.past + row - c.window + 1) / kAttentionBlock : 0;
    const int64_t first = row * job.group, last = end * job.group;
    attend(functions, job, index % c.kv_heads, first, last, from, blocks_to(job, end), nullptr, whole);
  });
  return whole.load();
}

// One piece a kv head and some blocks of positions, for few rows and a long past.
bool attend_blocks(const AttentionFunctions& functions, const Workers& workers, const AttentionJob& job, int64_t from) {
  const qc_attention_call& c = job.call;
  const int64_t rows = c.rows * job.group, all = job.blocks * rows * job.state;
  const ScratchLease lease(size_t(c.kv_heads * all) * sizeof(float));
  if (!lease.data()) return false;
  float* states = reinterpret_cast<float*>(lease.data());
  const int64_t blocks = job.blocks - from, wanted = ceil_div(4 * workers.threads, c.kv_heads);
  const int64_t step = ceil_div(blocks, std::min(blocks, wanted)), pieces = ceil_div(blocks, step);
  std::atomic<bool> whole{true};
  workers.run(c.kv_heads * pieces, [&](int64_t index) {
    const int64_t head = index % c.kv_heads, block = from + index / c.kv_heads * step;
    const int64_t end = std::min(job.blocks, block + step);
    attend(functions, job, head, 0, rows, block, end, states + head * all, whole);
  });
  for (int64_t head = 0; head < c.kv_heads && whole.load(); ++head) functions.merge(job, head, states + head * all);
  return whole.load();
}

}  // namespace

bool run_attention(const AttentionFunctions& functions, const Workers& given, const qc_attention_call& call) {
  const int64_t width = ceil_div(call.head_size, 16) * 16, total = call.past + call.rows;
  AttentionJob job{call, call.heads / call.kv_heads, width, total, ceil_div(total, kAttentionBlock), width + 2, false};
  const int64_t from = blocks_from(call);
  const double seen = double(total - from * kAttentionBlock);
  Workers workers = given;
  // Scores and values; a triangle's half does not matter here.
  if (2.0 * double(call.heads * call.rows) * seen * double(width / 16) < double(kCallerOperations)) workers.threads = 1;
  job.in_turn = workers.threads <= 1 || !workers.parallel_for;
  copy_past(workers, call);
  const int64_t rows_at_once = std::max<int64_t>(1, (int64_t{32} << 10) / (call.kv_heads * call.head_size));
  workers.run(ceil_div(call.rows, rows_at_once), [&](int64_t piece) {
    for (int64_t row = piece * rows_at_once; row < std::min(call.rows, (piece + 1) * rows_at_once); ++row) {
      for (int64_t head = 0; head < call.kv_heads; ++head) functions.append(job, row, head);
    }
  });
  const bool few_pieces = call.kv_heads < workers.threads || (call.kv_heads < 4 * workers.threads && call.kv_heads % workers.threads);
  const bool split = workers.threads > 1 && call.rows * job.group < kPieceRows && few_pieces && job.blocks - from > 1;
  return split ? attend_blocks(functions, workers, job, from) : attend_rows(functions, workers, job);
}

}  // namespace qc
