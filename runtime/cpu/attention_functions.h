// Attention over a key/value cache (docs/layout.md, "Attention"), for every instruction set the same source and the same values. The
// result of a row depends neither on the rows that are computed with it nor on how the positions are cut into pieces. Included with
// different ISA flags, so nothing here may have linkage.
#ifndef QCOMPILER_ATTENTION_FUNCTIONS_H
#define QCOMPILER_ATTENTION_FUNCTIONS_H

#include <algorithm>
#include <limits>

#include "attention.h"
#include "attention_vector.h"

namespace qc {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();
// From so many rows on, keys are transposed once for all of them.
constexpr int64_t kTransposedRows = 12;

// ---- rotary embedding

void rotate(const qc_attention_call& c, const float* x, int64_t row, float* out) {
  const int64_t half = c.rotary / 2, at = c.positions ? c.positions[row] : c.past + row;
  const float* cosines = c.cosines + at * half;
  const float* sines = c.sines + at * half;
  if (c.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      out[2 * i] = a * cosines[i] - b * sines[i];
      out[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
  } else {
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t n = half - i;
      const Vec a = load(x + i, n), b = load(x + half + i, n), cosine = load(cosines + i, n), sine = load(sines + i, n);
      store(out + i, a * cosine - b * sine, n);
      store(out + half + i, b * cosine + a * sine, n);
    }
  }
  std::memcpy(out + c.rotary, x + c.rotary, size_t(c.head_size - c.rotary) * sizeof(float));
}

void append(const AttentionJob& job, int64_t row, int64_t kv_head) {
  const qc_attention_call& c = job.call;
  const int64_t at = (kv_head * c.capacity + c.past + row) * c.head_size;
  rotate(c, c.k + row * c.k_stride + kv_head * c.head_size, row, c.present_key + at);
  std::memcpy(c.present_value + at, c.v + row * c.v_stride + kv_head * c.head_size, size_t(c.head_size) * sizeof(float));
}

// ---- scores

// The work of one call of attend(): some rows of a kv head, and the block of positions at hand.
struct Piece {
  const AttentionJob& job;
  int64_t kv_head, begin, rows;
  const float* keys;    // of the kv head
  const float* values;
  float* q;       // [rows][width], rotated and scaled, zeros behind the head
  float* scores;  // [rows][kAttentionBlock]
  float* turned;  // [kAttentionBlock / 16][width][16]; null: rows are few
  float* states;  // [rows][width + 2]
  float* block;   // the same of one block
  const float* ahead;      // keys that the next block begins with, where few rows read on, else null
  const float* ahead_end;

  int64_t position(int64_t row) const { return job.call.past + (begin + row) / job.group; }
  // Positions that a row sees, of those from `first` on.
  int64_t low(int64_t row, int64_t first) const {
    return job.call.window > 0 ? std::max<int64_t>(0, position(row) - job.call.window + 1 - first) : 0;
  }
  int64_t high(int64_t row, int64_t first) const {
    return std::max<int64_t>(0, std::min(kAttentionBlock, position(row) + 1 - first));
  }
  float* state(float* all, int64_t row) const { return all + row * job.state; }
};

void load_queries(const Piece& p) {
  const qc_attention_call& c = p.job.call;
  const Vec scale = all(c.scale);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t r = (p.begin + row) / p.job.group, g = (p.begin + row) % p.job.group;
    float* q = p.q + row * p.job.width;
    for (int64_t i = p.job.width - kLanes; i < p.job.width; ++i) q[i] = 0;
    rotate(c, c.q + r * c.q_stride + (p.kv_head * p.job.group + g) * c.head_size, r, q);
    for (int64_t i = 0; i < p.job.width; i += kLanes) store(q + i, load(q + i) * scale);
  }
}

// Products of a row with four keys for each of `out`, their lanes summed down to four: see fold().
template <int Folds>
QC_INLINE void score_quads(const float* q, int64_t width, int64_t size, const float* const (&keys)[4 * Folds], Vec (&out)[Folds]) {
  Vec sums[4 * Folds];
#pragma GCC unroll 8
  for (int i = 0; i < 4 * Folds; ++i) sums[i] = zero();
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    const Vec x = load(q + d);
#pragma GCC unroll 8
    for (int i = 0; i < 4 * Folds; ++i) sums[i] = fma(x, load(keys[i] + d), sums[i]);
  }
  if (d < width) {
    const Vec x = load(q + d);
#pragma GCC unroll 8
    for (int i = 0; i < 4 * Folds; ++i) sums[i] = fma(x, load(keys[i] + d, size - d), sums[i]);
  }
#pragma GCC unroll 2
  for (int f = 0; f < Folds; ++f) out[f] = fold(sums[f], sums[Folds + f], sums[2 * Folds + f], sums[3 * Folds + f]);
}

// A cache is read once, at the speed of the memory that it lies in: with the keys come the values of the same positions, and with
// the values the keys of the next block.
QC_INLINE void fetch(const float* from, const float* end) {
  for (; from < end; from += 64 / sizeof(float)) __builtin_prefetch(from, 0, 2);
}

// Few rows: a row's products with 16 keys, whose lanes are then summed together.
void score_rows(const Piece& p, int64_t first) {
  const int64_t size = p.job.call.head_size, width = p.job.width;
  const int64_t there = std::min(kAttentionBlock, p.job.total - first);
  for (int64_t at = 0; at < there; at += kLanes) {
    const float* keys = p.keys + (first + at) * size;
    const int64_t last = std::min<int64_t>(kLanes, there - at) - 1;
    const float* values = p.values + (first + at) * size;
    fetch(values, values + (last + 1) * size);
    for (int64_t row = 0; row < p.rows; ++row) {
      if (at >= p.high(row, first) || at + kLanes <= p.low(row, first)) continue;
      const float* q = p.q + row * width;
      Vec quads[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; r += kFolds) {
        // Quarter i of quad r is position 4 i + r, or the last that is there.
        const float* chosen[4 * kFolds];
#pragma GCC unroll 8
        for (int i = 0; i < 4 * kFolds; ++i) {
          chosen[i] = keys + std::min<int64_t>(4 * (i / kFolds) + r + i % kFolds, last) * size;
        }
        Vec found[kFolds];
        score_quads<kFolds>(q, width, size, chosen, found);
#pragma GCC unroll 2
        for (int f = 0; f < kFolds; ++f) quads[r + f] = found[f];
      }
      store(p.scores + row * kAttentionBlock + at, finish(quads[0], quads[1], quads[2], quads[3]));
    }
  }
}

void turn_keys(const Piece& p, int64_t first) {
  const int64_t size = p.job.call.head_size, width = p.job.width;
  const int64_t there = std::min(kAttentionBlock, p.job.total - first);
  for (int64_t at = 0; at < there; at += kLanes) {
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = at + i >= there ? zero() : load(p.keys + (first + at + i) * size + d, size - d);
      }
      transpose(rows, p.turned + (at / kLanes * width + d) * kLanes);
    }
  }
}

// Lane i of all products of R rows with 16 keys: the sum over columns i, i + 16, ...
template <int R>
QC_INLINE void lane_products(const float* q, const float* keys, int64_t width, int lane, Vec (&out)[R]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) out[r] = zero();
  for (int64_t d = lane; d < width; d += kLanes) {
    const Vec key = load(keys + d * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) out[r] = fma(all(q[r * width + d]), key, out[r]);
  }
}

// The lanes first, first + step, ... summed by halves.
template <int R, int Step>
QC_INLINE void lane_sums(const float* q, const float* keys, int64_t width, int lane, Vec (&out)[R]) {
  if constexpr (Step == kLanes) {
    lane_products<R>(q, keys, width, lane, out);
  } else {
    lane_sums<R, 2 * Step>(q, keys, width, lane, out);
    Vec other[R];
    lane_sums<R, 2 * Step>(q, keys, width, lane + Step, other);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) out[r] = out[r] + other[r];
  }
}

template <int R>
void score_turned(const Piece& p, int64_t row, int64_t at) {
  Vec out[R];
  lane_sums<R, 1>(p.q + row * p.job.width, p.turned + at * p.job.width, p.job.width, 0, out);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) store(p.scores + (row + r) * kAttentionBlock + at, out[r]);
}

// Many rows: keys side by side, R rows with 16 of them at once.
void score_many(const Piece& p, int64_t first) {
  turn_keys(p, first);
  const int64_t there = std::min(kAttentionBlock, p.job.total - first);
  for (int64_t at = 0; at < there; at += kLanes) {
    // Rows see positions in ascending order: the first that reaches these, and the last that still does.
    int64_t row = 0, end = p.rows;
    while (row < end && p.high(row, first) <= at) ++row;
    while (end > row && p.low(end - 1, first) >= at + kLanes) --end;
    for (; row + kScoreRows <= end; row += kScoreRows) score_turned<kScoreRows>(p, row, at);
    for (; row < end; ++row) score_turned<1>(p, row, at);
  }
}

// ---- softmax

// A row's scores to exponentials, those that it does not see to 0; `out`: the greatest score and the sum.
void soften(const Piece& p, int64_t row, int64_t first, float* out) {
  const qc_attention_call& c = p.job.call;
  const int64_t low = p.low(row, first), high = p.high(row, first);
  float* scores = p.scores + row * kAttentionBlock;
  const int64_t begin = low / kLanes * kLanes, end = (high + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = begin; i < low; ++i) scores[i] = kNothing;
  for (int64_t i = high; i < end; ++i) scores[i] = kNothing;
  if (c.bias) {
    const int64_t r = (p.begin + row) / p.job.group, head = p.kv_head * p.job.group + (p.begin + row) % p.job.group;
    const float* bias = c.bias + head * c.bias_head_stride + r * c.bias_row_stride + first;
    for (int64_t i = low; i < high; ++i) scores[i] += bias[i];
  }
  Vec most = all(kNothing);
  for (int64_t i = begin; i < end; i += kLanes) most = greater(load(scores + i), most);
  const float found = greatest(most);
  const Vec shift = all(found == kNothing ? 0 : found);
  Vec sums = zero();
  for (int64_t i = begin; i < end; i += kLanes) {
    const Vec e = exponential(load(scores + i) - shift);
    store(scores + i, e);
    sums = sums + e;
  }
  float total[kLanes];
  store(total, sum(sums));
  out[0] = found;
  out[1] = total[0];
}

// ---- values

// values += exponentials . V for R rows, C vectors of columns, positions [low, high) of the block. The last vector may be short.
template <int R, int C>
QC_INLINE void add_values(const Piece& p, int64_t row, int64_t column, int64_t first, int64_t low, int64_t high) {
  const int64_t size = p.job.call.head_size, tail = size - column - (C - 1) * kLanes;
  const float* scores = p.scores + row * kAttentionBlock;
  const float* v = p.values + (first + low) * size + column;
  const float* ahead = p.ahead && row == 0 ? p.ahead + low * size + column : p.ahead_end;
  Vec sums[R][C];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = load(p.state(p.block, row + r) + 2 + column + c * kLanes);
  }
  if (tail >= kLanes) {
    for (int64_t j = low; j < high; ++j, v += size) {
      Vec x[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) x[c] = load(v + c * kLanes);
      if (ahead < p.ahead_end) {
        fetch(ahead, ahead + C * kLanes);
        ahead += size;
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Vec e = all(scores[r * kAttentionBlock + j]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[r][c] = fma(e, x[c], sums[r][c]);
      }
    }
  } else {
    for (int64_t j = low; j < high; ++j, v += size) {
      Vec x[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) x[c] = c + 1 < C ? load(v + c * kLanes) : load(v + c * kLanes, tail);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Vec e = all(scores[r * kAttentionBlock + j]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[r][c] = fma(e, x[c], sums[r][c]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(p.state(p.block, row + r) + 2 + column + c * kLanes, sums[r][c]);
  }
}

template <int R>
void add_columns(const Piece& p, int64_t row, int64_t first, int64_t low, int64_t high) {
  int64_t column = 0;
  for (; column + kValueVectors * kLanes <= p.job.width; column += kValueVectors * kLanes) {
    add_values<R, kValueVectors>(p, row, column, first, low, high);
  }
  for (; column < p.job.width; column += kLanes) add_values<R, 1>(p, row, column, first, low, high);
}

template <int R>
void add_rows(const Piece& p, int64_t row, int64_t count, int64_t first, int64_t low, int64_t high) {
  if constexpr (R > 0) {
    if (count == R) {
      add_columns<R>(p, row, first, low, high);
    } else {
      add_rows<R - 1>(p, row, count, first, low, high);
    }
  }
}

// Rows in order see positions that begin and end ever later: what they share is computed at once, the rest row by row before and
// after, so that every row has its positions in ascending order.
void multiply_values(const Piece& p, int64_t first) {
  for (int64_t row = 0; row < p.rows;) {
    const int64_t count = std::min<int64_t>(kValueRows, p.rows - row), end = row + count;
    const int64_t low = p.low(end - 1, first), high = p.high(row, first);
    for (int64_t r = row; r < end; ++r) {
      float* state = p.state(p.block, r);
      for (int64_t d = 0; d < p.job.width; d += kLanes) store(state + 2 + d, zero());
    }
    if (low >= high) {
      for (int64_t r = row; r < end; ++r) add_rows<1>(p, r, 1, first, p.low(r, first), p.high(r, first));
    } else {
      for (int64_t r = row; r < end; ++r) {
        if (p.low(r, first) < low) add_rows<1>(p, r, 1, first, p.low(r, first), low);
      }
      add_rows<kValueRows>(p, row, count, first, low, high);
      for (int64_t r = row; r < end; ++r) {
        if (high < p.high(r, first)) add_rows<1>(p, r, 1, first, high, p.high(r, first));
      }
    }
    row = end;
  }
}

// ---- states

// state: that of the positions before, and becomes that of both.
void join(const AttentionJob& job, float* state, const float* block) {
  const float greatest = state[0] > block[0] ? state[0] : block[0], shift = greatest == kNothing ? 0 : greatest;
  float powers[kLanes] = {state[0] - shift, block[0] - shift};
  store(powers, exponential(load(powers)));
  const Vec a = all(powers[0]), b = all(powers[1]);
  state[0] = greatest;
  state[1] = __builtin_fmaf(state[1], powers[0], block[1] * powers[1]);
  for (int64_t d = 2; d < 2 + job.width; d += kLanes) store(state + d, fma(load(state + d), a, load(block + d) * b));
}

void output(const AttentionJob& job, int64_t kv_head, int64_t row, const float* state) {
  const qc_attention_call& c = job.call;
  float* y = c.y + ((row / job.group * c.kv_heads + kv_head) * job.group + row % job.group) * c.head_size;
  const Vec divisor = all(state[1]);
  for (int64_t d = 0; d < c.head_size; d += kLanes) store(y + d, one_nan(load(state + 2 + d) / divisor), c.head_size - d);
}

// The keys that are read after those at hand: of a block, or of that block of the next kv head.
void look_ahead(Piece& p, int64_t block, bool next_head) {
  const qc_attention_call& c = p.job.call;
  if (next_head && (!p.job.in_turn || p.kv_head + 1 == c.kv_heads)) return;
  const int64_t first = block * kAttentionBlock;
  const float* keys = p.keys + (next_head ? c.capacity * c.head_size : 0);
  p.ahead = keys + first * c.head_size;
  p.ahead_end = keys + std::min(first + kAttentionBlock, p.job.total) * c.head_size;
}

int64_t turned_floats(const AttentionJob& job, int64_t rows) {
  return rows >= kTransposedRows ? kAttentionBlock * job.width : 0;
}

int64_t memory(const AttentionJob& job, int64_t rows) {
  return turned_floats(job, rows) + rows * (job.width + kAttentionBlock + 2 * job.state);
}

void attend(const AttentionJob& job, int64_t kv_head, int64_t begin, int64_t end, int64_t block, int64_t block_end, float* memory,
            float* states) {
  const qc_attention_call& c = job.call;
  const int64_t rows = end - begin, size = job.state, all_rows = c.rows * job.group;
  const int64_t turned = turned_floats(job, rows);
  Piece p{job, kv_head, begin, rows, c.present_key + kv_head * c.capacity * c.head_size,
          c.present_value + kv_head * c.capacity * c.head_size, nullptr, nullptr, turned ? memory : nullptr, nullptr, nullptr,
          nullptr, nullptr};
  p.q = memory + turned;
  p.scores = p.q + rows * job.width;
  p.states = p.scores + rows * kAttentionBlock;
  p.block = p.states + rows * size;
  if (!turned && (!job.in_turn || kv_head == 0)) {
    const int64_t first = block * kAttentionBlock;
    fetch(p.keys + first * c.head_size, p.keys + std::min(first + kAttentionBlock, job.total) * c.head_size);
  }
  load_queries(p);
  for (int64_t b = block; b < block_end; ++b) {
    const int64_t first = b * kAttentionBlock;
    // The rows that see something of the block: those before end too early, those behind begin too late.
    int64_t from = 0, to = rows;
    while (from < to && p.high(from, first) <= p.low(from, first)) ++from;
    while (to > from && p.high(to - 1, first) <= p.low(to - 1, first)) --to;
    if (from == to) continue;
    Piece part = p;
    part.begin += from;
    part.rows = to - from;
    part.q += from * job.width;
    part.scores += from * kAttentionBlock;
    part.block = states ? states + (b * all_rows + begin + from) * size : p.block + from * size;
    if (!turned) look_ahead(part, b + 1 < block_end ? b + 1 : block, b + 1 == block_end);
    if (turned) {
      score_many(part, first);
    } else {
      score_rows(part, first);
    }
    for (int64_t row = 0; row < part.rows; ++row) soften(part, row, first, part.state(part.block, row));
    multiply_values(part, first);
    if (states) continue;
    for (int64_t row = 0; row < part.rows; ++row) {
      float* state = p.state(p.states, from + row);
      const float* found = part.state(part.block, row);
      if (b == block || p.low(from + row, first - kAttentionBlock) >= kAttentionBlock) {
        std::memcpy(state, found, size_t(size) * sizeof(float));
      } else {
        join(job, state, found);
      }
    }
  }
  if (states) return;
  for (int64_t row = 0; row < rows; ++row) output(job, kv_head, begin + row, p.state(p.states, row));
}

void merge(const AttentionJob& job, int64_t kv_head, float* states) {
  const qc_attention_call& c = job.call;
  const int64_t rows = c.rows * job.group, size = job.state;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = c.past + row / job.group;
    const int64_t from = c.window > 0 ? std::max<int64_t>(0, at - c.window + 1) / kAttentionBlock : 0;
    float* state = states + (from * rows + row) * size;
    for (int64_t b = from + 1; b <= at / kAttentionBlock; ++b) join(job, state, states + (b * rows + row) * size);
    output(job, kv_head, row, state);
  }
}

}  // namespace
}  // namespace qc
#endif
