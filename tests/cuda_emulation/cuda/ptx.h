// Replaces csrc/cuda/ptx.h in the emulation: the same wrappers, written from the PTX ISA manual.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "fibers.h"

namespace cptool::cuda::ptx {

using emulation::shared_address;

inline void cp_async_16(uint32_t to, const void* from, bool held) {
  using namespace emulation;
  check_readable(from, held ? 16 : 0, 16);
  const Copy copy = {shared_pointer(to, 16, 16), static_cast<const uint8_t*>(from), held ? 16u : 0u,
                     held ? 0u : 16u, current->group};
  copy_begins(to, 16, current->group);
  if (random_bits() % 2) {
    current->copies.push_back(copy);  // as late as the wait
  } else {
    drop(copy);  // at once
  }
}

inline void cp_async_commit() { ++emulation::current->group; }

template <int kPending>
void cp_async_wait() {
  emulation::drop_copies(emulation::current->group - kPending);
}

struct Ldmatrix {
  uint32_t row;
  bool transposed;
  uint32_t (*to)[4];

  // Its reads are noted before, each lane's its own.
  UNREPORTED static void run(void* const* lanes) {
    const uint8_t* rows[4][8];
    for (int i = 0; i < 32; ++i) {
      const uint32_t address = static_cast<Ldmatrix*>(lanes[i])->row;
      rows[i / 8][i % 8] = emulation::shared_pointer(address, 16, 16);
    }
    for (int j = 0; j < 4; ++j) {
      // A matrix is fetched in one step if its rows are in different groups of four banks.
      int times[8] = {}, most = 0;
      for (int i = 0; i < 8; ++i) {
        const uint32_t address = static_cast<Ldmatrix*>(lanes[8 * j + i])->row;
        most = std::max(most, ++times[address / 16 % 8]);
      }
      emulation::counters.bank_conflicts += most - 1;
    }
    for (int i = 0; i < 32; ++i) {
      Ldmatrix& mine = *static_cast<Ldmatrix*>(lanes[i]);
      for (int j = 0; j < 4; ++j) {
        uint16_t element[2];
        for (int e = 0; e < 2; ++e) {
          const int row = mine.transposed ? 2 * (i % 4) + e : i / 4;
          const int column = mine.transposed ? i / 4 : 2 * (i % 4) + e;
          std::memcpy(&element[e], rows[j][row] + 2 * column, 2);
        }
        (*mine.to)[j] = element[0] | static_cast<uint32_t>(element[1]) << 16;
      }
    }
  }
};

inline void ldmatrix_x4(uint32_t (&to)[4], uint32_t row) {
  Ldmatrix mine = {row, false, &to};
  emulation::touch(emulation::shared_pointer(row, 16, 16), 16, false);
  emulation::warp_collective(0xffffffffu, Ldmatrix::run, &mine, "ldmatrix");
}

inline void ldmatrix_x4_transposed(uint32_t (&to)[4], uint32_t row) {
  Ldmatrix mine = {row, true, &to};
  emulation::touch(emulation::shared_pointer(row, 16, 16), 16, false);
  emulation::warp_collective(0xffffffffu, Ldmatrix::run, &mine, "ldmatrix");
}

template <class T>
UNREPORTED float element(uint32_t both, int half) {
  const uint16_t bits = static_cast<uint16_t>(both >> (16 * half));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float({bits});
  } else {
    static_assert(std::is_same_v<T, __half>);
    __half value;
    std::memcpy(&value, &bits, 2);
    return __half2float(value);
  }
}

template <class T>
struct Mma {
  float (*d)[4];
  const uint32_t (*a)[4];
  uint32_t b0, b1;

  UNREPORTED static void run(void* const* lanes) {
    float a[16][16], b[16][8], d[16][8];
    for (int i = 0; i < 32; ++i) {
      const Mma& mine = *static_cast<const Mma*>(lanes[i]);
      const int g = i / 4, t = i % 4;
      for (int e = 0; e < 2; ++e) {
        a[g][2 * t + e] = element<T>((*mine.a)[0], e);
        a[g + 8][2 * t + e] = element<T>((*mine.a)[1], e);
        a[g][2 * t + 8 + e] = element<T>((*mine.a)[2], e);
        a[g + 8][2 * t + 8 + e] = element<T>((*mine.a)[3], e);
        b[2 * t + e][g] = element<T>(mine.b0, e);
        b[2 * t + 8 + e][g] = element<T>(mine.b1, e);
        d[g][2 * t + e] = (*mine.d)[e];
        d[g + 8][2 * t + e] = (*mine.d)[2 + e];
      }
    }
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    for (int i = 0; i < 32; ++i) {
      const Mma& mine = *static_cast<const Mma*>(lanes[i]);
      const int g = i / 4, t = i % 4;
      for (int e = 0; e < 2; ++e) {
        (*mine.d)[e] = d[g][2 * t + e];
        (*mine.d)[2 + e] = d[g + 8][2 * t + e];
      }
    }
  }
};

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma<T> mine = {&d, &a, b0, b1};
  emulation::warp_collective(0xffffffffu, Mma<T>::run, &mine, "mma");
}

template <class T>
uint32_t pack(float low, float high) {
  uint16_t bits[2];
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    bits[0] = __float2bfloat16_rn(low).bits, bits[1] = __float2bfloat16_rn(high).bits;
  } else {
    static_assert(std::is_same_v<T, __half>);
    const __half both[2] = {__float2half_rn(low), __float2half_rn(high)};
    std::memcpy(bits, both, 4);
  }
  return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
}

inline float exp2_approx(float x) { return exp2f(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

}  // namespace cptool::cuda::ptx
