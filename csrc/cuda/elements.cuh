// The element types: the bits of each, and the float32 bits of its magnitude.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace swk {

constexpr uint32_t kInfinityBits = 0x7F800000;  // larger magnitudes are NaN
constexpr uint32_t kNanBits = 0x7FC00000;

struct Float32 {
  using Bits = uint32_t;
  static __device__ uint32_t magnitude(Bits bits) { return bits & 0x7FFFFFFF; }
};

struct BFloat16 {
  using Bits = uint16_t;
  static __device__ uint32_t magnitude(Bits bits) { return (bits & 0x7FFFu) << 16; }
};

struct Float16 {
  using Bits = uint16_t;
  static __device__ uint32_t magnitude(Bits bits) {
    const uint32_t exponent = bits & 0x7C00u;
    const uint32_t shifted = (bits & 0x7FFFu) << 13;
    if (exponent == 0x7C00u) return shifted + (224u << 23);  // infinity, NaN
    if (exponent != 0) return shifted + (112u << 23);
    return __float_as_uint(static_cast<float>(bits & 0x7FFFu) * 5.9604644775390625e-8f);  // 2^-24
  }
};

// float8_e4m3fn: no infinity, and one NaN of each sign.
struct Float8E4M3 {
  using Bits = uint8_t;
  static __device__ uint32_t magnitude(Bits bits) {
    const uint32_t raw = bits & 0x7Fu;
    if (raw == 0x7Fu) return kNanBits;
    if (raw >= 0x08u) return (raw << 20) + (120u << 23);
    return __float_as_uint(static_cast<float>(raw) * 0.001953125f);  // 2^-9
  }
};

// The upper half of a float16.
struct Float8E5M2 {
  using Bits = uint8_t;
  static __device__ uint32_t magnitude(Bits bits) {
    return Float16::magnitude(static_cast<uint16_t>(bits << 8));
  }
};

}  // namespace swk
