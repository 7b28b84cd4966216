// Every ISA that this CPU executes against the generic one, bit for bit, over generated calls, each buffer against an
// inaccessible page at either end, and then at addresses that are multiples of nothing but what the C types ask for (codes,
// codebooks and zero points: of 1; fp16: of 2; float, columns: of 4; indices: of 8). It runs where no Python does.
//
//   compare_kernels [CASES [SEED]]
//   compare_kernels isas                    what qc_cpu_features, qc_isas and qc_isa say, a line each
//   compare_kernels canary BUFFER ISA       BUFFER (codes, scales, books, x or y) is too short: that must kill the program
//
// Prints a digest of the generic results (equal on every machine), the ops that each ISA ran and "N of M kernels exercised".
// Exit code 1: a difference.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "calls.h"
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
  Guarded codes, zeros, scales, codebooks, codebook_scales, x, bias, range_zero, range_offset, columns, outliers, indices, norm,
      residual, y;
};
Buffers buffers;
int64_t calls = 0;

// Null for an empty array.
template <class T>
const T* placed(Guarded& buffer, const std::vector<T>& values, size_t missing = 0) {
  if (values.empty()) return nullptr;
  return reinterpret_cast<const T*>(buffer.place(values.data(), (values.size() - missing) * sizeof(T), alignof(T)));
}

[[noreturn]] void stop(const Case& c, const char* isa, const char* what) {
  constexpr const char* kPlaces[] = {"last bytes guarded", "first bytes guarded", "odd addresses"};
  std::printf("%s, %s: %s (%s)\n", c.name().c_str(), isa, what, kPlaces[int(placement)]);
  std::exit(1);
}

// y of the linear op of a case, or of its embedding. `cut`: the buffer that is too short.
std::vector<float> result(const Case& c, const char* isa, bool embedding = false, const std::string& cut = "") {
  Buffers& b = buffers;
  const Arrays arrays = {placed(b.codes, c.codes, cut == "codes" ? 64 : 0),
                         placed(b.zeros, c.zeros),
                         placed(b.scales, c.scales, cut == "scales" ? 4 : 0),
                         placed(b.codebook_scales, c.codebook_scales),
                         placed(b.outliers, c.outliers),
                         placed(b.codebooks, c.codebooks, cut == "books" ? 1 : 0),
                         placed(b.range_zero, c.range_zero),
                         placed(b.columns, c.columns),
                         placed(b.indices, c.indices),
                         placed(b.x, c.x, cut == "x" ? 1 : 0),
                         placed(b.bias, c.bias),
                         placed(b.range_offset, c.range_offset),
                         placed(b.norm, c.norm),
                         placed(b.residual, c.residual)};
  const qc_context context = {c.threads > 1 ? qc_pool_parallel_for : nullptr, nullptr, c.threads, isa};
  const int64_t values = values_of(c, embedding);
  const size_t bytes = size_t(values) * sizeof(float) - (cut == "y" ? 4 : 0);
  float* y = reinterpret_cast<float*>(b.y.place(bytes, alignof(float)));
  std::memset(y, 0x5a, bytes);
  if (call(c, arrays, context, embedding, y)) stop(c, isa, qc_last_error());
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

int compare(int64_t count, uint64_t seed) {
  const std::vector<Form> forms = all_forms();
  const std::vector<std::string> names = isas();
  std::map<std::string, std::set<std::string>> ops;  // of each ISA
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
    placement = Placement::kEnd;
    const std::vector<float> want = result(c, "generic");
    add(want);
    for (const Placement place : {Placement::kEnd, Placement::kStart, Placement::kOdd}) {
      placement = place;
      for (const std::string& isa : names) {
        expect_same(c, isa.c_str(), result(c, isa.c_str()), want);
        if (counts) exercised.insert({isa, c.form.name()});
        ops[isa].insert(c.form.op_name());
        if (c.has_edges()) ops[isa].insert(c.form.op_name() + "-edges");
      }
      if (c.form.op == Form::kVq || c.form.op == Form::kLinear) {
        const std::vector<float> rows = result(c, "generic", true);
        if (place == Placement::kEnd) add(rows);
        ops["generic"].insert(c.form.op == Form::kVq ? "embedding-vq" : "embedding");
      }
    }
  };
  for (int64_t i = 0; i < count; ++i) {
    Random random(seed * 1000003 + uint64_t(i));
    const int64_t form = i % int64_t(forms.size()), round = i / int64_t(forms.size());
    run(random_case(forms[size_t(form)], some_rows(form + round, random), random), true);
  }
  Random random(seed);
  const std::vector<Case> special = special_cases(random);
  for (const Case& c : special) run(c, false);
  std::printf("digest %016" PRIx64 "\n", digest);
  std::printf("%" PRId64 " cases, %" PRId64 " calls\n", count + int64_t(special.size()), calls);
  for (const auto& [isa, names] : ops) {
    std::printf("exercised %s:", isa.c_str());
    for (const std::string& name : names) std::printf(" %s", name.c_str());
    std::puts("");
  }
  std::printf("%zu of %zu kernels exercised (%s)\n", exercised.size(), kKnownIsas * forms.size(), qc_isas());
  return 0;
}

int canary(const std::string& buffer, const char* isa) {
  const Form affine = {Form::kLinear, QC_ACT_INT8_BLOCK, 32, 4, false, 0, 0, 0, 0};
  const Form vq = {Form::kVq, QC_ACT_INT8_BLOCK, 128, 8, false, 2, 64, 16, 128};
  Random random(1);
  placement = Placement::kEnd;
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
