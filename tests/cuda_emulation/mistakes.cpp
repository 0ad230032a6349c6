// Small correct and wrong kernels, which show what the emulation detects. Each function returns
// null, "wrong result", or the emulation's message.
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/ptx.h"

using namespace cptool::cuda;

namespace {

constexpr int kThreads = 64;

bool races = false;  // are looked for

std::string message;

// Runs `kernel(input, output)` and compares its output with `expected(i)`.
template <class Kernel, class Expected>
const char* compare(uint64_t seed, Kernel kernel, Expected expected) {
  alignas(16) int32_t input[4 * kThreads];
  int32_t output[4 * kThreads] = {};
  for (int i = 0; i < 4 * kThreads; ++i) input[i] = i * i;
  emulation::options.seed = seed;
  emulation::options.races = races;
  try {
    emulation::run_grid(1, kThreads, 1024, [&] { kernel(input, output); });
  } catch (const std::exception& error) {
    return (message = error.what()).c_str();
  }
  for (int i = 0; i < kThreads; ++i) {
    if (output[i] != expected(i)) return "wrong result";
  }
  return nullptr;
}

int square(int i) { return i * i; }

// The element of another thread, through shared memory.
void reverse(const int32_t* input, int32_t* output, bool with_barrier) {
  int32_t* shared = reinterpret_cast<int32_t*>(dynamic_shared());
  const int i = threadIdx.x;
  shared[i] = input[i];
  if (with_barrier) __syncthreads();
  output[i] = shared[kThreads - 1 - i];
}

// Four elements of another thread, copied in two groups of which `pending` may be in flight.
template <int kPending>
void copy(const int32_t* input, int32_t* output, bool wait) {
  const int i = threadIdx.x, other = kThreads - 1 - i;
  const int32_t* shared = reinterpret_cast<int32_t*>(dynamic_shared());
  ptx::cp_async_16(16 * i, input + 4 * i, true);
  ptx::cp_async_commit();
  ptx::cp_async_commit();  // an empty group counts as well
  if (wait) ptx::cp_async_wait<kPending>();
  __syncthreads();
  output[i] = shared[4 * other];
  ptx::cp_async_wait<0>();
}

// The element of another lane, through shared memory.
template <class Between>
void reverse_in_warp(const int32_t* input, int32_t* output, Between between) {
  int32_t* shared = reinterpret_cast<int32_t*>(dynamic_shared());
  const int i = threadIdx.x;
  shared[i] = input[i];
  between();
  output[i] = shared[i / 32 * 32 + 31 - i % 32];
}

// Each warp's sum of its threads' numbers.
void warp_sums(int32_t* output) {
  int sum = static_cast<int>(threadIdx.x);
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  output[threadIdx.x] = sum;
}

// The product of the matrices a[i][k] = i + k and b[k][n] = k - n by mma, against plain loops.
bool multiplies() {
  const int lane = emulation::current->lane;
  __nv_bfloat16* a = reinterpret_cast<__nv_bfloat16*>(dynamic_shared());
  __nv_bfloat16* b = a + 16 * 16;  // [16, 8]
  if (threadIdx.x < 8) {
    for (int i = 32 * lane; i < 32 * lane + 32; ++i) a[i] = __float2bfloat16_rn(i / 16 + i % 16);
    for (int i = 16 * lane; i < 16 * lane + 16; ++i) b[i] = __float2bfloat16_rn(i / 8 - i % 8);
  }
  __syncthreads();
  uint32_t rows[4], columns[4];
  ptx::ldmatrix_x4(rows, ptx::shared_address(a + lane % 16 * 16 + lane / 16 * 8));
  ptx::ldmatrix_x4_transposed(columns, ptx::shared_address(b + lane % 16 * 8));
  float product[4] = {};
  ptx::mma_m16n8k16<__nv_bfloat16>(product, rows, columns[0], columns[1]);
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    float expected = 0;
    for (int k = 0; k < 16; ++k) expected += (row + k) * (k - column);
    if (product[e] != expected) return false;
  }
  return true;
}

}  // namespace

extern "C" {

void look_for_races(bool look) { races = look; }

const char* reversed(uint64_t seed) {
  return compare(
      seed, [](auto in, auto out) { reverse(in, out, true); },
      [](int i) { return square(kThreads - 1 - i); });
}

const char* without_a_barrier(uint64_t seed) {
  return compare(
      seed, [](auto in, auto out) { reverse(in, out, false); },
      [](int i) { return square(kThreads - 1 - i); });
}

const char* reversed_in_warps(uint64_t seed) {
  return compare(
      seed, [](auto in, auto out) { reverse_in_warp(in, out, [] { __syncwarp(); }); },
      [](int i) { return square(i / 32 * 32 + 31 - i % 32); });
}

// Nothing orders accesses to memory but a barrier: not a shuffle either.
const char* without_a_syncwarp(uint64_t seed) {
  return compare(
      seed,
      [](auto in, auto out) {
        reverse_in_warp(in, out, [] { __shfl_xor_sync(0xffffffffu, 1, 1); });
      },
      [](int i) { return square(i / 32 * 32 + 31 - i % 32); });
}

const char* half_a_syncwarp(uint64_t seed) {
  return compare(
      seed,
      [](auto in, auto out) {
        reverse_in_warp(in, out, [] { __syncwarp(threadIdx.x % 2 ? 0xaaaaaaaau : 0x55555555u); });
      },
      [](int i) { return square(i / 32 * 32 + 31 - i % 32); });
}

const char* copied(uint64_t seed) {
  return compare(
      seed, [](auto in, auto out) { copy<1>(in, out, true); },
      [](int i) { return square(4 * (kThreads - 1 - i)); });
}

const char* without_a_wait(uint64_t seed) {
  return compare(
      seed, [](auto in, auto out) { copy<1>(in, out, false); },
      [](int i) { return square(4 * (kThreads - 1 - i)); });
}

const char* waits_for_too_few(uint64_t seed) {
  return compare(
      seed, [](auto in, auto out) { copy<2>(in, out, true); },
      [](int i) { return square(4 * (kThreads - 1 - i)); });
}

// Reads its neighbours' elements while one of them already writes the next ones.
const char* overwrites_too_early(uint64_t seed) {
  return compare(
      seed,
      [](auto in, auto out) {
        int32_t* shared = reinterpret_cast<int32_t*>(dynamic_shared());
        const int i = threadIdx.x;
        shared[i] = in[i];
        __syncthreads();
        out[i] = shared[kThreads - 1 - i];
        shared[i] = 0;
      },
      [](int i) { return square(kThreads - 1 - i); });
}

const char* sums_of_warps(uint64_t seed) {
  return compare(
      seed, [](auto, auto out) { warp_sums(out); },
      [](int i) { return i < 32 ? 31 * 16 : 31 * 16 + 32 * 32; });
}

const char* multiplied(uint64_t seed) {
  return compare(
      seed, [](auto, auto out) { out[threadIdx.x] = multiplies(); }, [](int) { return 1; });
}

const char* half_a_barrier(uint64_t seed) {
  return compare(
      seed,
      [](auto, auto) {
        if (threadIdx.x >= 32) __syncthreads();
      },
      square);
}

const char* divergent_collectives(uint64_t seed) {
  return compare(
      seed,
      [](auto, auto) {
        if (threadIdx.x % 2 == 0) {
          __syncwarp();
        } else {
          __shfl_xor_sync(0xffffffffu, 1, 1);
        }
      },
      square);
}

const char* unaligned_row(uint64_t seed) {
  return compare(
      seed,
      [](auto, auto) {
        uint32_t to[4];
        ptx::ldmatrix_x4(to, 8);
      },
      square);
}

const char* row_outside(uint64_t seed) {
  return compare(
      seed,
      [](auto, auto) {
        uint32_t to[4];
        ptx::ldmatrix_x4(to, 1024);
      },
      square);
}

const char* ends_with_copies(uint64_t seed) {
  return compare(
      seed,
      [](auto in, auto) {
        for (int i = 0; i < 4; ++i) ptx::cp_async_16(16 * threadIdx.x, in + 4 * threadIdx.x, true);
        ptx::cp_async_commit();
      },
      square);
}
}
