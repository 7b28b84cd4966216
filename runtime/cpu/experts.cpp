// Every row times the matrix of its own expert. The rows of an expert are brought together, so that its weight is read once
// a call; a row's result depends on neither its place nor its neighbours (see run_linear).
#include <algorithm>
#include <atomic>
#include <cstring>

#include "layout.h"
#include "linear.h"
#include "scratch.h"

namespace qc {
namespace {

constexpr int64_t kGatheredBytes = 8 << 20;  // rows that are copied together at once, inputs and outputs

Matrix matrix_of(const Matrix& first, int64_t expert) {
  Matrix m = first;
  m.codes += expert * m.tiles * m.tile_bytes;
  m.scales += expert * m.tiles * m.groups * kTileRows;
  if (m.zeros) m.zeros += expert * m.tiles * m.groups * tile_zero_bytes(m.bits);
  return m;
}

// The rows `order[0 .. count)`, ascending, of one expert.
bool run_one(const Kernels& kernels, const Workers& workers, const Matrix& w, qc_activation activation,
             const int64_t* order, int64_t count, const float* x, const float* bias, float* y) {
  if (order[count - 1] - order[0] == count - 1) {  // side by side already
    return run_linear(kernels, workers, w, activation, count, x + order[0] * w.k, bias, y + order[0] * w.n);
  }
  const int64_t row_bytes = (w.k + w.n) * int64_t(sizeof(float));
  const int64_t sweep = std::min(count, std::max<int64_t>(16, kGatheredBytes / row_bytes));
  const ScratchLease lease(size_t(sweep * row_bytes));
  if (!lease.data()) return false;
  float* gathered = reinterpret_cast<float*>(lease.data());
  float* result = gathered + sweep * w.k;
  for (int64_t begin = 0; begin < count; begin += sweep) {
    const int64_t rows = std::min(sweep, count - begin);
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(gathered + i * w.k, x + order[begin + i] * w.k, size_t(w.k) * sizeof(float));
    }
    if (!run_linear(kernels, workers, w, activation, rows, gathered, bias, result)) return false;
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(y + order[begin + i] * w.n, result + i * w.n, size_t(w.n) * sizeof(float));
    }
  }
  return true;
}

}  // namespace

bool run_experts(const Kernels& kernels, const Workers& workers, const Matrix& first, int64_t experts,
                 qc_activation activation, int64_t rows, const float* x, const int64_t* expert, const float* bias,
                 float* y) {
  // order: rows by expert, in their own order within each; the rows of expert e are order[begin[e] .. begin[e + 1]).
  const ScratchLease lease(size_t(rows + 2 * experts + 1) * sizeof(int64_t));
  if (!lease.data()) return false;
  int64_t* begin = reinterpret_cast<int64_t*>(lease.data());
  int64_t* active = begin + experts + 1;
  int64_t* order = active + experts;
  std::memset(begin, 0, size_t(experts + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < rows; ++i) ++begin[expert[i] + 1];
  int64_t hit = 0, most = 0;
  for (int64_t e = 0; e < experts; ++e) {
    most = std::max(most, begin[e + 1]);
    if (begin[e + 1]) active[hit++] = e;
    begin[e + 1] += begin[e];
  }
  // Filling moves every begin to its end, which is the next one's begin.
  for (int64_t i = 0; i < rows; ++i) order[begin[expert[i]]++] = i;
  for (int64_t e = experts; e > 0; --e) begin[e] = begin[e - 1];
  begin[0] = 0;

  std::atomic<bool> memory{true};
  const auto run = [&](int64_t i, const Workers& inside) {
    const int64_t e = active[i];
    const float* own_bias = bias ? bias + e * first.n : nullptr;
    if (!run_one(kernels, inside, matrix_of(first, e), activation, order + begin[e], begin[e + 1] - begin[e], x,
                 own_bias, y)) {
      memory.store(false, std::memory_order_relaxed);
    }
  };
  // Enough experts to keep every thread busy, or too little work in each to be cut: an expert a piece.
  if (hit >= 2 * int64_t(workers.threads) || stays_on_caller(first, most)) {
    const Workers serial{nullptr, nullptr, 1};
    workers.run(hit, [&](int64_t i) { run(i, serial); });
  } else {
    for (int64_t i = 0; i < hit; ++i) run(i, workers);
  }
  return memory.load(std::memory_order_relaxed);
}

}  // namespace qc
