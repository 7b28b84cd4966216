// What a machine's kernels can be held against: loops that read memory and do nothing else, and an int8 dot product that
// stays in registers. Compiled for the machine it runs on (kernels_limit.py); threads are those of the caller's pool.
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

typedef void (*ParallelFor)(void* pool, void (*body)(void* user, size_t index), size_t count, void* user);

// ---- reading

template <int Bytes>
struct Vector {
  typedef uint64_t type __attribute__((vector_size(Bytes)));
};

// Eight vectors a step from `Streams` places at once; `Ahead` > 0: each stream asks for the line that far ahead.
template <int Bytes, int Streams, int Ahead>
void read(const uint8_t* data, size_t bytes) {
  using V = typename Vector<Bytes>::type;
  constexpr int kVectors = 8 / Streams;  // of a stream in a step
  constexpr size_t kStep = size_t(Bytes) * kVectors;
  const size_t part = bytes / Streams / kStep * kStep;
  V sums[8] = {};
  for (size_t at = 0; at < part; at += kStep) {
    for (int s = 0; s < Streams; ++s) {
      const uint8_t* from = data + s * part + at;
      if (Ahead > 0) {
        for (size_t line = 0; line < kStep; line += 64) __builtin_prefetch(from + Ahead + line);
      }
      for (int v = 0; v < kVectors; ++v) sums[s * kVectors + v] |= *reinterpret_cast<const V*>(from + v * Bytes);
    }
  }
  for (size_t at = part * Streams; at + Bytes <= bytes; at += Bytes) sums[0] |= *reinterpret_cast<const V*>(data + at);
  // The reads have a use. (The sums themselves stay in registers: nothing takes their address.)
  for (int v = 1; v < 8; ++v) sums[0] |= sums[v];
  uint64_t folded = 0;
  for (int i = 0; i < Bytes / 8; ++i) folded |= sums[0][i];
  __asm__ volatile("" ::"r"(folded));
}

struct ReadLoop {
  const char* name;
  void (*run)(const uint8_t* data, size_t bytes);
};

const ReadLoop kReads[] = {
#if defined(__AVX512F__)
    {"512 bit, 1 stream", read<64, 1, 0>},
    {"512 bit, 1 stream, prefetch", read<64, 1, 2048>},
    {"512 bit, 4 streams", read<64, 4, 0>},
    {"512 bit, 4 streams, prefetch", read<64, 4, 2048>},
#endif
#if defined(__AVX2__)
    {"256 bit, 1 stream", read<32, 1, 0>},
    {"256 bit, 4 streams, prefetch", read<32, 4, 2048>},
#endif
#if !defined(__AVX2__)
    {"128 bit, 1 stream", read<16, 1, 0>},
    {"128 bit, 1 stream, prefetch", read<16, 1, 2048>},
    {"128 bit, 4 streams", read<16, 4, 0>},
    {"128 bit, 4 streams, prefetch", read<16, 4, 2048>},
#endif
};

struct ReadJob {
  const ReadLoop* loop;
  const uint8_t* data;
  size_t bytes, pieces;
};

void read_piece(void* user, size_t index) {
  const ReadJob& job = *static_cast<const ReadJob*>(user);
  const size_t lines = job.bytes / 64;
  const size_t begin = lines * index / job.pieces, end = lines * (index + 1) / job.pieces;
  job.loop->run(job.data + 64 * begin, 64 * (end - begin));
}

// ---- computing

constexpr int kChains = 12;       // independent accumulators: enough for two instructions a cycle of latency 4
constexpr int64_t kTimes = 4096;  // of each in a piece of work

#if defined(__AVX512VNNI__)
const char kDot[] = "vpdpbusd, 512 bit";
constexpr int kOps = 128;
void dot(void*, size_t) {
  __m512i sums[kChains] = {}, a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  for (int64_t t = 0; t < kTimes; ++t) {
    for (__m512i& sum : sums) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
}
#elif defined(__AVXVNNI__)
const char kDot[] = "vpdpbusd, 256 bit";
constexpr int kOps = 64;
void dot(void*, size_t) {
  __m256i sums[kChains] = {}, a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  for (int64_t t = 0; t < kTimes; ++t) {
    for (__m256i& sum : sums) __asm__ volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  }
}
#elif defined(__AVX2__)
const char kDot[] = "vpmaddubsw, vpmaddwd, vpaddd, 256 bit";
constexpr int kOps = 64;
void dot(void*, size_t) {
  __m256i sums[kChains] = {}, a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5), one = _mm256_set1_epi16(1), product;
  for (int64_t t = 0; t < kTimes; ++t) {
    for (__m256i& sum : sums) {
      __asm__ volatile("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
                       : "+x"(sum), "=&x"(product)
                       : "x"(a), "x"(b), "x"(one));
    }
  }
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
const char kDot[] = "smmla";
constexpr int kOps = 64;
void dot(void*, size_t) {
  int32x4_t sums[kChains] = {};
  const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
  for (int64_t t = 0; t < kTimes; ++t) {
    for (int32x4_t& sum : sums) __asm__ volatile("smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(b));
  }
}
#elif defined(__ARM_FEATURE_DOTPROD)
const char kDot[] = "sdot";
constexpr int kOps = 32;
void dot(void*, size_t) {
  int32x4_t sums[kChains] = {};
  const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
  for (int64_t t = 0; t < kTimes; ++t) {
    for (int32x4_t& sum : sums) __asm__ volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(b));
  }
}
#else
const char kDot[] = "";
constexpr int kOps = 0;
void dot(void*, size_t) {}
#endif

}  // namespace

extern "C" {

int32_t limit_read_loops(void) { return sizeof(kReads) / sizeof(kReads[0]); }
const char* limit_read_name(int32_t loop) { return kReads[loop].name; }

// Reads data[bytes] once, in `pieces` that the threads of the pool claim.
void limit_read(ParallelFor parallel_for, int32_t loop, const uint8_t* data, size_t bytes, size_t pieces) {
  ReadJob job{&kReads[loop], data, bytes, pieces};
  parallel_for(nullptr, read_piece, pieces, &job);
}

// The instructions of the dot product; empty where this machine has none that is known here.
const char* limit_dot_name(void) { return kDot; }

// Runs `pieces` of work; returns the operations done: two for each product of two int8.
int64_t limit_dot(ParallelFor parallel_for, size_t pieces) {
  parallel_for(nullptr, dot, pieces, nullptr);
  return int64_t(pieces) * kTimes * kChains * kOps;
}
}
