// GGML's block types: how the weights of a block are stored (llama.cpp, ggml-common.h).
//
// A type is a struct with
//   kWeights, kBytes   of a block
//   kGroup             weights that share a scale: 16 or 32
//   kShifted           whether a weight is scale * integer + shift, not scale * integer
//   kRun               weights of which the same bits of different bytes, or different bits of the
//                      same bytes, are the integers: one step of a loop
//   scales(block, scale, shift)       kWeights / kGroup of each
//   integers(block, run, part)        those of the weights 16 part to 16 part + 15 of a run, signed
//   kIndexed           whether an integer is one of 16, which half a byte names; then
//   kTable             the 16
//   indices(block, run, part), half(part)   16 bytes, and which half of each: 0 is the low one
// Unnamed namespace: see isa.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/vectors.h"

namespace cptool::cpu {
namespace {

inline float half_at(const uint8_t* from) {
  Float16 half;
  std::memcpy(&half, from, sizeof half);
#if defined(__F16C__)
  return _cvtsh_ss(half.bits);
#else
  return to_float(half);
#endif
}

inline uint32_t word_at(const uint8_t* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Bytes load_bytes(const void* from) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return bytes;
}

// The bytes, shifted right by `count` < 8 bits, with other bits in the `count` highest of each.
inline Bytes shifted(Bytes bytes, int count) {
  typedef uint16_t Words __attribute__((vector_size(16)));
  return (Bytes)((Words)bytes >> count);
}

// Bits 4 `part` to 4 `part` + 3 of each byte; part is 0 or 1.
inline Bytes nibbles(const uint8_t* from, int part) {
  return shifted(load_bytes(from), 4 * part) & 15;
}

constexpr int8_t kFromZero[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr int8_t kFromMinusEight[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr int8_t kUneven[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                1,    13,   25,  38,  53,  69,  89,  113};

// The float16 at the beginning of a block of 8 bytes or more, and the one after it. Loaded with the
// bytes behind them, they take no shuffle.
inline void two_halves_at(const uint8_t* from, float* first, float* second) {
#if defined(__F16C__)
  const __m128 halves = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  *first = halves[0];
  *second = halves[1];
#else
  *first = half_at(from);
  *second = half_at(from + 2);
#endif
}

// 16 in byte i where bit i of `bits` is set.
inline Bytes fifth_bits(uint32_t bits) {
  const uint64_t words[2] = {(bits & 0xffu) * 0x0101010101010101u,
                             (bits >> 8 & 0xffu) * 0x0101010101010101u};
  Bytes spread;
  std::memcpy(&spread, words, sizeof spread);
  const Bytes select = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  return (Bytes)((spread & select) == select) & 16;
}

template <int kShift>
struct Q4 {  // Q4_0 (kShift 8: integers are -8 to 7), Q4_1 (0: 0 to 15, with a shift)
  static constexpr int kWeights = 32, kRun = 32, kGroup = 32;
  static constexpr bool kShifted = kShift == 0;
  static constexpr int kHead = kShifted ? 4 : 2, kBytes = kHead + 16;
  static void scales(const uint8_t* block, float* scale, float* shift) {
    two_halves_at(block, scale, shift);
  }
  static constexpr bool kIndexed = true;
  static constexpr const int8_t (&kTable)[16] = kShifted ? kFromZero : kFromMinusEight;
  static const uint8_t* indices(const uint8_t* block, int, int) { return block + kHead; }
  static int half(int part) { return part; }
  static Bytes integers(const uint8_t* block, int, int part) {
    return nibbles(block + kHead, part) - static_cast<uint8_t>(kShift);
  }
};

template <int kShift>
struct Q5 {  // Q5_0 (kShift 16), Q5_1 (0)
  static constexpr int kWeights = 32, kRun = 32, kGroup = 32;
  static constexpr bool kShifted = kShift == 0;
  static constexpr int kHead = kShifted ? 4 : 2, kBytes = kHead + 4 + 16;
  static constexpr bool kIndexed = false;
  static void scales(const uint8_t* block, float* scale, float* shift) {
    two_halves_at(block, scale, shift);
  }
  static Bytes integers(const uint8_t* block, int, int part) {
    const Bytes high = fifth_bits(word_at(block + kHead) >> (16 * part));
    return (nibbles(block + kHead + 4, part) | high) - static_cast<uint8_t>(kShift);
  }
};

struct Q8 {
  static constexpr int kWeights = 32, kRun = 32, kGroup = 32, kBytes = 34;
  static constexpr bool kShifted = false, kIndexed = false;
  static void scales(const uint8_t* block, float* scale, float* shift) {
    two_halves_at(block, scale, shift);
  }
  static Bytes integers(const uint8_t* block, int, int part) {
    return load_bytes(block + 2 + 16 * part);
  }
};

struct Q2K {
  static constexpr int kWeights = 256, kRun = 128, kGroup = 16, kBytes = 84;
  static constexpr bool kShifted = true, kIndexed = false;
  static void scales(const uint8_t* block, float* scale, float* shift) {
    const float d = half_at(block + 80), least = half_at(block + 82);
    for (int i = 0; i < 16; ++i) {
      scale[i] = d * static_cast<float>(block[i] & 15);
      shift[i] = -(least * static_cast<float>(block[i] >> 4));
    }
  }
  static Bytes integers(const uint8_t* block, int run, int part) {
    return shifted(load_bytes(block + 16 + 32 * run + 16 * (part % 2)), part / 2 * 2) & 3;
  }
};

struct Q3K {
  static constexpr int kWeights = 256, kRun = 128, kGroup = 16, kBytes = 110;
  static constexpr bool kShifted = false, kIndexed = false;
  static void scales(const uint8_t* block, float* scale, float*) {
    const uint8_t *low = block + 96, *high = block + 104;
    const float d = half_at(block + 108);
    for (int i = 0; i < 16; ++i) {
      const int bits = (low[i % 8] >> (i / 8 * 4) & 15) | (high[i % 4] >> (i / 4 * 2) & 3) << 4;
      scale[i] = d * static_cast<float>(bits - 32);
    }
  }
  static Bytes integers(const uint8_t* block, int run, int part) {
    const int at = 16 * (part % 2);
    const Bytes low = shifted(load_bytes(block + 32 + 32 * run + at), part / 2 * 2) & 3;
    const Bytes high = shifted(load_bytes(block + at), 4 * run + part / 2) & 1;
    return (low | high << 2) - 4;
  }
};

// Eight 6-bit scales and eight 6-bit minima in twelve bytes, as Q4_K and Q5_K have them.
inline void six_bit_scales(const uint8_t* block, float* scale, float* shift) {
  const float d = half_at(block), least = half_at(block + 2);
  const uint32_t a = word_at(block + 4), b = word_at(block + 8), c = word_at(block + 12);
  const uint32_t words[4] = {a & 0x3f3f3f3fu, (c & 0x0f0f0f0fu) | (a >> 6 & 0x03030303u) << 4,
                             b & 0x3f3f3f3fu, (c >> 4 & 0x0f0f0f0fu) | (b >> 6 & 0x03030303u) << 4};
  uint8_t bytes[16];
  std::memcpy(bytes, words, sizeof bytes);
  for (int i = 0; i < 8; ++i) scale[i] = d * static_cast<float>(bytes[i]);
  for (int i = 0; i < 8; ++i) shift[i] = -(least * static_cast<float>(bytes[8 + i]));
}

struct Q4K {
  static constexpr int kWeights = 256, kRun = 64, kGroup = 32, kBytes = 144;
  static constexpr bool kShifted = true;
  static void scales(const uint8_t* block, float* scale, float* shift) {
    six_bit_scales(block, scale, shift);
  }
  static constexpr bool kIndexed = true;
  static constexpr const int8_t (&kTable)[16] = kFromZero;
  static const uint8_t* indices(const uint8_t* block, int run, int part) {
    return block + 16 + 32 * run + 16 * (part % 2);
  }
  static int half(int part) { return part / 2; }
  static Bytes integers(const uint8_t* block, int run, int part) {
    return nibbles(indices(block, run, part), half(part));
  }
};

struct Q5K {
  static constexpr int kWeights = 256, kRun = 64, kGroup = 32, kBytes = 176;
  static constexpr bool kShifted = true, kIndexed = false;
  static void scales(const uint8_t* block, float* scale, float* shift) {
    six_bit_scales(block, scale, shift);
  }
  static Bytes integers(const uint8_t* block, int run, int part) {
    const int at = 16 * (part % 2);
    const Bytes high = shifted(load_bytes(block + 16 + at), 2 * run + part / 2) & 1;
    return nibbles(block + 48 + 32 * run + at, part / 2) | high << 4;
  }
};

struct Q6K {
  static constexpr int kWeights = 256, kRun = 128, kGroup = 16, kBytes = 210;
  static constexpr bool kShifted = false, kIndexed = false;
  static void scales(const uint8_t* block, float* scale, float*) {
    const float d = half_at(block + 208);
    int8_t factors[16];
    std::memcpy(factors, block + 192, sizeof factors);
    for (int i = 0; i < 16; ++i) scale[i] = d * static_cast<float>(factors[i]);
  }
  static Bytes integers(const uint8_t* block, int run, int part) {
    const int quarter = part / 2, at = 16 * (part % 2);  // of the run
    const Bytes low = nibbles(block + 64 * run + 32 * (quarter % 2) + at, quarter / 2);
    const Bytes high = shifted(load_bytes(block + 128 + 32 * run + at), 2 * quarter) & 3;
    return (low | high << 4) - 32;
  }
};

inline Bytes uneven(Bytes indices) {
#if defined(__AVX2__)
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kUneven));
  return (Bytes)_mm_shuffle_epi8(values, (__m128i)indices);
#else
  Bytes values;
  for (int i = 0; i < 16; ++i) values[i] = static_cast<uint8_t>(kUneven[indices[i]]);
  return values;
#endif
}

struct IQ4NL {
  static constexpr int kWeights = 32, kRun = 32, kGroup = 32, kBytes = 18;
  static constexpr bool kShifted = false;
  static void scales(const uint8_t* block, float* scale, float* shift) {
    two_halves_at(block, scale, shift);
  }
  static constexpr bool kIndexed = true;
  static constexpr const int8_t (&kTable)[16] = kUneven;
  static const uint8_t* indices(const uint8_t* block, int, int) { return block + 2; }
  static int half(int part) { return part; }
  static Bytes integers(const uint8_t* block, int, int part) {
    return uneven(nibbles(block + 2, part));
  }
};

struct IQ4XS {
  static constexpr int kWeights = 256, kRun = 32, kGroup = 32, kBytes = 136;
  static constexpr bool kShifted = false;
  static void scales(const uint8_t* block, float* scale, float*) {
    const float d = half_at(block);
    const uint32_t high = word_at(block) >> 16, low = word_at(block + 4);
    for (int i = 0; i < 8; ++i) {
      const int bits = static_cast<int>((low >> (4 * i) & 15) | (high >> (2 * i) & 3) << 4);
      scale[i] = d * static_cast<float>(bits - 32);
    }
  }
  static constexpr bool kIndexed = true;
  static constexpr const int8_t (&kTable)[16] = kUneven;
  static const uint8_t* indices(const uint8_t* block, int run, int) { return block + 8 + 16 * run; }
  static int half(int part) { return part; }
  static Bytes integers(const uint8_t* block, int run, int part) {
    return uneven(nibbles(block + 8 + 16 * run, part));
  }
};

}  // namespace
}  // namespace cptool::cpu
