// The element types and their conversions to and from float32, in plain integer arithmetic so that
// they vectorise for any instruction set. Unnamed namespace: see isa.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention.h"

namespace cptool {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Returns run(T{}) for the type T of the elements.
template <class Run>
inline auto with_type(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::kBFloat16:
      return run(BFloat16{});
    case ScalarType::kFloat16:
      return run(Float16{});
    default:
      return run(float{});
  }
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  return bits_float(static_cast<uint32_t>(value.bits) << 16);
}

inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals exactly.
  const uint32_t finite = float_bits(bits_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep their mantissa
  return bits_float(sign | (magnitude >= 0x0f800000u ? special : finite));
}

// Round to nearest, ties to even; NaN stays NaN.
inline void from_float(float value, float& to) { to = value; }

inline void from_float(float value, BFloat16& to) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline void from_float(float value, Float16& to) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal: rebias and round the 13 dropped bits; a carry out of the mantissa makes the next
  // exponent, or infinity.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal: adding 0.5 aligns the mantissa so that the hardware rounds at 2^-24.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;  // 65536 and above
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace cptool
