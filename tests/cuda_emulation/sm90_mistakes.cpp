// One warpgroup and another warp load two matrices by TMA and multiply them, correctly and in wrong
// ways, which shows what the emulation of compute capability 9.0 detects. Each function returns
// null, "wrong result", or the emulation's message.
#include <stdexcept>
#include <vector>

#include "cuda/launch.h"
#include "cuda/sm90/ptx.h"

using namespace cptool;
using namespace cptool::cuda;

namespace {

enum Mistake {
  kNone,
  kNoExpectedBytes,
  kNoInitFence,
  kNoWaitForTheLoad,
  kNoRegisterFence,
  kNoWaitForTheProduct,
  kNoCommit,
  kLoadWhileInFlight,
  kNoProxyFence,
  kFenceOfOneLane,
  kOwnFences,
  kNoInitBarrier,
  kOtherSwizzle,
};

constexpr uint32_t kA = 0, kB = 8192, kBarrier = 16384, kSharedBytes = 16384 + 8;

// a [64, 16] and b [16, 64], of small integers: a product of them is exact.
float a_at(int m, int k) { return static_cast<float>((3 * m + 5 * k) % 7 - 3); }
float b_at(int k, int n) { return static_cast<float>((2 * k + 7 * n) % 9 - 4); }

uint64_t descriptor_of(uint32_t address, uint64_t swizzle) {
  return address >> 4 | uint64_t{8192 >> 4} << 16 | uint64_t{1024 >> 4} << 32 | swizzle << 62;
}

void multiply(const TensorMap& a, const TensorMap& b, float* product, Mistake mistake) {
  const int thread = threadIdx.x;
  if (thread == 0) {
    ptx::mbarrier_init(kBarrier, 1);
    if (mistake != kNoInitFence) ptx::fence_mbarrier_init();
  }
  if (mistake != kNoInitBarrier) __syncthreads();
  if (thread == 128) {
    if (mistake == kNoExpectedBytes) {
      ptx::mbarrier_arrive(kBarrier);
    } else {
      ptx::mbarrier_arrive_expect(kBarrier, 8192 + 16 * 128);
    }
    ptx::load_box(kA, a, 0, 0, 0, kBarrier, ptx::evict_last());
    ptx::load_box(kB, b, 0, 0, 0, kBarrier, ptx::evict_last());
  }
  if (thread >= 128) return;
  if (mistake != kNoWaitForTheLoad) ptx::mbarrier_wait(kBarrier, 0);
  if (mistake == kNoProxyFence || mistake == kFenceOfOneLane || mistake == kOwnFences) {
    // Row 0 of b anew, by threads; b_at(0, n) is not 9.
    uint32_t* row = reinterpret_cast<uint32_t*>(dynamic_shared() + kB);
    if (thread < 32) row[thread] = ptx::pack<__nv_bfloat16>(9, 9);
    if (mistake == kOwnFences) ptx::fence_proxy_async();
    __syncwarp();
    if (mistake == kFenceOfOneLane && thread % 32 == 0) ptx::fence_proxy_async();
    ptx::barrier_sync(1, 128);
  }
  float d[64] = {};
  uint32_t fragments[4];
  for (int i = 0; i < 4; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
    const int column = thread % 4 * 2 + i / 2 * 8;
    fragments[i] = ptx::pack<__nv_bfloat16>(a_at(row, column), a_at(row, column + 1));
  }
  const uint64_t from = descriptor_of(kB, mistake == kOtherSwizzle ? 2 : 1);
  float (&out)[32] = *reinterpret_cast<float (*)[32]>(d);
  if (mistake != kNoRegisterFence) ptx::wgmma_fence();
  ptx::wgmma_registers<__nv_bfloat16>(out, fragments, from);
  if (mistake == kLoadWhileInFlight && thread == 0)
    ptx::load_box(kB, b, 0, 0, 0, kBarrier, ptx::evict_last());
  if (mistake != kNoCommit) ptx::wgmma_commit();
  if (mistake == kNoWaitForTheProduct) {
    ptx::wgmma_wait<1>();
  } else {
    ptx::wgmma_wait<0>();
  }
  for (int i = 0; i < 32; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    product[row * 64 + i / 4 * 8 + thread % 4 * 2 + i % 2] = d[i];
  }
  ptx::wgmma_wait<0>();
}

std::string message;
bool races = false;  // are looked for

const char* run(uint64_t seed, Mistake mistake) {
  std::vector<__nv_bfloat16> a(64 * 64), b(16 * 64);
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 64; ++k) a[m * 64 + k] = __float2bfloat16_rn(a_at(m, k));
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < 64; ++n) b[k * 64 + n] = __float2bfloat16_rn(b_at(k, n));
  std::vector<float> product(64 * 64, -1e9f);
  emulation::options.seed = seed;
  emulation::options.races = races;
  try {
    const auto map = [](const std::vector<__nv_bfloat16>& of, int rows) {
      return tensor_map(ScalarType::kBFloat16, of.data(), rows, 128, 1, 128, 64, 64, 1,
                        static_cast<uint32_t>(rows));
    };
    const TensorMap a_map = map(a, 64), b_map = map(b, 16);
    emulation::run_grid(1, 160, kSharedBytes,
                        [&] { multiply(a_map, b_map, product.data(), mistake); });
  } catch (const std::exception& error) {
    return (message = error.what()).c_str();
  }
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < 64; ++n) {
      float expected = 0;
      for (int k = 0; k < 16; ++k) {
        expected += a_at(m, k) * (mistake == kOwnFences && k == 0 ? 9 : b_at(k, n));
      }
      if (!(product[m * 64 + n] == expected)) return "wrong result";
    }
  return nullptr;
}

}  // namespace

extern "C" {

void look_for_races(bool look) { races = look; }

const char* none(uint64_t seed) { return run(seed, kNone); }
const char* no_expected_bytes(uint64_t seed) { return run(seed, kNoExpectedBytes); }
const char* no_init_fence(uint64_t seed) { return run(seed, kNoInitFence); }
const char* no_wait_for_the_load(uint64_t seed) { return run(seed, kNoWaitForTheLoad); }
const char* no_register_fence(uint64_t seed) { return run(seed, kNoRegisterFence); }
const char* no_wait_for_the_product(uint64_t seed) { return run(seed, kNoWaitForTheProduct); }
const char* no_commit(uint64_t seed) { return run(seed, kNoCommit); }
const char* load_while_in_flight(uint64_t seed) { return run(seed, kLoadWhileInFlight); }
// Right as it is: what the threads wrote has not reached wgmma.
const char* no_proxy_fence(uint64_t seed) { return run(seed, kNoProxyFence); }
// Right but for what other lanes wrote, which has not reached wgmma either.
const char* fence_of_one_lane(uint64_t seed) { return run(seed, kFenceOfOneLane); }
const char* no_init_barrier(uint64_t seed) { return run(seed, kNoInitBarrier); }
const char* own_fences(uint64_t seed) { return run(seed, kOwnFences); }
const char* other_swizzle(uint64_t seed) { return run(seed, kOtherSwizzle); }
}
