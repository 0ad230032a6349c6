// The integers of GGML's blocks as AVX2 takes them to float32 with the fewest instructions: without
// their scales, and in an order of its own within each group of 32.
//
// A type is a struct with
//   kBytes, kBlocks   of a block in the file; blocks of a chunk, which has up to 8 groups
//   kShifted          whether a weight is scale * integer + shift, not scale * integer
//   kStep             groups of a step: group number `i` of every step takes the same instructions
//   weight(v, lane)   which weight of a group is the lane `lane` of its vector v
//   factor(i, v)      what a vector's x is multiplied with, a power of two: its integers come with
//                     the inverse
//   scales(chunk, groups, scale, shifts)  a number per group, which `scale` makes a vector; the
//                     shifts of all eight groups in one vector, in the order of shift_of(lane)
//   kSign             what the shifts are multiplied with: 1 or -1
//   Bits, bits(chunk, step, i), integers(bits, i, v)
//
// Counted: memory delivers the 4.5 bytes of 8 weights of Q4_0 or Q4_K in 0.9 cycles, at 15 GB/s and
// 2.9 GHz. A Zen 3 starts 4 arithmetic instructions of 8 lanes in each cycle; here the 8 weights
// take 3.5, loads and scales apart.
//
// A vector's x underflows in the packed copy below 2^-102, and then loses bits: 2^-122 at most.
// Types whose integers come times 2^24 (InBytes) overflow from |x| of about 2^95 on. Unnamed
// namespace: see isa.h.
#pragma once

#include "cpu/block_formats.h"

namespace cptool::cpu {
namespace {

constexpr int kGroupVectors = 4, kGroupWeights = kGroupVectors * kLanes, kChunkGroups = 8;

inline __m256i load_256(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

inline __m256i twice(const void* from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

inline __m256i all_bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }

// 16 bytes of nibbles as 32 bytes: the low ones, then the high ones. The four highest bits of each
// hold others'.
inline __m256i both_nibbles(const uint8_t* from) {
  return _mm256_srlv_epi32(twice(from), _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
}

// The float16 at the beginning of up to eight blocks; the others are 0. Of eight blocks, each is
// taken from a load that has it in its place and ends within the block.
template <int kBytes>
inline __m256 halves_of_blocks(const uint8_t* from, int blocks) {
  if (blocks == kChunkGroups) {
    const auto at = [&](int i) { return (__m128i)load_bytes(from + i * (kBytes - 2)); };
    const __m128i first =
        _mm_blend_epi16(_mm_blend_epi16(at(0), at(1), 2), _mm_blend_epi16(at(2), at(3), 8), 12);
    const __m128i second =
        _mm_blend_epi16(_mm_blend_epi16(at(4), at(5), 32), _mm_blend_epi16(at(6), at(7), 128), 192);
    return _mm256_cvtph_ps(_mm_blend_epi16(first, second, 240));
  }
  alignas(16) uint16_t halves[kChunkGroups] = {};
  for (int i = 0; i < blocks; ++i) std::memcpy(halves + i, from + i * kBytes, sizeof halves[i]);
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(halves)));
}

// The same for two float16 each: those of the first four blocks, then of the others.
template <int kBytes>
inline void pairs_of_blocks(const uint8_t* from, int blocks, __m256 (&pairs)[2]) {
  __m256i all;
  if (blocks == kChunkGroups) {
    const auto at = [&](int i) { return load_256(from + i * (kBytes - 4)); };
    const __m256i first = _mm256_blend_epi32(_mm256_blend_epi32(at(0), at(1), 2),
                                             _mm256_blend_epi32(at(2), at(3), 8), 12);
    const __m256i second = _mm256_blend_epi32(_mm256_blend_epi32(at(4), at(5), 32),
                                              _mm256_blend_epi32(at(6), at(7), 128), 192);
    all = _mm256_blend_epi32(first, second, 240);
  } else {
    alignas(32) uint32_t words[kChunkGroups] = {};
    for (int i = 0; i < blocks; ++i) std::memcpy(words + i, from + i * kBytes, sizeof words[i]);
    all = _mm256_load_si256(reinterpret_cast<const __m256i*>(words));
  }
  pairs[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(all));
  pairs[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(all, 1));
}

// Types of which a group has one scale.
struct OneScale {
  static constexpr int kScales = kChunkGroups;
  static Vector scale(const float* scales, int group) {
    return _mm256_broadcast_ss(scales + group);
  }
  static constexpr int shift_of(int lane) { return lane; }
  static constexpr float factor(int, int) { return 1; }
};

// Types whose integers are 8-bit numbers first: byte `v` of each 32-bit word is then placed in its
// highest byte, so that conversion gives 2^24 times the number with its sign.
struct InBytes : OneScale {
  using Bits = __m256i;
  static constexpr int weight(int v, int lane) { return 4 * lane + v; }
  static constexpr float kUnit = 0x1p-24f;
  static Vector integers(__m256i bytes, int, int v) {
    const int at = static_cast<int>(0x00808080u | static_cast<unsigned>(v) << 24);
    const __m256i place = _mm256_add_epi32(
        _mm256_set1_epi32(at),
        _mm256_setr_epi32(0, 4 << 24, 8 << 24, 12 << 24, 0, 4 << 24, 8 << 24, 12 << 24));
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, place));
  }
};

// Types with a table of 16 integers, which bfloat16 holds exactly: its two bytes are looked up.
template <const int8_t (&kTable)[16]>
struct FromTable : OneScale {
  struct Bits {
    __m256i first, second;  // bfloat16 of the weights 0 to 7 and 16 to 23, then of the others
  };
  static constexpr int weight(int v, int lane) {
    return lane / 4 * 16 + v / 2 * 8 + lane % 4 * 2 + v % 2;
  }
  struct Halves {
    alignas(16) uint8_t low[16], high[16];
  };
  static constexpr Halves halves() {
    Halves result{};
    for (int i = 0; i < 16; ++i) {
      const int size = kTable[i] < 0 ? -kTable[i] : kTable[i];
      int exponent = 0;
      while (size >> (exponent + 1)) ++exponent;
      const int mantissa = exponent <= 7 ? (size << (7 - exponent)) & 127 : 0;
      const int bits =
          size == 0 ? 0 : (127 + exponent) << 7 | mantissa | (kTable[i] < 0 ? 1 << 15 : 0);
      result.low[i] = static_cast<uint8_t>(bits & 255);
      result.high[i] = static_cast<uint8_t>(bits >> 8);
    }
    return result;
  }
  static constexpr Halves kHalves = halves();
  static Bits looked_up(const uint8_t* from) {
    const __m256i indices = _mm256_and_si256(both_nibbles(from), all_bytes(15));
    const __m256i low = _mm256_shuffle_epi8(twice(kHalves.low), indices);
    const __m256i high = _mm256_shuffle_epi8(twice(kHalves.high), indices);
    return {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
  }
  static Vector integers(const Bits& bits, int, int v) {
    const __m256i pairs = v / 2 ? bits.second : bits.first;
    return _mm256_castsi256_ps(v % 2 ? _mm256_and_si256(pairs, _mm256_set1_epi32(-65536))
                                     : _mm256_slli_epi32(pairs, 16));
  }
};

template <const int8_t (&kTable)[16]>
struct TableGroups : FromTable<kTable> {  // Q4_0, IQ4_NL
  static constexpr int kBytes = 18, kBlocks = 8, kStep = 1;
  static constexpr bool kShifted = false;
  static void scales(const uint8_t* chunk, int groups, float* scale, Vector*) {
    _mm256_store_ps(scale, halves_of_blocks<kBytes>(chunk, groups));
  }
  static auto bits(const uint8_t* chunk, int group, int) {
    return FromTable<kTable>::looked_up(chunk + group * kBytes + 2);
  }
};

struct IQ4XSGroups : FromTable<kUneven> {
  static constexpr int kBytes = 136, kBlocks = 1, kStep = 1;
  static constexpr bool kShifted = false;
  static void scales(const uint8_t* chunk, int, float* scale, Vector*) {
    IQ4XS::scales(chunk, scale, nullptr);
  }
  static auto bits(const uint8_t* chunk, int group, int) {
    return looked_up(chunk + 8 + 16 * group);
  }
};

struct Q8Groups : OneScale {
  using Bits = const uint8_t*;
  static constexpr int kBytes = 34, kBlocks = 8, kStep = 1;
  static constexpr bool kShifted = false;
  static constexpr int weight(int v, int lane) { return kLanes * v + lane; }
  static void scales(const uint8_t* chunk, int groups, float* scale, Vector*) {
    _mm256_store_ps(scale, halves_of_blocks<kBytes>(chunk, groups));
  }
  static Bits bits(const uint8_t* chunk, int group, int) { return chunk + group * kBytes + 2; }
  static Vector integers(Bits from, int, int v) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + kLanes * v))));
  }
};

// The two float16 at the beginning of up to eight blocks: scales, and shifts.
template <int kBytes>
struct ScaleAndShift : OneScale {
  static constexpr int kScales = 2 * kChunkGroups;
  static constexpr bool kShifted = true;
  static constexpr float kSign = 1;
  static constexpr int shift_of(int lane) { return lane % 4 / 2 * 4 + lane / 4 * 2 + lane % 2; }
  static Vector scale(const float* scales, int group) {
    return _mm256_broadcast_ss(scales + 2 * group);
  }
  static void scales(const uint8_t* chunk, int groups, float* scale, Vector* shifts) {
    __m256 pairs[2];
    pairs_of_blocks<kBytes>(chunk, groups, pairs);
    const __m256 first = pairs[0], second = pairs[1];
    _mm256_store_ps(scale, first);
    _mm256_store_ps(scale + kLanes, second);
    *shifts = _mm256_shuffle_ps(first, second, 0xdd);  // 0 1 4 5 in the low half, 2 3 6 7
  }
};

struct Q41Groups : ScaleAndShift<20> {
  using Bits = __m256i;
  static constexpr int kBytes = 20, kBlocks = 8, kStep = 1;
  static constexpr int weight(int v, int lane) { return 4 * lane + v; }
  static constexpr float factor(int, int v) { return 1.0f / static_cast<float>(1 << 8 * v); }
  static Bits bits(const uint8_t* chunk, int group, int) {
    return both_nibbles(chunk + group * kBytes + 4);
  }
  static Vector integers(__m256i bytes, int, int v) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(15 << 8 * v)));
  }
};

// Eight 6-bit scales and eight 6-bit minima in twelve bytes, and the two float16 before them:
// six_bit_scales of block_formats.h in vectors.
struct SixBitScales {
  static constexpr bool kShifted = true;
  static constexpr float kSign = -1;
  static void six_bit_scales(const uint8_t* block, float unit, float* scale, Vector* shifts) {
    const __m128i all = (__m128i)load_bytes(block);
    const auto bytes = [](int first, int second, int third, int fourth) {
      return _mm_setr_epi32(first, second, third, fourth);
    };
    constexpr int kA = 0x07060504, kB = 0x0b0a0908, kC = 0x0f0e0d0c, kNone = -1;
    constexpr int kSix = 0x3f3f3f3f, kFour = 0x0f0f0f0f;
    const __m128i low = _mm_shuffle_epi8(all, bytes(kA, kC, kB, kC));
    const __m128i high = _mm_shuffle_epi8(all, bytes(kNone, kA, kNone, kB));
    const __m128i numbers =
        _mm_or_si128(_mm_or_si128(_mm_and_si128(low, bytes(kSix, kFour, kSix, 0)),
                                  _mm_and_si128(_mm_srli_epi16(low, 4), bytes(0, 0, 0, kFour))),
                     _mm_and_si128(_mm_srli_epi16(high, 2), _mm_set1_epi8(0x30)));
    const __m128 halves = _mm_cvtph_ps(all);
    const __m256 d = _mm256_broadcastss_ps(halves) * _mm256_set1_ps(unit);
    const __m256 least = _mm256_broadcastss_ps(_mm_movehdup_ps(halves));
    _mm256_store_ps(scale, d * _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(numbers)));
    *shifts = least * _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(numbers, 8)));
  }
};

struct Q4KGroups : OneScale, SixBitScales {
  using Bits = const uint8_t*;
  static constexpr int kBytes = 144, kBlocks = 1, kStep = 2;
  static constexpr int weight(int v, int lane) { return 4 * lane + v; }
  // The nibble stays where it is, but the highest one would be taken for a sign.
  static constexpr float factor(int i, int v) {
    return i == 1 && v == 3 ? 1 : 1.0f / static_cast<float>(1 << (8 * v + 4 * i));
  }
  static void scales(const uint8_t* chunk, int, float* scale, Vector* shifts) {
    six_bit_scales(chunk, 1, scale, shifts);
  }
  static Bits bits(const uint8_t* chunk, int step, int) { return chunk + 16 + step * 32; }
  static Vector integers(Bits from, int i, int v) {
    const __m256i bytes = load_256(from);
    if (i == 1 && v == 3) return _mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 28));
    const int mask = 15 << (8 * v + 4 * i);
    return _mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(mask)));
  }
};

struct Q5KGroups : InBytes, SixBitScales {
  static constexpr int kBytes = 176, kBlocks = 1, kStep = 8;
  static void scales(const uint8_t* chunk, int, float* scale, Vector* shifts) {
    six_bit_scales(chunk, kUnit, scale, shifts);
  }
  static __m256i bits(const uint8_t* chunk, int, int i) {
    __m256i low = load_256(chunk + 48 + i / 2 * 32), high = load_256(chunk + 16);
    if (i % 2) low = _mm256_srli_epi16(low, 4);
    if (i < 4) high = _mm256_slli_epi16(high, 4 - i);
    if (i > 4) high = _mm256_srli_epi16(high, i - 4);
    return _mm256_or_si256(_mm256_and_si256(low, all_bytes(15)),
                           _mm256_and_si256(high, all_bytes(16)));
  }
};

struct Q6KGroups : InBytes {
  static constexpr int kBytes = 210, kBlocks = 1, kStep = 4, kScales = 16;
  static constexpr bool kShifted = false;
  static void scales(const uint8_t* chunk, int, float* scale, Vector*) {
    const __m256 d = _mm256_set1_ps(half_at(chunk + 208) * kUnit);
    for (int i = 0; i < 16; i += 8) {
      const __m128i factors = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(chunk + 192 + i));
      _mm256_store_ps(scale + i, d * _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(factors)));
    }
  }
  static Vector scale(const float* scales, int group) {  // one for each half of the group
    const __m256 pair =
        _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(scales + 2 * group)));
    return _mm256_permutevar_ps(pair, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  }
  static __m256i bits(const uint8_t* chunk, int step, int i) {
    __m256i low = load_256(chunk + step * 64 + i % 2 * 32);
    __m256i high = load_256(chunk + 128 + step * 32);
    if (i / 2) low = _mm256_srli_epi16(low, 4);
    if (i < 2) high = _mm256_slli_epi16(high, 4 - 2 * i);
    if (i > 2) high = _mm256_srli_epi16(high, 2);
    const __m256i both = _mm256_or_si256(_mm256_and_si256(low, all_bytes(15)),
                                         _mm256_and_si256(high, all_bytes(48)));
    return _mm256_sub_epi8(both, all_bytes(32));
  }
};

// Bit i of the four lowest of each word, as bit 4 of its byte i.
inline __m256i fifth_bits_of_bytes(uint32_t bits) {
  const __m256i word = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(bits)),
                                         _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  const __m256i four = _mm256_and_si256(word, _mm256_set1_epi32(15));
  const int spread = 1 << 4 | 1 << 11 | 1 << 18 | 1 << 25;
  return _mm256_and_si256(_mm256_mullo_epi32(four, _mm256_set1_epi32(spread)), all_bytes(16));
}

inline __m256i five_bits(const uint8_t* from) {
  return _mm256_or_si256(_mm256_and_si256(both_nibbles(from + 4), all_bytes(15)),
                         fifth_bits_of_bytes(word_at(from)));
}

struct Q50Groups : InBytes {
  static constexpr int kBytes = 22, kBlocks = 8, kStep = 1;
  static constexpr bool kShifted = false;
  static void scales(const uint8_t* chunk, int groups, float* scale, Vector*) {
    _mm256_store_ps(scale, halves_of_blocks<kBytes>(chunk, groups) * _mm256_set1_ps(kUnit));
  }
  static __m256i bits(const uint8_t* chunk, int group, int) {
    return _mm256_sub_epi8(five_bits(chunk + group * kBytes + 2), all_bytes(16));
  }
};

struct Q51Groups : InBytes {
  using Both = ScaleAndShift<24>;
  static constexpr int kBytes = 24, kBlocks = 8, kStep = 1, kScales = Both::kScales;
  static constexpr bool kShifted = true;
  static constexpr float kSign = 1;
  static constexpr int shift_of(int lane) { return Both::shift_of(lane); }
  static Vector scale(const float* scales, int group) { return Both::scale(scales, group); }
  static void scales(const uint8_t* chunk, int groups, float* scale, Vector* shifts) {
    Both::scales(chunk, groups, scale, shifts);
    for (int i = 0; i < kScales; i += kLanes) {
      _mm256_store_ps(scale + i, _mm256_load_ps(scale + i) * _mm256_set1_ps(kUnit));
    }
  }
  static __m256i bits(const uint8_t* chunk, int group, int) {
    return five_bits(chunk + group * kBytes + 4);
  }
};

}  // namespace
}  // namespace cptool::cpu
