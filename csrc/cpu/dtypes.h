// The element types, each as the integers that its bits are.
//
// The magnitude bits of a float (all but the sign) order as its absolute values do, infinity above
// the numbers and NaN above infinity. So peaks are found on integers of the type's own width:
// exact, and twice as many lanes in 16 bits.

#pragma once

#include <cstdint>
#include <cstring>

namespace swk {

constexpr uint32_t kInfinityBits = 0x7F800000;  // float32
constexpr uint32_t kNanBits = 0x7FC00000;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Each type has:
//   Bits, kMagnitude (mask, and the state of a channel that has seen NaN), kInfinity;
//   key_bits(m): the float32 bits of a magnitude m <= kInfinity;
//   below(k): a magnitude m (or -1) such that everything whose float32 bits are at least k
//       exceeds m, for k <= kInfinityBits + 1. -1 is always right; a higher m saves work. The
//       types of 8 bits have none.

struct Float32 {
  using Bits = int32_t;
  static constexpr Bits kMagnitude = 0x7FFFFFFF;
  static constexpr Bits kInfinity = 0x7F800000;

  static uint32_t key_bits(Bits magnitude) { return static_cast<uint32_t>(magnitude); }
  static Bits below(uint32_t key) { return static_cast<Bits>(key) - 1; }
};

struct BFloat16 {
  using Bits = int16_t;
  static constexpr Bits kMagnitude = 0x7FFF;
  static constexpr Bits kInfinity = 0x7F80;

  static uint32_t key_bits(Bits magnitude) { return static_cast<uint32_t>(magnitude) << 16; }
  static Bits below(uint32_t key) { return static_cast<Bits>(((key + 0xFFFF) >> 16) - 1); }
};

struct Float16 {
  using Bits = int16_t;
  static constexpr Bits kMagnitude = 0x7FFF;
  static constexpr Bits kInfinity = 0x7C00;

  static uint32_t key_bits(Bits magnitude) {
    const uint32_t shifted = static_cast<uint32_t>(magnitude) << 13;
    if (magnitude >= kInfinity) return kInfinityBits;
    if (magnitude >= 0x0400) return shifted + (112u << 23);
    // A denormal is an integer times 2^-24; the sum and the difference are exact and normal, so
    // this holds where denormals are flushed to zero.
    return bits_of(float_of(shifted + (113u << 23)) - float_of(113u << 23));
  }
  static Bits below(uint32_t key) {
    if (key < 0x38800000) return -1;  // 2^-14, the smallest normal number
    if (key > kInfinityBits) return kInfinity;
    if (key > 0x477FE000) return 0x7BFF;  // 65504, the largest number
    return static_cast<Bits>(((key - (112u << 23) + 0x1FFF) >> 13) - 1);
  }
};

// float8_e4m3fn of PyTorch. There is no infinity: kInfinity is the largest number, and only NaN,
// 0x7F, lies above it.
struct Float8E4M3 {
  using Bits = int8_t;
  static constexpr Bits kMagnitude = 0x7F;
  static constexpr Bits kInfinity = 0x7E;  // 448

  static uint32_t key_bits(Bits magnitude) {
    const uint32_t shifted = static_cast<uint32_t>(magnitude) << 20;
    if (magnitude >= 8) return shifted + (120u << 23);
    return bits_of(float_of(shifted + (121u << 23)) - float_of(121u << 23));  // as in Float16
  }
};

// float8_e5m2: the upper half of a float16.
struct Float8E5M2 {
  using Bits = int8_t;
  static constexpr Bits kMagnitude = 0x7F;
  static constexpr Bits kInfinity = 0x7C;

  static uint32_t key_bits(Bits magnitude) {
    return Float16::key_bits(static_cast<Float16::Bits>(magnitude << 8));
  }
};

}  // namespace swk
