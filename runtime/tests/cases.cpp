#include "cases.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>

namespace {

constexpr int32_t kBits[] = {8, 4, 3, 2};
constexpr int32_t kGroups[] = {32, 64, 128, 0};
constexpr int32_t kCodebooks[][2] = {{1, 4}, {1, 8}, {1, 16}, {2, 16}, {2, 32}, {2, 64}, {2, 256}, {4, 256}};
// Rows, columns and group: blocks that are one tile, several, all of the matrix, and of several groups.
constexpr int32_t kBlocks[][3] = {{16, 128, 128}, {32, 256, 64}, {0, 0, 32},   {128, 256, 0},
                                  {16, 0, 64},    {0, 128, 0},   {32, 256, 32}};
constexpr int64_t kColumns[] = {1,  3,  4,  5,   8,   9,   16,  31,  32,  33,  63,  64,
                                65, 96, 97, 127, 128, 129, 160, 255, 256, 257, 384, 520};

template <class T>
std::vector<T> filled(int64_t count, Random& random, T (*value)(Random&)) {
  std::vector<T> out(static_cast<size_t>(count));
  for (T& v : out) v = value(random);
  return out;
}

uint8_t any_byte(Random& random) { return uint8_t(random.below(256)); }
uint8_t extreme_byte(Random& random) {
  constexpr uint8_t kBytes[] = {0x00, 0x7f, 0x80, 0xff};
  return kBytes[random.below(4)];
}

// fp16 scales: of usual magnitude; any finite number; anything at all, NaN and infinities too.
uint16_t usual_scale(Random& random) { return uint16_t(random.from(0x1400, 0x2e00) | (random.below(2) << 15)); }
uint16_t finite_scale(Random& random) { return uint16_t(random.below(0x7c00) | (random.below(2) << 15)); }
uint16_t any_scale(Random& random) { return uint16_t(random.below(1 << 16)); }
auto scale_kind(Random& random) { return random.one_in(12) ? any_scale : random.one_in(6) ? finite_scale : usual_scale; }

float unit(Random& random) { return random.unit(); }

void fill_row(float* x, int64_t k, Random& random) {
  constexpr float kMagnitudes[] = {1.0f, 1.0f, 1.0f, 50.0f, 1e-3f, 1e20f, 3e38f, 1e-38f, 1e-44f};
  const float magnitude = kMagnitudes[random.below(std::size(kMagnitudes))];
  for (int64_t i = 0; i < k; ++i) x[i] = random.unit() * magnitude;
  switch (random.below(10)) {
    case 0: std::fill(x, x + k, random.one_in(2) ? 0.0f : -0.0f); break;
    case 1: std::fill(x, x + std::min<int64_t>(k, 128), 0.0f); break;
    case 2:  // Halves of the step: rounded half to even.
      for (int64_t i = 0; i < k; ++i) x[i] = float(random.from(-254, 254)) / 2 * 0.25f;
      x[random.below(k)] = 127 * 0.25f;
      break;
    case 3:
      for (int64_t i = 0; i < k; ++i) x[i] = random.one_in(2) ? magnitude : -magnitude;
      break;
    case 4: {
      if (!random.one_in(3)) break;
      constexpr float kInfinity = std::numeric_limits<float>::infinity();
      const float values[] = {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()};
      x[random.below(k)] = values[random.below(3)];
      break;
    }
    default: break;
  }
}

}  // namespace

constexpr const char* kOps[] = {"linear", "mixed", "experts", "vq"};

std::string Form::op_name() const { return std::string(kOps[op]) + (activation == QC_ACT_FLOAT ? "-float" : "-int8"); }

std::string Form::name() const {
  constexpr const char* kActivations[] = {"float", "token", "block", "static"};
  std::string out = std::string(kOps[op]) + " ";
  if (op == kVq) {
    out += "vq" + std::to_string(dim) + "d" + std::to_string(centroids) + "-b" + std::to_string(block_rows) + "x" +
           std::to_string(block_columns);
  } else {
    out += "int" + std::to_string(bits) + (asymmetric ? "-asym" : "-sym");
  }
  return out + "-g" + std::to_string(group) + "-" + kActivations[activation];
}

std::vector<Form> all_forms() {
  std::vector<Form> out;
  for (const Form::Op op : {Form::kLinear, Form::kMixed, Form::kExperts}) {
    for (const int32_t bits : kBits) {
      for (const int32_t group : kGroups) {
        for (const bool asymmetric : {false, true}) {
          for (int32_t activation = 0; activation < (op == Form::kExperts ? 3 : 4); ++activation) {
            out.push_back({op, activation, group, bits, asymmetric, 0, 0, 0, 0});
          }
        }
      }
    }
  }
  for (const auto& book : kCodebooks) {
    for (const auto& block : kBlocks) {
      for (const int32_t activation : {QC_ACT_FLOAT, QC_ACT_INT8_BLOCK}) {
        out.push_back({Form::kVq, activation, block[2], 8, false, book[0], book[1], block[0], block[1]});
      }
    }
  }
  return out;
}

std::string Case::name() const {
  return form.name() + ", n " + std::to_string(n) + ", k " + std::to_string(k) + ", rows " + std::to_string(rows) +
         ", threads " + std::to_string(threads) +
         (has_edges() ? ", gate " + std::to_string(gate) + (norm.empty() ? "" : ", norm") + (residual.empty() ? "" : ", residual")
                      : "");
}

Case make_case(const Form& form, int64_t n, int64_t k, int64_t rows, Random& random) {
  Case c;
  c.form = form, c.n = n, c.k = k, c.rows = rows;
  const auto byte = random.one_in(5) ? extreme_byte : any_byte;
  if (form.op == Form::kExperts) c.experts = random.from(1, 4);
  if (form.op == Form::kVq) {
    const int64_t books = qc_vq_codebook_count(n, k, form.block_rows, form.block_columns);
    c.codes = filled(qc_vq_codes_bytes(n, k, form.dim, form.centroids), random, byte);
    for (uint8_t entry : filled(books * form.dim * form.centroids, random, byte)) c.codebooks.push_back(int8_t(entry));
    c.codebook_scales = filled(books, random, scale_kind(random));
  } else {
    c.codes = filled(c.experts * qc_codes_bytes(n, k, form.bits), random, byte);
    if (form.asymmetric) c.zeros = filled(c.experts * qc_zeros_bytes(n, k, form.bits, form.group), random, byte);
  }
  c.scales = filled(c.experts * qc_scales_count(n, k, form.group), random, scale_kind(random));
  c.x.resize(size_t(rows * k));
  for (int64_t row = 0; row < rows; ++row) fill_row(c.x.data() + row * k, k, random);
  if (random.one_in(2)) c.bias = filled(c.experts * n, random, unit);
  if (form.activation == QC_ACT_INT8_STATIC) {
    c.range_scale = 0.0078125f * float(random.from(1, 99));
    if (random.one_in(2)) {
      c.range_zero = {int8_t(random.from(-128, 127))};
      c.range_offset = filled(n, random, unit);
    }
  }
  if (form.op == Form::kMixed) {
    for (int64_t left = random.from(0, 5); left > 0; --left) c.columns.push_back(int32_t(random.below(k)));
    std::sort(c.columns.begin(), c.columns.end());
    c.columns.erase(std::unique(c.columns.begin(), c.columns.end()), c.columns.end());
    c.outliers = filled((n + 15) / 16 * 16 * int64_t(c.columns.size()), random, scale_kind(random));
  }
  for (int64_t i = 0; i < std::max<int64_t>(rows, 3); ++i) {
    c.indices.push_back(random.below(form.op == Form::kExperts ? c.experts : n));
  }
  return c;
}

int64_t some_rows(int64_t i, Random& random) { return random.one_in(6) ? random.from(21, 70) : i % 21; }

Case random_case(const Form& form, int64_t rows, Random& random) {
  const int64_t n = random.one_in(8) ? random.from(1, 140) : random.from(1, 40);
  int64_t k = random.one_in(2) ? kColumns[random.below(std::size(kColumns))] : random.from(1, 300);
  if (random.one_in(30)) k = random.from(500, 1100);
  if ((form.op != Form::kLinear && form.op != Form::kVq) || !random.one_in(3)) return make_case(form, n, k, rows, random);
  const int32_t gate = int32_t(random.from(QC_GATE_NONE, QC_GATE_GELU));
  Case c = make_case(form, gate == QC_GATE_NONE ? n : 32 * random.from(1, 4), k, rows, random);
  c.gate = gate;
  if (random.one_in(2)) {
    c.norm = filled(k, random, unit);
    c.epsilon = random.one_in(4) ? 0.0f : 1e-5f;
  }
  if (random.one_in(2)) c.residual = filled(rows * c.columns_of_y(), random, unit);
  return c;
}

std::vector<Case> special_cases(Random& random) {
  std::vector<Case> out;
  const auto longest = [&](int32_t activation, bool asymmetric, int32_t bits, uint8_t code, uint8_t zero) {
    const int64_t level = asymmetric ? (1 << bits) - 1 : 1 << (bits - 1);
    const int64_t k = std::min<int64_t>(INT32_MAX / ((activation == QC_ACT_INT8_STATIC ? 128 : 127) * level), 140000);
    Case c = make_case({Form::kLinear, activation, 0, bits, asymmetric, 0, 0, 0, 0}, 2, k, 3, random);
    std::fill(c.codes.begin(), c.codes.end(), code);
    std::fill(c.zeros.begin(), c.zeros.end(), zero);
    for (uint16_t& scale : c.scales) scale = usual_scale(random);
    std::fill(c.x.begin(), c.x.begin() + k, -1000.0f);
    std::fill(c.x.begin() + k, c.x.begin() + 2 * k, 1000.0f);
    if (activation == QC_ACT_INT8_STATIC) c.range_zero = {-37}, c.range_offset = {0.5f, -0.5f};
    out.push_back(c);
  };
  longest(QC_ACT_INT8_STATIC, true, 8, 0x80, 0x7f);
  longest(QC_ACT_INT8_STATIC, true, 8, 0x7f, 0x80);
  longest(QC_ACT_INT8_TOKEN, false, 8, 0x80, 0);
  longest(QC_ACT_INT8_TOKEN, true, 4, 0xff, 0);
  longest(QC_ACT_INT8_TOKEN, false, 3, 0xff, 0);
  const auto cut = [&](const Form& form, int64_t n, int64_t k, int64_t rows) {
    Case c = make_case(form, n, k, rows, random);
    c.threads = 3;
    out.push_back(c);
  };
  cut({Form::kLinear, QC_ACT_INT8_BLOCK, 64, 8, true, 0, 0, 0, 0}, 1101, 600, 9);
  cut({Form::kMixed, QC_ACT_FLOAT, 64, 8, false, 0, 0, 0, 0}, 1101, 600, 5);
  cut({Form::kExperts, QC_ACT_INT8_TOKEN, 128, 8, false, 0, 0, 0, 0}, 1101, 600, 13);
  cut({Form::kVq, QC_ACT_INT8_BLOCK, 128, 8, false, 2, 64, 32, 256}, 3001, 600, 3);
  cut({Form::kLinear, QC_ACT_INT8_TOKEN, 0, 8, false, 0, 0, 0, 0}, 203, 1040, 61);
  cut({Form::kLinear, QC_ACT_INT8_BLOCK, 32, 4, true, 0, 0, 0, 0}, 203, 1040, 61);
  cut({Form::kMixed, QC_ACT_INT8_STATIC, 128, 3, false, 0, 0, 0, 0}, 203, 1000, 40);
  cut({Form::kVq, QC_ACT_INT8_BLOCK, 0, 8, false, 4, 256, 128, 256}, 203, 1000, 40);
  return out;
}
