// Prepares activations for the kernels and cuts the work into pieces.
#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "edges.h"
#include "layout.h"
#include "panel.h"
#include "scratch.h"

namespace qc {
namespace {

constexpr int64_t kFewRows = 16;                 // up to here reading the weights takes the time,
constexpr int64_t kStreamBytes = 1 << 20;        // and long pieces: where one begins, a core's loads start anew
constexpr int64_t kPieceBytes = 192 << 10;       // weights per claim for more rows: they stay in L2
constexpr int64_t kPanelsPiece = 32;             // tiles per claim where panels are
constexpr int64_t kSmallBytes = 192 << 10;       // a matrix this small, with
constexpr int64_t kSmallProducts = 4 << 20;      // this few multiplications, stays on the calling thread
constexpr int64_t kActivationBytes = 4 << 20;    // prepared activations that are swept at once
constexpr int64_t kBlockRows = 24;               // a whole number of blocks of most sizes
constexpr int64_t kPrepareElements = 128 << 10;  // fewer are prepared on the calling thread

// What a block costs beside its rows, in rows: the decoding of its weights; of a panel, that they are loaded.
constexpr double kDecodedBlock = 1.5;
constexpr double kPanelBlock = 0.25;

// The block size with the least work.
int choose_block_rows(const int* sizes, int64_t rows, double block_cost) {
  int best = sizes[0];
  double best_cost = std::numeric_limits<double>::infinity();
  for (; *sizes; ++sizes) {
    const double cost = double(ceil_div(rows, *sizes)) * (*sizes + block_cost);
    if (cost < best_cost) best_cost = cost, best = *sizes;
  }
  return best;
}

// Consecutive 64-byte aligned parts of one lease.
class Parts {
 public:
  int64_t add(int64_t bytes) {
    const int64_t offset = size_;
    size_ += ceil_div(bytes, 64) * 64;
    return offset;
  }
  size_t size() const { return size_t(size_); }

 private:
  int64_t size_ = 0;
};

// A row without its outlier columns: those go to `gathered`, and a copy holds 0 in their place.
struct OutlierSplit {
  const qc_outliers& outliers;
  int64_t k;
  float* gathered;  // [rows][outliers.count]
  float* copies;    // [pieces][k]

  // The row to quantize; `finite` becomes false when one of the columns taken out is not.
  const float* operator()(const float* row, int64_t index, int64_t piece, bool& finite) const {
    if (!outliers.count) return row;
    float* copy = copies + piece * k;
    std::memcpy(copy, row, size_t(k) * sizeof(float));
    for (int64_t j = 0; j < outliers.count; ++j) {
      const int64_t column = outliers.columns[j];
      finite = finite && std::isfinite(row[column]);
      gathered[index * outliers.count + j] = row[column];
      copy[column] = 0;
    }
    return copy;
  }
};

struct Int8Preparation {
  const Kernels& kernels;
  const Matrix& weight;
  qc_activation activation;
  const ActivationRange* range;
  const OutlierSplit& split;
  const InputRows& x;
  LinearJob& job;
  // The quantizer's output for the rows of a block, a set for every piece of preparation.
  unsigned char* rows_scratch;
  int64_t rows_scratch_bytes, padded_k;

  int64_t activation_block() const { return activation == QC_ACT_INT8_BLOCK ? kActivationBlock : weight.k; }
  int64_t activation_blocks() const { return ceil_div(weight.k, activation_block()); }

  // Rows of one block, quantized and laid side by side.
  void prepare(int64_t block, int64_t piece) const {
    const int64_t R = job.block_rows, segments = job.segments;
    unsigned char* const scratch = rows_scratch + piece * R * rows_scratch_bytes;
    float* sa = const_cast<float*>(job.sa) + block * segments * R;
    int32_t* sums = const_cast<int32_t*>(job.sums) + block * segments * R;
    const int32_t zero = symmetric_zero(weight.bits) + code_bias(weight.bits);

    for (int64_t r = 0; r < R; ++r) {
      int8_t* row = reinterpret_cast<int8_t*>(scratch + r * rows_scratch_bytes);
      float* row_sa = reinterpret_cast<float*>(row + padded_k);
      int32_t* row_sums = reinterpret_cast<int32_t*>(row_sa + activation_blocks());
      const int64_t source = block * R + r;
      bool finite = true;
      if (source < job.rows) {
        const float* values = split(x(source, piece), source, piece, finite);
        finite &= kernels.quantize_row(values, weight.k, activation_block(), job.segment, range, row, row_sa, row_sums);
        std::memset(row + weight.k, 0, size_t(padded_k - weight.k));
      } else {
        std::memset(row, 0, size_t(rows_scratch_bytes));
      }
      for (int64_t s = 0; s < segments; ++s) {
        const float scale = row_sa[s * job.segment / activation_block()];
        sa[s * R + r] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
        // Symmetric: the whole correction; it may wrap, as the sum that it corrects.
        const uint32_t sum = uint32_t(row_sums[s]);
        sums[s * R + r] = int32_t(weight.zeros ? sum : 0u - uint32_t(zero) * sum);
      }
    }
    unsigned char* const packed = static_cast<unsigned char*>(const_cast<void*>(job.x)) + block * job.x_block_bytes;
    switch (R) {
      case 1: std::memcpy(packed, scratch, size_t(padded_k)); break;
      case 4: interleave<4>(scratch, packed); break;
      case 6: interleave<6>(scratch, packed); break;
      case 8: interleave<8>(scratch, packed); break;
      default: interleave<0>(scratch, packed); break;
    }
  }

  // Fours of columns of all rows side by side. Rows: of a block, 0 for any number.
  template <int Rows>
  void interleave(const unsigned char* from, unsigned char* to) const {
    const int64_t R = Rows ? Rows : job.block_rows;
    for (int64_t k = 0; k < padded_k; k += 4) {
      for (int64_t r = 0; r < R; ++r, to += 4) std::memcpy(to, from + r * rows_scratch_bytes + k, 4);
    }
  }
};

struct FloatPreparation {
  const Matrix& weight;
  const OutlierSplit& split;
  const InputRows& x;
  LinearJob& job;
  int64_t padded_k;

  void prepare(int64_t block, int64_t piece) const {
    const int64_t R = job.block_rows;
    float* packed = reinterpret_cast<float*>(static_cast<unsigned char*>(const_cast<void*>(job.x)) +
                                             block * job.x_block_bytes);
    std::memset(packed, 0, size_t(job.x_block_bytes));
    for (int64_t r = 0; r < R && block * R + r < job.rows; ++r) {
      bool finite = true;
      const float* row = split(x(block * R + r, piece), block * R + r, piece, finite);
      if (!finite || !all_finite(row, weight.k)) {
        for (int64_t k = 0; k < padded_k; ++k) packed[k * R + r] = std::numeric_limits<float>::quiet_NaN();
      } else if (R == 1) {
        std::memcpy(packed, row, size_t(weight.k) * sizeof(float));
      } else {
        for (int64_t k = 0; k < weight.k; ++k) packed[k * R + r] = row[k];
      }
    }
  }

  static bool all_finite(const float* row, int64_t k) {
    uint32_t found = 0;
    for (int64_t i = 0; i < k; ++i) {
      uint32_t bits;
      std::memcpy(&bits, row + i, 4);
      found |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    return !found;
  }
};

// Cuts tiles (and, where those are few, row blocks) into pieces and runs the kernels on each.
// False when memory ran out.
bool run_pieces(const Workers& workers, const Kernels& kernels, LinearFunction product, const PanelFunctions* panel,
                const LinearJob& job, const OutputEdges& edges) {
  std::atomic<bool> memory{true};
  const auto whole = [&](const LinearJob& job, int64_t tile, int64_t tile_end, int64_t block, int64_t block_end) {
    if (!panel) {
      product(job, tile, tile_end, block, block_end);
    } else if (!run_panels(*panel, job, tile, tile_end, block, block_end)) {
      memory.store(false, std::memory_order_relaxed);
      return;
    }
    if (!job.outlier_count) return;
    kernels.add_outliers(job, tile, tile_end, block * job.block_rows, std::min(block_end * job.block_rows, job.rows));
  };
  const auto kernel = [&](int64_t tile, int64_t tile_end, int64_t block, int64_t block_end) {
    if (!edges.compute(job, tile, tile_end, block, block_end, whole)) memory.store(false, std::memory_order_relaxed);
  };
  const Matrix& w = job.weight;
  const int64_t tiles = edges.tiles(w), tile_bytes = edges.tile_bytes(w);
  const int64_t blocks = ceil_div(job.rows, job.block_rows);
  if (stays_on_caller(w, job.rows)) {
    kernel(0, tiles, 0, blocks);
    return memory;
  }
  // Some claims for each thread, so that none waits long for another's last.
  const int64_t wanted = workers.threads > 1 ? 4 * int64_t(workers.threads) : 1;
  const int64_t most_bytes = job.rows <= kFewRows ? kStreamBytes : kPieceBytes;
  int64_t tiles_per_piece = std::clamp<int64_t>(tiles / wanted, 1, std::max<int64_t>(most_bytes / tile_bytes, 1));
  // A panel stays in the cache whatever the piece.
  if (panel) tiles_per_piece = ceil_div(std::clamp<int64_t>(tiles / (4 * wanted), 1, kPanelsPiece), kPanelTiles) * kPanelTiles;
  const int64_t tile_pieces = ceil_div(tiles, tiles_per_piece);
  const int64_t row_cuts = tile_pieces < wanted ? std::min(blocks, ceil_div(wanted, tile_pieces)) : 1;
  const int64_t blocks_per_piece = ceil_div(blocks, row_cuts);
  const int64_t row_pieces = ceil_div(blocks, blocks_per_piece);
  workers.run(tile_pieces * row_pieces, [&](int64_t i) {
    const int64_t tile = i / row_pieces * tiles_per_piece, block = i % row_pieces * blocks_per_piece;
    kernel(tile, std::min(tile + tiles_per_piece, tiles), block, std::min(block + blocks_per_piece, blocks));
  });
  return memory;
}

// Prepares and computes up to a sweep's worth of rows.
bool run_sweep(const Kernels& kernels, const Workers& workers, const Matrix& weight, qc_activation activation,
               int64_t rows, const float* x, const float* bias, float* y, const LinearExtras& extras) {
  const bool integer = activation != QC_ACT_FLOAT;
  const int64_t chunk = weight.codebooks ? kVqChunk : kChunk;
  const int64_t padded_k = ceil_div(weight.k, chunk) * chunk;

  LinearJob job{};
  job.weight = weight;
  job.rows = rows;
  const PanelFunctions* const panel = integer && kernels.panel && rows >= kernels.panel->least_rows ? kernels.panel : nullptr;
  job.block_rows = panel     ? choose_block_rows(panel->block_rows, rows, kPanelBlock)
                   : integer ? choose_block_rows(kernels.int8_block_rows, rows, kDecodedBlock)
                             : choose_block_rows(kernels.float_block_rows, rows, kDecodedBlock);
  const int64_t blocks = ceil_div(rows, job.block_rows);
  job.x_block_bytes = job.block_rows * padded_k * (integer ? 1 : int64_t(sizeof(float)));
  const bool blocks_of_row = activation == QC_ACT_INT8_BLOCK || weight.codebooks;
  job.segment = weight.group ? weight.group : blocks_of_row ? kActivationBlock : weight.k;
  job.segments = ceil_div(weight.k, job.segment);
  job.groups_per_segment = weight.group ? 1 : 0;
  job.offset = extras.offset;
  job.bias = bias;
  job.y = y;
  job.y_stride = output_columns(weight, extras.edges);
  job.full_range = extras.range && extras.range->low < -127;
  job.outlier_count = extras.outliers.count;
  job.outliers = extras.outliers.weights;

  const bool prepare_in_parallel = rows * weight.k >= kPrepareElements;
  const int64_t prepare_pieces = prepare_in_parallel ? std::min<int64_t>(blocks, 4 * int64_t(workers.threads)) : 1;
  const int64_t values = blocks * job.block_rows * job.segments;
  const int64_t row_bytes = ceil_div(padded_k + 4 * (ceil_div(weight.k, kActivationBlock) + job.segments), 64) * 64;
  Parts parts;
  const int64_t x_at = parts.add(blocks * job.x_block_bytes);
  const int64_t sa_at = parts.add(integer ? values * 4 : 0);
  const int64_t sums_at = parts.add(integer ? values * 4 : 0);
  const int64_t rows_at = parts.add(integer ? prepare_pieces * job.block_rows * row_bytes : 0);
  const int64_t gathered_at = parts.add(rows * job.outlier_count * int64_t(sizeof(float)));
  const int64_t copies_at = parts.add(job.outlier_count ? prepare_pieces * weight.k * int64_t(sizeof(float)) : 0);
  const int64_t normed_at = parts.add(extras.edges.norm ? prepare_pieces * weight.k * int64_t(sizeof(float)) : 0);
  const ScratchLease lease(parts.size());
  if (!lease.data()) return false;
  job.x = lease.data() + x_at;
  job.sa = reinterpret_cast<const float*>(lease.data() + sa_at);
  job.sums = reinterpret_cast<const int32_t*>(lease.data() + sums_at);
  const OutlierSplit split{extras.outliers, weight.k, reinterpret_cast<float*>(lease.data() + gathered_at),
                           reinterpret_cast<float*>(lease.data() + copies_at)};
  job.outlier_x = split.gathered;
  const InputRows input{*kernels.edges, extras.edges, weight.k, x, reinterpret_cast<float*>(lease.data() + normed_at)};

  const int64_t blocks_per_piece = ceil_div(blocks, prepare_pieces);
  const auto prepare_all = [&](auto&& prepare) {
    workers.run(prepare_pieces, [&](int64_t piece) {
      const int64_t end = std::min(blocks, (piece + 1) * blocks_per_piece);
      for (int64_t block = piece * blocks_per_piece; block < end; ++block) prepare(block, piece);
    });
  };
  if (integer) {
    const Int8Preparation preparation{kernels, weight, activation, extras.range,           split,
                                      input,   job,    lease.data() + rows_at, row_bytes, padded_k};
    prepare_all([&](int64_t block, int64_t piece) { preparation.prepare(block, piece); });
  } else {
    const FloatPreparation preparation{weight, split, input, job, padded_k};
    prepare_all([&](int64_t block, int64_t piece) { preparation.prepare(block, piece); });
  }
  return run_pieces(workers, kernels,
             weight.codebooks ? integer ? kernels.vq_int8 : kernels.vq_float
             : integer        ? kernels.linear_int8
                              : kernels.linear_float,
             panel, job, OutputEdges{*kernels.edges, extras.edges});
}

}  // namespace

bool stays_on_caller(const Matrix& weight, int64_t rows) {
  const double products = double(weight.n) * double(weight.k) * double(rows);
  return weight.tiles * weight.tile_bytes < kSmallBytes && products < double(kSmallProducts);
}

bool run_linear(const Kernels& kernels, const Workers& workers, const Matrix& weight, qc_activation activation,
                int64_t rows, const float* x, const float* bias, float* y, const LinearExtras& extras) {
  // Prepared activations of a sweep stay in the cache; more rows take another sweep over the weights.
  const int64_t row_bytes = weight.k * (activation == QC_ACT_FLOAT ? int64_t(sizeof(float)) : 1);
  const int64_t sweeps = ceil_div(rows, std::clamp<int64_t>(kActivationBytes / row_bytes, 96, 1536));
  const int64_t sweep = ceil_div(ceil_div(rows, std::max<int64_t>(sweeps, 1)), kBlockRows) * kBlockRows;
  const int64_t columns = output_columns(weight, extras.edges);
  LinearExtras own = extras;
  for (int64_t begin = 0; begin < rows; begin += sweep) {
    if (extras.edges.residual) own.edges.residual = extras.edges.residual + begin * columns;
    if (!run_sweep(kernels, workers, weight, activation, std::min(sweep, rows - begin), x + begin * weight.k, bias,
                   y + begin * columns, own)) {
      return false;
    }
  }
  return true;
}

}  // namespace qc
