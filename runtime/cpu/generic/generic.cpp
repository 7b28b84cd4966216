// The scalar reference: docs/layout.md, "Arithmetic", as it stands. Compiled without ISA flags; lanes are innermost, so
// that a compiler can use whatever vectors the base architecture has.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../kernels.h"
#include "../layout.h"

namespace qc {
namespace {

constexpr int kBlockRows[] = {1, 4, 0};
constexpr int64_t kMaxBlockRows = 4;

bool quantize_row(const float* x, int64_t k, int64_t block, int64_t segment, const ActivationRange* range, int8_t* a,
                  float* sa, int32_t* sums) {
  bool finite = true;
  const int32_t zero = range ? range->zero : 0;
  const float low = range ? float(range->low) : -127.0f, high = range ? float(range->high) : 127.0f;
  for (int64_t begin = 0; begin < k; begin += block) {
    const int64_t end = std::min(k, begin + block);
    float absmax = 0;
    for (int64_t i = begin; i < end; ++i) {
      finite = finite && std::isfinite(x[i]);
      absmax = std::max(absmax, std::fabs(x[i]));
    }
    const float scale = range ? range->scale : absmax / 127.0f;
    *sa++ = scale;
    for (int64_t i = begin; i < end; ++i) {
      // A scale that underflows to 0 makes every term 0, whatever a is.
      const float q = finite && scale > 0 ? std::nearbyint(x[i] / scale) : 0.0f;
      a[i] = int8_t(std::min(std::max(q + float(zero), low), high));
    }
  }
  for (int64_t begin = 0; begin < k; begin += segment) {
    int32_t sum = 0;
    for (int64_t i = begin; i < std::min(k, begin + segment); ++i) sum += a[i];
    *sums++ = sum;
  }
  return finite;
}

// The levels q - Z of one chunk of a tile; columns beyond k come out as some level, and meet zero activations.
struct Chunks {
  const Matrix& w;
  const uint8_t* codes;
  int zero[kTileRows];

  Chunks(const Matrix& weight, int64_t tile) : w(weight), codes(weight.codes + tile * weight.tile_bytes) {}

  void load_zeros(int64_t tile, int64_t group) {
    const uint8_t* zeros = w.zeros ? w.zeros + (tile * w.groups + group) * tile_zero_bytes(w.bits) : nullptr;
    for (int r = 0; r < kTileRows; ++r) zero[r] = zeros ? zero_point(zeros, w.bits, r) : symmetric_zero(w.bits);
  }

  void levels(int64_t chunk, int16_t out[kChunk * kTileRows]) const {
    const uint8_t* p = codes + chunk * chunk_bytes(w.bits);
    uint8_t tail[chunk_bytes(8)] = {};
    if ((chunk + 1) * kChunk > w.k) {  // the last chunk may hold fewer units
      std::memcpy(tail, p, size_t(w.tile_bytes - chunk * chunk_bytes(w.bits)));
      p = tail;
    }
    int8_t q[kChunk * kTileRows];
    decode_chunk(p, w.bits, q);
    for (int64_t c = 0; c < kChunk; ++c) {
      for (int r = 0; r < kTileRows; ++r) out[c * kTileRows + r] = int16_t(q[c * kTileRows + r] - zero[r]);
    }
  }
};

void store(const LinearJob& job, int64_t tile, int64_t row, const float acc[kTileRows]) {
  if (row >= job.rows) return;
  const int64_t first = tile * kTileRows, count = std::min(kTileRows, job.weight.n - first);
  for (int64_t r = 0; r < count; ++r) {
    float value = job.offset ? acc[r] + job.offset[first + r] : acc[r];
    if (job.bias) value += job.bias[first + r];
    // One NaN for all ISAs: which operand's sign and payload survives is not portable.
    job.y[row * job.y_stride + first + r] = std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value;
  }
}

void tile_int8(const LinearJob& job, int64_t tile, int64_t block) {
  const Matrix& w = job.weight;
  const int64_t R = job.block_rows, chunks = ceil_div(w.k, kChunk), per_segment = ceil_div(job.segment, kChunk);
  const int8_t* x = static_cast<const int8_t*>(job.x) + block * job.x_block_bytes;
  Chunks weights(w, tile);
  float acc[kMaxBlockRows][kTileRows] = {};
  int16_t levels[kChunk * kTileRows];
  for (int64_t s = 0; s < job.segments; ++s) {
    const int64_t group = tile * w.groups + s * job.groups_per_segment;
    weights.load_zeros(tile, s * job.groups_per_segment);
    int32_t dot[kMaxBlockRows][kTileRows] = {};
    for (int64_t chunk = s * per_segment; chunk < std::min(chunks, (s + 1) * per_segment); ++chunk) {
      weights.levels(chunk, levels);
      for (int64_t c = 0; c < kChunk; ++c) {
        const int64_t k = chunk * kChunk + c;
        for (int64_t m = 0; m < R; ++m) {
          const int a = x[(k / 4 * R + m) * 4 + k % 4];
          for (int r = 0; r < kTileRows; ++r) dot[m][r] += levels[c * kTileRows + r] * a;
        }
      }
    }
    for (int64_t m = 0; m < R; ++m) {
      const float sa = job.sa[(block * job.segments + s) * R + m];
      for (int r = 0; r < kTileRows; ++r) {
        acc[m][r] = std::fmaf(float(dot[m][r]), half_to_float(w.scales[group * kTileRows + r]) * sa, acc[m][r]);
      }
    }
  }
  for (int64_t m = 0; m < R; ++m) store(job, tile, block * R + m, acc[m]);
}

void tile_float(const LinearJob& job, int64_t tile, int64_t block) {
  const Matrix& w = job.weight;
  const int64_t R = job.block_rows, chunks = ceil_div(w.k, kChunk), per_group = ceil_div(job.segment, kChunk);
  const float* x = reinterpret_cast<const float*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  Chunks weights(w, tile);
  float acc[kMaxBlockRows][kTileRows] = {};
  int16_t levels[kChunk * kTileRows];
  for (int64_t g = 0; g < job.segments; ++g) {
    weights.load_zeros(tile, g);
    float part[kMaxBlockRows][4][kTileRows] = {};
    for (int64_t chunk = g * per_group; chunk < std::min(chunks, (g + 1) * per_group); ++chunk) {
      weights.levels(chunk, levels);
      for (int64_t c = 0; c < kChunk; ++c) {
        for (int64_t m = 0; m < R; ++m) {
          const float value = x[(chunk * kChunk + c) * R + m];
          float* p = part[m][c % 4];
          for (int r = 0; r < kTileRows; ++r) p[r] = std::fmaf(float(levels[c * kTileRows + r]), value, p[r]);
        }
      }
    }
    for (int64_t m = 0; m < R; ++m) {
      for (int r = 0; r < kTileRows; ++r) {
        const float dot = (part[m][0][r] + part[m][1][r]) + (part[m][2][r] + part[m][3][r]);
        acc[m][r] = std::fmaf(dot, half_to_float(w.scales[(tile * w.groups + g) * kTileRows + r]), acc[m][r]);
      }
    }
  }
  for (int64_t m = 0; m < R; ++m) store(job, tile, block * R + m, acc[m]);
}

template <void (*Tile)(const LinearJob&, int64_t, int64_t)>
void each_tile(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t block_begin, int64_t block_end) {
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) Tile(job, tile, block);
  }
}

void add_outliers(const LinearJob& job, int64_t tile_begin, int64_t tile_end, int64_t row_begin, int64_t row_end) {
  const int64_t n = job.weight.n, count = job.outlier_count;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t lanes = std::min(kTileRows, n - tile * kTileRows);
    for (int64_t row = row_begin; row < row_end; ++row) {
      const uint16_t* w = job.outliers + tile * count * kTileRows;
      float* y = job.y + row * n + tile * kTileRows;
      for (int64_t j = 0; j < count; ++j, w += kTileRows) {
        const float x = job.outlier_x[row * count + j];
        for (int64_t r = 0; r < lanes; ++r) y[r] += x * half_to_float(w[r]);
      }
      for (int64_t r = 0; r < lanes; ++r) {
        if (std::isnan(y[r])) y[r] = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
}

}  // namespace

extern const Kernels kGenericKernels = {"generic",    kBlockRows,           kBlockRows,
                                        quantize_row, each_tile<tile_int8>, each_tile<tile_float>,
                                        generic::vq_int8, generic::vq_float, add_outliers};

}  // namespace qc
