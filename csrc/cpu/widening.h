// Weights in any type that is stored, widened to float32 in registers, and where a matrix has the
// rows of a file. Unnamed namespace: see isa.h.
#pragma once

#include "cpu/block_formats.h"
#include "stored.h"

namespace cptool::cpu {
namespace {

constexpr int kPart = 16;  // weights that are widened together
constexpr int kPartVectors = kPart / kLanes;

// Vector v of sixteen signed bytes, as float32.
inline Vector widened_bytes(Bytes bytes, int v) {
#if defined(__AVX512F__)
  (void)v;
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#elif defined(__AVX2__)
  const __m128i all = (__m128i)bytes;
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v ? _mm_unpackhi_epi64(all, all) : all));
#else
  typedef int8_t Four __attribute__((vector_size(kLanes)));
  Four four;
  std::memcpy(&four, reinterpret_cast<const char*>(&bytes) + v * kLanes, sizeof four);
  return __builtin_convertvector(four, Vector);
#endif
}

inline Vector all_lanes(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  return value - Vector{};  // not a sum, for -0 + 0 is 0
#endif
}

// A block of a quantised type, widened part by part.
template <class Type>
struct Widening {
  static constexpr int kWeights = Type::kWeights, kBytes = Type::kBytes, kRun = Type::kRun;
  // Whether a block has one scale, and begins with it and its shift, if there is one, in float16.
  static constexpr bool kTwoHalves = Type::kWeights == Type::kGroup;

  void begin(const uint8_t* from) {
    block = from;
    Type::scales(block, scale, shift);
  }
  void begin(const uint8_t* from, float first, float second) {
    block = from;
    scale[0] = first;
    shift[0] = second;
  }
  void widen(int run, int part, Vector (&weights)[kPartVectors]) const {
    const int group = (run * kRun + part * kPart) / Type::kGroup;
    const Vector by = all_lanes(scale[group]);
    const auto scaled = [&](Vector whole) {
      if constexpr (Type::kShifted) return multiply_add(by, whole, all_lanes(shift[group]));
      return by * whole;
    };
#if defined(__AVX512F__)
    if constexpr (Type::kIndexed) {  // scale the table, and take each weight from it
      const Vector table = scaled(widened_bytes(load_bytes(Type::kTable), 0));
      __m512i indices = _mm512_cvtepu8_epi32((__m128i)load_bytes(Type::indices(block, run, part)));
      if (Type::half(part)) indices = _mm512_srli_epi32(indices, 4);
      weights[0] = _mm512_permutexvar_ps(indices, table);  // by their four lowest bits
      return;
    }
#endif
    const Bytes integers = Type::integers(block, run, part);
#pragma GCC unroll 4
    for (int v = 0; v < kPartVectors; ++v) weights[v] = scaled(widened_bytes(integers, v));
  }

  const uint8_t* block;
  float scale[Type::kWeights / Type::kGroup], shift[Type::kWeights / Type::kGroup];
};

template <class T>
struct WideningHalves {  // bfloat16 or float16
  static constexpr int kWeights = 32, kBytes = 64, kRun = 32;
  static constexpr bool kTwoHalves = false;

  void begin(const uint8_t* from) { block = from; }
  void widen(int, int part, Vector (&weights)[kPartVectors]) const {
    const T* from = reinterpret_cast<const T*>(block) + part * kPart;
#pragma GCC unroll 4
    for (int v = 0; v < kPartVectors; ++v) weights[v] = load(from + v * kLanes);
  }

  const uint8_t* block;
};

// Returns run(Block) for the encoding.
template <class Run>
inline void with_block(Encoding encoding, const Run& run) {
  switch (encoding) {
    case Encoding::kFloat32:
      return;
    case Encoding::kBFloat16:
      return run(WideningHalves<BFloat16>{});
    case Encoding::kFloat16:
      return run(WideningHalves<Float16>{});
    case Encoding::kQ4_0:
      return run(Widening<Q4<8>>{});
    case Encoding::kQ4_1:
      return run(Widening<Q4<0>>{});
    case Encoding::kQ5_0:
      return run(Widening<Q5<16>>{});
    case Encoding::kQ5_1:
      return run(Widening<Q5<0>>{});
    case Encoding::kQ8_0:
      return run(Widening<Q8>{});
    case Encoding::kQ2_K:
      return run(Widening<Q2K>{});
    case Encoding::kQ3_K:
      return run(Widening<Q3K>{});
    case Encoding::kQ4_K:
      return run(Widening<Q4K>{});
    case Encoding::kQ5_K:
      return run(Widening<Q5K>{});
    case Encoding::kQ6_K:
      return run(Widening<Q6K>{});
    case Encoding::kIQ4_NL:
      return run(Widening<IQ4NL>{});
    case Encoding::kIQ4_XS:
      return run(Widening<IQ4XS>{});
  }
}

// Where the file's row `row` belongs in the matrix (StoredMatrix::head_dim).
inline int64_t place_of(const StoredMatrix& w, int64_t row) {
  if (w.head_dim == 0) return row;
  const int64_t in_head = row % w.head_dim;
  return row - in_head + in_head / 2 + in_head % 2 * (w.head_dim / 2);
}

// Which row of the file is the matrix's row `row`.
inline int64_t row_of(const StoredMatrix& w, int64_t row) {
  if (w.head_dim == 0) return row;
  const int64_t in_head = row % w.head_dim, half = w.head_dim / 2;
  return row - in_head + 2 * (in_head % half) + in_head / half;
}

}  // namespace
}  // namespace cptool::cpu
