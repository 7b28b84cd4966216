// Every ISA that this CPU executes against the generic one, bit for bit, over generated calls, each buffer against an
// inaccessible page at either end. For architectures that no Python runs on here (tests/runtime/test_neon.py); it runs on any.
//
//   compare_kernels [CASES [SEED]]
//   compare_kernels isas                    what qc_cpu_features, qc_isas and qc_isa say, a line each
//   compare_kernels canary BUFFER ISA       BUFFER (codes, scales, books, x or y) is too short: that must kill the program
//
// Prints a digest of the generic results (equal on every machine) and "N of M kernels exercised". Exit code 1: a difference.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <sstream>

#include "cases.h"
#include "guarded.h"

namespace {

#if defined(__aarch64__)
constexpr int kKnownIsas = 3;
#elif defined(__x86_64__)
constexpr int kKnownIsas = 6;
#else
constexpr int kKnownIsas = 1;
#endif

// Guarded copies of a case's arrays; y is made anew for every call.
struct Buffers {
  Guarded codes, zeros, scales, codebooks, codebook_scales, x, bias, range_zero, range_offset, columns, outliers, indices, y;
};
Buffers buffers;
int64_t calls = 0;

// Null for an empty array.
template <class T>
const T* placed(Guarded& buffer, const std::vector<T>& values, size_t missing = 0) {
  if (values.empty()) return nullptr;
  return reinterpret_cast<const T*>(buffer.place(values.data(), (values.size() - missing) * sizeof(T)));
}

[[noreturn]] void stop(const Case& c, const char* isa, const char* what) {
  std::printf("%s, %s: %s (%s)\n", c.name().c_str(), isa, what, guard_at_end ? "last bytes guarded" : "first bytes guarded");
  std::exit(1);
}

// y of the linear op of a case, or of its embedding. `cut`: the buffer that is too short.
std::vector<float> result(const Case& c, const char* isa, bool embedding = false, const std::string& cut = "") {
  Buffers& b = buffers;
  const Form& f = c.form;
  const uint8_t* codes = placed(b.codes, c.codes, cut == "codes" ? 64 : 0);
  const uint16_t* scales = placed(b.scales, c.scales, cut == "scales" ? 4 : 0);
  const qc_weight weight = {c.n, c.k, f.bits, f.group, codes, scales, placed(b.zeros, c.zeros)};
  const qc_vq_weight vq = {c.n,          c.k,     f.dim, f.centroids, f.block_rows, f.block_columns, f.group, codes,
                           placed(b.codebooks, c.codebooks, cut == "books" ? 1 : 0),
                           placed(b.codebook_scales, c.codebook_scales), scales};
  const qc_context context = {c.threads > 1 ? qc_pool_parallel_for : nullptr, nullptr, c.threads, isa};
  const int64_t* indices = placed(b.indices, c.indices);
  const int64_t values = embedding ? int64_t(c.indices.size()) * c.k : c.rows * c.n;
  const size_t bytes = size_t(values) * sizeof(float) - (cut == "y" ? 4 : 0);
  float* y = reinterpret_cast<float*>(b.y.place(bytes));
  std::memset(y, 0x5a, bytes);
  int32_t code;
  if (embedding) {
    const int64_t count = int64_t(c.indices.size());
    code = f.op == Form::kVq ? qc_embedding_vq(&context, &vq, count, indices, y)
                             : qc_embedding_nbit(&context, &weight, count, indices, y);
  } else {
    const float* x = placed(b.x, c.x, cut == "x" ? 1 : 0);
    const float* bias = placed(b.bias, c.bias);
    const qc_activation_range levels = {c.range_scale, placed(b.range_zero, c.range_zero),
                                        placed(b.range_offset, c.range_offset)};
    const qc_activation_range* range = f.activation == QC_ACT_INT8_STATIC ? &levels : nullptr;
    if (f.op == Form::kVq) {
      code = qc_linear_vq(&context, &vq, f.activation, nullptr, c.rows, x, bias, y);
    } else if (f.op == Form::kExperts) {
      code = qc_linear_experts_nbit(&context, &weight, c.experts, f.activation, c.rows, x, indices, bias, y);
    } else if (f.op == Form::kMixed) {
      const qc_outliers outliers = {int64_t(c.columns.size()), placed(b.columns, c.columns), placed(b.outliers, c.outliers)};
      code = qc_linear_mixed(&context, &weight, f.activation, range, &outliers, c.rows, x, bias, y);
    } else {
      code = qc_linear_nbit(&context, &weight, f.activation, range, nullptr, c.rows, x, bias, y);
    }
  }
  if (code) stop(c, isa, qc_last_error());
  if (!b.y.intact()) stop(c, isa, "written beyond y");
  ++calls;
  return std::vector<float>(y, y + values);
}

void expect_same(const Case& c, const char* isa, const std::vector<float>& got, const std::vector<float>& want) {
  if (want.empty() || std::memcmp(got.data(), want.data(), want.size() * sizeof(float)) == 0) return;
  size_t at = 0;
  while (std::memcmp(&got[at], &want[at], sizeof(float)) == 0) ++at;
  char text[120];
  std::snprintf(text, sizeof text, "differs first at y[%zu] = %a, generic gives %a", at, double(got[at]), double(want[at]));
  stop(c, isa, text);
}

std::vector<std::string> isas() {
  std::vector<std::string> out;
  std::istringstream names(qc_isas());
  for (std::string name; std::getline(names, name, ',');) out.push_back(name);
  return out;
}

int compare(int64_t count, uint64_t seed) {
  const std::vector<Form> forms = all_forms();
  const std::vector<std::string> names = isas();
  std::set<std::pair<std::string, std::string>> exercised;
  uint64_t digest = 0xcbf29ce484222325u;
  const auto add = [&](const std::vector<float>& y) {
    for (const float value : y) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      digest = (digest ^ bits) * 0x100000001b3u;
    }
  };
  const auto run = [&](const Case& c, bool counts) {
    guard_at_end = true;
    const std::vector<float> want = result(c, "generic");
    add(want);
    for (const bool at_end : {true, false}) {
      guard_at_end = at_end;
      for (const std::string& isa : names) {
        expect_same(c, isa.c_str(), result(c, isa.c_str()), want);
        if (counts) exercised.insert({isa, c.form.name()});
      }
      if (c.form.op == Form::kVq || c.form.op == Form::kLinear) {
        const std::vector<float> rows = result(c, "generic", true);
        if (at_end) add(rows);
      }
    }
  };
  for (int64_t i = 0; i < count; ++i) {
    Random random(seed * 1000003 + uint64_t(i));
    const int64_t form = i % int64_t(forms.size()), round = i / int64_t(forms.size());
    run(random_case(forms[size_t(form)], (form + round) % 21, random), true);
  }
  Random random(seed);
  const std::vector<Case> special = special_cases(random);
  for (const Case& c : special) run(c, false);
  std::printf("digest %016" PRIx64 "\n", digest);
  std::printf("%" PRId64 " cases, %" PRId64 " calls\n", count + int64_t(special.size()), calls);
  std::printf("%zu of %zu kernels exercised (%s)\n", exercised.size(), kKnownIsas * forms.size(), qc_isas());
  return 0;
}

int canary(const std::string& buffer, const char* isa) {
  const Form affine = {Form::kLinear, QC_ACT_INT8_BLOCK, 32, 4, false, 0, 0, 0, 0};
  const Form vq = {Form::kVq, QC_ACT_INT8_BLOCK, 128, 8, false, 2, 64, 16, 128};
  Random random(1);
  const Case c = make_case(buffer == "books" ? vq : affine, 16, 256, 4, random);
  result(c, isa, false, buffer);
  std::puts("nothing noticed");
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  if (mode == "isas") {
    std::printf("%s\n%s\n%s\n", qc_cpu_features(), qc_isas(), qc_isa());
    return 0;
  }
  if (mode == "canary" && count == 4) return canary(arguments[2], arguments[3]);
  const int64_t cases = count > 1 ? std::atoll(arguments[1]) : 1000;
  if (cases < 1) {
    std::fputs("compare_kernels [CASES [SEED]] | isas | canary BUFFER ISA\n", stderr);
    return 2;
  }
  return compare(cases, count > 2 ? uint64_t(std::atoll(arguments[2])) : 1);
}
