// One element to and from float32, compiled once per instruction set (see each_isa.h; hence no
// include guard and no includes).

// Exact, and without denormal float32 on the way: PyTorch can set the CPU to flush them to zero.
template <class Type>
SWK_FN SWK_INLINE float to_float(typename Type::Bits value);

template <>
SWK_FN SWK_INLINE float to_float<Float32>(int32_t value) {
  return float_of(static_cast<uint32_t>(value));
}

template <>
SWK_FN SWK_INLINE float to_float<BFloat16>(int16_t value) {
  return float_of(static_cast<uint32_t>(value) << 16);
}

template <>
SWK_FN SWK_INLINE float to_float<Float16>(int16_t value) {
  const uint32_t sign = (static_cast<uint32_t>(value) & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value) & 0x7FFF;
  const uint32_t shifted = (magnitude << 13) + (112u << 23);
  // A denormal: bits under the exponent of 2^-14, less 2^-14.
  const uint32_t denormal = bits_of(float_of(shifted + (1u << 23)) - float_of(113u << 23));
  const uint32_t special = shifted + (112u << 23);  // infinity and NaN: all exponent bits set
  const uint32_t number = magnitude < 0x0400 ? denormal : shifted;
  return float_of((magnitude < 0x7C00 ? number : special) | sign);
}

// Rounds to nearest, ties to even; NaN to the type's quiet NaN.
template <class Type>
SWK_FN SWK_INLINE typename Type::Bits from_float(float value);

template <>
SWK_FN SWK_INLINE int32_t from_float<Float32>(float value) {
  return static_cast<int32_t>(bits_of(value));
}

template <>
SWK_FN SWK_INLINE int16_t from_float<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<int16_t>((bits & 0x7FFFFFFF) > kInfinityBits ? 0x7FC0 : rounded);
}

template <>
SWK_FN SWK_INLINE int16_t from_float<Float16>(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000;
  const uint32_t bits = bits_of(value) & 0x7FFFFFFF;
  const uint32_t number = (bits - (112u << 23) + 0x0FFF + (bits >> 13 & 1)) >> 13;
  // Below 2^-14: adding 1/2 lets the float32 unit round to a multiple of 2^-24.
  const uint32_t denormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
  uint32_t result = bits < (113u << 23) ? denormal : number;
  result = bits >= 0x477FF000 ? 0x7C00 : result;  // 65520 and above round to infinity
  result = bits > kInfinityBits ? 0x7E00 : result;
  return static_cast<int16_t>(result | sign);
}
