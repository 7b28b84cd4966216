// Attention over a cache in every ISA that this CPU executes, against the generic one, bit for bit, over generated calls: on one
// thread and on several, and row by row. It runs where no Python does.
//
//   compare_attention [CASES [SEED]]
//
// Prints a digest of the results, which is equal on every machine. Exit code 1: a difference.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "calls.h"

namespace {

// One call and the arrays that it reads; the cache is filled up to `past`.
struct Attention {
  qc_attention_call call{};
  std::vector<float> q, k, v, key, value, cosines, sines, bias;

  explicit Attention(Random& random) {
    constexpr int64_t kRows[] = {1, 1, 2, 3, 5, 14, 40};
    qc_attention_call& c = call;
    c.kv_heads = int32_t(random.from(1, 3));
    c.heads = c.kv_heads * int32_t(random.from(1, 6));
    c.head_size = int32_t(random.one_in(2) ? 16 * random.from(1, 8) : random.from(1, 100));
    c.rotary = random.one_in(3) ? 0 : c.head_size / (random.one_in(2) ? 2 : 4) * 2;
    c.interleaved = random.one_in(3);
    c.window = random.one_in(3) ? int32_t(random.from(1, 200)) : 0;
    c.scale = 0.5f;
    c.rows = kRows[random.below(7)];
    c.past = random.one_in(3) ? random.from(0, 20) : random.from(100, 400);
    c.capacity = c.past_capacity = c.past + c.rows + random.below(3);
    c.q_stride = int64_t{c.heads} * c.head_size;
    c.k_stride = c.v_stride = int64_t{c.kv_heads} * c.head_size;
    c.rotary_rows = c.past + c.rows;
    q = values(c.rows * c.q_stride, random), k = values(c.rows * c.k_stride, random), v = values(c.rows * c.v_stride, random);
    key = values(c.capacity * c.k_stride, random), value = values(c.capacity * c.v_stride, random);
    cosines = values(c.rotary_rows * c.rotary / 2, random), sines = values(c.rotary_rows * c.rotary / 2, random);
    if (random.one_in(3)) {
      bias = values(c.rows * (c.past + c.rows), random);
      c.bias_row_stride = c.past + c.rows;
    }
  }

  static std::vector<float> values(int64_t count, Random& random) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float& x : out) x = 2 * random.unit();
    return out;
  }

  // The result, and behind it the cache. `at_once`: rows of a call.
  std::vector<float> run(const char* isa, int32_t threads, int64_t at_once) const {
    std::vector<float> y(q.size()), new_key = key, new_value = value;
    const qc_context context = {threads > 1 ? qc_pool_parallel_for : nullptr, nullptr, threads, isa};
    for (int64_t row = 0; row < call.rows; row += at_once) {
      qc_attention_call c = call;
      c.past += row;
      c.rows = std::min(at_once, call.rows - row);
      c.q = q.data() + row * c.q_stride, c.k = k.data() + row * c.k_stride, c.v = v.data() + row * c.v_stride;
      c.past_key = c.present_key = new_key.data(), c.past_value = c.present_value = new_value.data();
      c.cosines = cosines.data(), c.sines = sines.data();
      if (!bias.empty()) c.bias = bias.data() + row * c.bias_row_stride;
      c.y = y.data() + row * c.q_stride;
      if (qc_attention(&context, &c)) {
        std::printf("%s\n", qc_last_error());
        std::exit(1);
      }
    }
    y.insert(y.end(), new_key.begin(), new_key.end());
    y.insert(y.end(), new_value.begin(), new_value.end());
    return y;
  }
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t cases = count > 1 ? std::atoll(arguments[1]) : 100;
  Random random(count > 2 ? uint64_t(std::atoll(arguments[2])) : 1);
  uint64_t digest = 0xcbf29ce484222325u;
  qc_pool_set_threads(3);
  for (int64_t i = 0; i < cases; ++i) {
    const Attention attention(random);
    const std::vector<float> want = attention.run("generic", 1, attention.call.rows);
    for (const std::string& isa : isas()) {
      if (same(attention.run(isa.c_str(), 1, attention.call.rows), want) &&
          same(attention.run(isa.c_str(), 3, attention.call.rows), want) && same(attention.run(isa.c_str(), 1, 1), want)) {
        continue;
      }
      std::printf("case %" PRId64 ": %s differs\n", i, isa.c_str());
      return 1;
    }
    for (const float value : want) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      digest = (digest ^ bits) * 0x100000001b3u;
    }
  }
  std::printf("digest %016" PRIx64 "\n%" PRId64 " cases\n", digest, cases);
  return 0;
}
