// What this machine can do at most: the rates that the benchmarks hold kernels against.
//
// A shared library that ceilings.py compiles for the machine at hand (-march=native) and calls
// between the kernels under test, so that both see the same clock and the same neighbours. Each
// function runs on `threads` threads at once and returns what all of them did in a second, or 0
// where the machine (or the compiler) lacks the instructions.
#include <time.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kAccumulators = 24;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kAccumulators = 12;
#else
constexpr int kVectorBytes = 16, kAccumulators = 12;
#endif
typedef float Vector __attribute__((vector_size(kVectorBytes)));

template <class T>
void keep(T& value) {  // tells the compiler that the value is used, and may change
#if defined(__AVX__)
  asm volatile("" : "+x"(value));
#else
  asm volatile("" : "+m"(value));
#endif
}

#if defined(__AVX512F__)
void keep(Vector& value) { asm volatile("" : "+v"(value)); }
#endif

// What work(thread) on every thread makes in a second. One thread is timed by its own CPU time, as
// in cptool/bench/ceilings.py.
double rate(int threads, double work_of_one, const std::function<void(int)>& work) {
  auto seconds = [=] {
    timespec now;
    clock_gettime(threads > 1 ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
  };
  const double begin = seconds();
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
  return threads * work_of_one / (seconds() - begin);
}

#if defined(__AMX_BF16__)

bool configure_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" ::"m"(config));
  return true;
}

#define LOAD(tile, from) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" tile::"r"(from), "r"(64L) : "memory")
#define MULTIPLY(c, a, b) asm volatile("tdpbf16ps %%tmm" b ", %%tmm" a ", %%tmm" c::)

// 2 x 2 tiles of results: four products, each 16 x 16 x 32 multiply-adds. From registers, or with
// the four operands loaded from a cache each time, as every real product must.
double amx(int64_t steps, int threads, size_t bytes) {
  if (!configure_tiles()) return 0;
  return rate(threads, steps * 4 * 2.0 * 16 * 16 * 32, [=](int) {
    configure_tiles();
    std::vector<char> memory(bytes + 4096 + 64);
    const char* const begin = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 63);
    size_t at = 0;
    asm volatile("tilezero %%tmm4\n tilezero %%tmm5\n tilezero %%tmm6\n tilezero %%tmm7" ::);
    asm volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" ::);
    for (int64_t step = 0; step < steps; ++step) {
      if (bytes > 0) {
        LOAD("4", begin + at);
        LOAD("6", begin + at + 1024);
        LOAD("7", begin + at + 2048);
        LOAD("5", begin + at + 3072);
        at = at + 4096 < bytes ? at + 4096 : 0;
      }
      MULTIPLY("0", "4", "6");
      MULTIPLY("1", "4", "7");
      MULTIPLY("2", "5", "6");
      MULTIPLY("3", "5", "7");
    }
    asm volatile("tilerelease" ::);
  });
}

#endif

}  // namespace

extern "C" {

// Multiply-adds in registers, as many independent ones as hide their latency: flop/s.
double fma_rate(int64_t steps, int threads) {
  return rate(threads, steps * kAccumulators * 2.0 * kVectorBytes / sizeof(float), [=](int) {
    Vector accumulators[kAccumulators] = {};
    Vector factor = {}, term = {};
    keep(factor);
    keep(term);
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
      for (int i = 0; i < kAccumulators; ++i) {
        accumulators[i] = accumulators[i] * factor + term;
        keep(accumulators[i]);
      }
    }
  });
}

// Dot products of pairs of bfloat16 in registers, likewise: flop/s.
double bf16_dot_rate(int64_t steps, int threads) {
#if defined(__AVX512BF16__)
  return rate(threads, steps * kAccumulators * 4.0 * kVectorBytes / sizeof(float), [=](int) {
    Vector accumulators[kAccumulators] = {};
    Vector a = {}, b = {};
    keep(a);
    keep(b);
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
      for (int i = 0; i < kAccumulators; ++i) {
        accumulators[i] = _mm512_dpbf16_ps(accumulators[i], (__m512bh)a, (__m512bh)b);
        keep(accumulators[i]);
      }
    }
  });
#else
  static_cast<void>(steps), static_cast<void>(threads);
  return 0;
#endif
}

#if defined(__AMX_BF16__)
double amx_rate(int64_t steps, int threads) { return amx(steps, threads, 0); }
double amx_l1_rate(int64_t steps, int threads) { return amx(steps, threads, 16 << 10); }
#else
double amx_rate(int64_t, int) { return 0; }
double amx_l1_rate(int64_t, int) { return 0; }
#endif

// Reads `bytes` bytes, divided among the threads, once: bytes/s. Each thread reads four streams:
// one is bound by the latency of its misses.
double read_rate(const char* memory, int64_t bytes, int threads) {
  constexpr int64_t kStep = 8 * kVectorBytes;
  const int64_t stream = bytes / threads / 4 / kStep * kStep, share = 4 * stream;
  return rate(threads, static_cast<double>(share), [=](int thread) {
    typedef int32_t Bits __attribute__((vector_size(kVectorBytes), aligned(4)));
    Bits sum[8] = {};
    const char* const begin = memory + thread * share;
    for (int64_t at = 0; at < stream; at += 2 * kVectorBytes) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        sum[i] ^=
            *reinterpret_cast<const Bits*>(begin + i / 2 * stream + at + i % 2 * kVectorBytes);
      }
    }
    for (int i = 1; i < 8; ++i) sum[0] ^= sum[i];
    asm volatile("" ::"m"(sum[0]));
  });
}

}  // extern "C"
