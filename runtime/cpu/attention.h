// Attention over a key/value cache: what the driver (attention.cpp) hands to an instruction set's functions.
#ifndef QCOMPILER_ATTENTION_H
#define QCOMPILER_ATTENTION_H

#include <cstdint>

#include "linear.h"
#include "qcompiler_ops.h"

namespace qc {

// Positions whose softmax is taken together, counted from the start of the cache: part of the arithmetic (docs/layout.md).
constexpr int64_t kAttentionBlock = 128;

// Query heads of a kv head and new rows are one axis, "rows" below: row r * group + g is query head g of new row r.
struct AttentionJob {
  qc_attention_call call;
  int64_t group;    // query heads of a kv head
  int64_t width;    // head size rounded up to 16
  int64_t total;    // positions, filled and new
  int64_t blocks;   // of these
  int64_t state;    // floats of what is known of one row over some positions: greatest score, sum of exponentials, values[width]
  bool in_turn;     // one thread does all, a kv head after the other
};

struct AttentionFunctions {
  // Key and value of a new row and kv head into the present.
  void (*append)(const AttentionJob& job, int64_t row, int64_t kv_head);
  // Floats of working memory that attend() needs for so many rows.
  int64_t (*memory)(const AttentionJob& job, int64_t rows);
  // Rows [begin, end) of a kv head over blocks [block, block_end). With `states` [blocks][rows][state] that of each block goes
  // there, and the outputs are left to merge(); null: to the outputs.
  void (*attend)(const AttentionJob& job, int64_t kv_head, int64_t begin, int64_t end, int64_t block, int64_t block_end,
                 float* memory, float* states);
  // The states of all blocks of a kv head to its outputs.
  void (*merge)(const AttentionJob& job, int64_t kv_head, float* states);
};

// False when memory ran out.
bool run_attention(const AttentionFunctions& functions, const Workers& workers, const qc_attention_call& call);

}  // namespace qc
#endif
