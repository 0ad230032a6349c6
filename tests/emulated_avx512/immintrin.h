// The AVX-512 instructions of csrc/cpu's attention kernels in plain C++, for tests on machines
// without them: put this folder ahead on the include path and compile for AVX2. A vector of 512
// bits is then two or four of the compiler's own, and each instruction a loop over its elements.
#pragma once

#include_next <immintrin.h>

#if !defined(__AVX512F__)
#define __AVX512F__ 1

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated_avx512 {

typedef int32_t Words __attribute__((vector_size(64)));
typedef uint32_t Unsigned __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(64)));

template <class To, class From>
inline To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class To>
inline To load(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

template <class From>
inline void store(void* to, From from) {
  std::memcpy(to, &from, sizeof from);
}

// f(i) for each of 16 lanes.
template <class Function>
inline __m512 floats(const Function& f) {
  __m512 to;
  for (int i = 0; i < 16; ++i) to[i] = f(i);
  return to;
}

template <class Function>
inline __m512i words(const Function& f) {
  Words to;
  for (int i = 0; i < 16; ++i) to[i] = f(i);
  return cast<__m512i>(to);
}

template <class Function>
inline __mmask16 mask(const Function& f) {
  unsigned bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<unsigned>(f(i)) << i;
  return static_cast<__mmask16>(bits);
}

inline bool is_set(__mmask16 m, int i) { return m >> i & 1; }

inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  return floats([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}

inline __m512 max(__m512 a, __m512 b) {
  return floats([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}

inline __m512 blend(__mmask16 m, __m512 a, __m512 b) {
  return floats([&](int i) { return is_set(m, i) ? b[i] : a[i]; });
}

// Elements of 32 bits.
inline __m512i shuffle_parts(__m512i a, __m512i b, int how) {
  const Words x = cast<Words>(a), y = cast<Words>(b);
  return words([&](int i) {
    const int part = i / 4, from = how >> 2 * part & 3;
    return (part < 2 ? x : y)[4 * from + i % 4];
  });
}

inline __m512i shuffle(__m512i a, __m512i b, int how) {
  const Words x = cast<Words>(a), y = cast<Words>(b);
  return words([&](int i) {
    const int from = how >> 2 * (i % 4) & 3;
    return (i % 4 < 2 ? x : y)[i / 4 * 4 + from];
  });
}

// `size` bytes of an element; `high`: from the upper half of each 128 bits.
template <int size>
inline __m512i unpack(__m512i a, __m512i b, bool high) {
  unsigned char x[64], y[64], to[64];
  store(x, a);
  store(y, b);
  for (int part = 0; part < 64; part += 16) {
    for (int i = 0; i < 16; i += 2 * size) {
      const int from = part + i / 2 + (high ? 8 : 0);
      std::memcpy(to + part + i, x + from, size);
      std::memcpy(to + part + i + size, y + from, size);
    }
  }
  return load<__m512i>(to);
}

inline __m512 permute_two(__m512 a, __m512i index, __m512 b) {
  const Words at = cast<Words>(index);
  return floats([&](int i) { return at[i] & 16 ? b[at[i] & 15] : a[at[i] & 15]; });
}

inline __m512 scale(__m512 a, __m512 b) {
  return floats([&](int i) {
    if (std::isnan(a[i]) || std::isnan(b[i])) return a[i] + b[i];
    const float power = std::floor(b[i]);
    return power < -1000.0f ? a[i] * 0.0f
                            : std::ldexp(a[i], power > 1000.0f ? 1000 : static_cast<int>(power));
  });
}

inline __m512 fraction(__m512 a) {
  return floats([&](int i) { return std::isinf(a[i]) ? 0.0f : a[i] - std::floor(a[i]); });
}

inline __m512i load_some(uint32_t m, const void* from) {
  Shorts to = {};
  for (int i = 0; i < 32; ++i) {
    if (m >> i & 1) to[i] = load<uint16_t>(static_cast<const uint16_t*>(from) + i);
  }
  return cast<__m512i>(to);
}

inline __m256i load_some_halves(__mmask16 m, const void* from) {
  uint16_t to[16] = {};
  for (int i = 0; i < 16; ++i) {
    if (is_set(m, i)) to[i] = load<uint16_t>(static_cast<const uint16_t*>(from) + i);
  }
  return load<__m256i>(to);
}

inline __m512 load_some_floats(__mmask16 m, const void* from) {
  return floats([&](int i) {
    return is_set(m, i) ? load<float>(static_cast<const float*>(from) + i) : 0.0f;
  });
}

inline __m512 widened(__m256i halves) {
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  return floats([&](int i) { return i < 8 ? low[i] : high[i - 8]; });
}

inline __m256i narrowed(__m512 a) {
  __m128i halves[2];
  for (int part = 0; part < 2; ++part) {
    __m256 some;
    for (int i = 0; i < 8; ++i) some[i] = a[8 * part + i];
    halves[part] = _mm256_cvtps_ph(some, _MM_FROUND_TO_NEAREST_INT);
  }
  return load<__m256i>(halves);
}

}  // namespace emulated_avx512

#define EMULATED(type, value) emulated_avx512::cast<type>(value)
#define EMULATED_WORDS(value) emulated_avx512::cast<emulated_avx512::Words>(value)
#define EMULATED_BITS(value) emulated_avx512::cast<emulated_avx512::Unsigned>(value)

#define _mm512_castps_si512(a) EMULATED(__m512i, a)
#define _mm512_castsi512_ps(a) EMULATED(__m512, a)
#define _mm512_castps512_ps256(a) emulated_avx512::load<__m256>(&static_cast<const __m512&>(a))
#define _mm512_castps256_ps512(a) \
  emulated_avx512::floats([eight = (a)](int i) { return i < 8 ? eight[i] : 0.0f; })
#define _mm512_extractf32x8_ps(a, part)                                                         \
  emulated_avx512::load<__m256>(reinterpret_cast<const char*>(&static_cast<const __m512&>(a)) + \
                                32 * (part))
#define _mm512_load_ps(from) emulated_avx512::load<__m512>(from)
#define _mm512_loadu_ps(from) emulated_avx512::load<__m512>(from)
#define _mm512_load_si512(from) emulated_avx512::load<__m512i>(from)
#define _mm512_store_ps(to, a) emulated_avx512::store<__m512>(to, a)
#define _mm512_storeu_ps(to, a) emulated_avx512::store<__m512>(to, a)
#define _mm512_store_si512(to, a) emulated_avx512::store<__m512i>(to, a)
#define _mm256_maskz_loadu_epi16(m, from) emulated_avx512::load_some_halves(m, from)
#define _mm512_maskz_loadu_epi16(m, from) emulated_avx512::load_some(m, from)
#define _mm512_maskz_loadu_ps(m, from) emulated_avx512::load_some_floats(m, from)
#define _mm512_set1_ps(a) \
  emulated_avx512::floats([one = static_cast<float>(a)](int) { return one; })
#define _mm512_set1_epi32(a) \
  emulated_avx512::words([one = static_cast<int32_t>(a)](int) { return one; })
#define _mm512_set1_epi16(a) \
  emulated_avx512::words(    \
      [two = 0x10001u * static_cast<uint16_t>(a)](int) { return static_cast<int32_t>(two); })
#define _mm512_setzero_si512() \
  __m512i {}
#define _mm512_broadcast_f32x4(a) \
  emulated_avx512::floats([four = (a)](int i) { return four[i % 4]; })

#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_sub_ps(a, b) ((a) - (b))
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_max_ps(a, b) emulated_avx512::max(a, b)
#define _mm512_mask_max_ps(from, m, a, b) \
  emulated_avx512::blend(m, from, emulated_avx512::max(a, b))
#define _mm512_fmadd_ps(a, b, c) emulated_avx512::fmadd(a, b, c)
#define _mm512_fmsub_ps(a, b, c) emulated_avx512::fmadd(a, b, -(c))
#define _mm512_reduce_ps(a, how) emulated_avx512::fraction(a)
#define _mm512_scalef_ps(a, b) emulated_avx512::scale(a, b)
#define _mm512_mask_blend_ps(m, a, b) emulated_avx512::blend(m, a, b)
#define _mm512_maskz_mov_ps(m, a) emulated_avx512::blend(m, __m512{}, a)
#define _mm512_cmp_ps_mask(a, b, how)                                                     \
  emulated_avx512::mask([x = static_cast<__m512>(a), y = static_cast<__m512>(b)](int i) { \
    static_assert((how) == _CMP_GT_OQ);                                                   \
    return x[i] > y[i];                                                                   \
  })

#define _mm512_add_epi32(a, b) EMULATED(__m512i, EMULATED_BITS(a) + EMULATED_BITS(b))
#define _mm512_sub_epi32(a, b) EMULATED(__m512i, EMULATED_BITS(a) - EMULATED_BITS(b))
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_or_si512(a, b) ((a) | (b))
#define _mm512_xor_si512(a, b) ((a) ^ (b))
#define _mm512_slli_epi32(a, n) EMULATED(__m512i, EMULATED_BITS(a) << (n))
#define _mm512_srli_epi32(a, n) EMULATED(__m512i, EMULATED_BITS(a) >> (n))
#define _mm512_cmpgt_epi32_mask(a, b) \
  emulated_avx512::mask(              \
      [x = EMULATED_WORDS(a), y = EMULATED_WORDS(b)](int i) { return x[i] > y[i]; })
#define _mm512_mask_cmple_epi32_mask(m, a, b) \
  static_cast<__mmask16>(                     \
      (m) & emulated_avx512::mask(            \
                [x = EMULATED_WORDS(a), y = EMULATED_WORDS(b)](int i) { return x[i] <= y[i]; }))

#define _mm512_shuffle_f32x4(a, b, how) \
  EMULATED(__m512, emulated_avx512::shuffle_parts(EMULATED(__m512i, a), EMULATED(__m512i, b), how))
#define _mm512_shuffle_i32x4(a, b, how) emulated_avx512::shuffle_parts(a, b, how)
#define _mm512_shuffle_ps(a, b, how) \
  EMULATED(__m512, emulated_avx512::shuffle(EMULATED(__m512i, a), EMULATED(__m512i, b), how))
#define _mm512_permute_ps(a, how) _mm512_shuffle_ps(a, a, how)
#define _mm512_permutex2var_ps(a, index, b) emulated_avx512::permute_two(a, index, b)
#define _mm512_unpacklo_epi16(a, b) emulated_avx512::unpack<2>(a, b, false)
#define _mm512_unpackhi_epi16(a, b) emulated_avx512::unpack<2>(a, b, true)
#define _mm512_unpacklo_epi32(a, b) emulated_avx512::unpack<4>(a, b, false)
#define _mm512_unpackhi_epi32(a, b) emulated_avx512::unpack<4>(a, b, true)
#define _mm512_unpacklo_epi64(a, b) emulated_avx512::unpack<8>(a, b, false)
#define _mm512_unpackhi_epi64(a, b) emulated_avx512::unpack<8>(a, b, true)
#define EMULATED_UNPACK(type, size, a, b, high) \
  EMULATED(type, emulated_avx512::unpack<size>(EMULATED(__m512i, a), EMULATED(__m512i, b), high))
#define _mm512_unpacklo_ps(a, b) EMULATED_UNPACK(__m512, 4, a, b, false)
#define _mm512_unpackhi_ps(a, b) EMULATED_UNPACK(__m512, 4, a, b, true)
#define _mm512_unpacklo_pd(a, b) EMULATED_UNPACK(__m512d, 8, a, b, false)
#define _mm512_unpackhi_pd(a, b) EMULATED_UNPACK(__m512d, 8, a, b, true)

#define _mm512_cvtepu16_epi32(a) \
  emulated_avx512::words(        \
      [halves = EMULATED(emulated_avx512::Halves, a)](int i) { return halves[i]; })
#define _mm512_cvtepi8_epi32(a) \
  emulated_avx512::words([bytes = EMULATED(emulated_avx512::Bytes, a)](int i) { return bytes[i]; })
#define _mm512_cvtepu8_epi32(a) \
  emulated_avx512::words(       \
      [bytes = EMULATED(emulated_avx512::UnsignedBytes, a)](int i) { return bytes[i]; })
#define _mm512_permutexvar_ps(index, a) emulated_avx512::permute_two(a, index, a)
#define _mm512_cvtepi32_ps(a) \
  emulated_avx512::floats(    \
      [whole = EMULATED_WORDS(a)](int i) { return static_cast<float>(whole[i]); })
#define _mm512_cvtph_ps(a) emulated_avx512::widened(a)
#define _mm512_cvtps_ph(a, how) emulated_avx512::narrowed(a)

namespace emulated_avx512 {
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(16)));
}  // namespace emulated_avx512

#endif
