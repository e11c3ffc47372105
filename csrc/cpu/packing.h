// Loops over runs of packed elements, compiled once per instruction set (see each_isa.h; hence no
// include guard and no includes).

SWK_FN SWK_INLINE float scale_of(const Scales& scales, int64_t block) {
  if (scales.dtype == SWK_FLOAT32) return static_cast<const float*>(scales.values)[block];
  return to_float<Float16>(static_cast<const int16_t*>(scales.values)[block]);
}

// One element of any 16- or 32-bit type as float32.
SWK_FN SWK_INLINE float value_of(const void* values, int dtype, int64_t i) {
  return dtype == SWK_FLOAT32    ? to_float<Float32>(static_cast<const int32_t*>(values)[i])
         : dtype == SWK_BFLOAT16 ? to_float<BFloat16>(static_cast<const int16_t*>(values)[i])
                                 : to_float<Float16>(static_cast<const int16_t*>(values)[i]);
}

// The code of element p.
SWK_FN SWK_INLINE int code_of(const uint8_t* codes, const Layout& layout, int64_t p) {
  if (layout.bytes()) return layout.symmetric ? static_cast<int8_t>(codes[p]) : codes[p];
  return codes[p / 2] >> (p % 2 ? 0 : 4) & 15;
}

// What a code stands for in a block: an integer, or an entry of a table, times the scale.
SWK_FN SWK_INLINE float decoded(const Layout& layout, int code, int32_t zero, float scale) {
  const float value = layout.bytes() ? static_cast<float>(code) : layout.value4(code);
  return (value - static_cast<float>(zero)) * scale;
}

#ifdef SWK_ZMM
// 32 elements of 4 bits, in order, as entries of a table in a register.
SWK_FN SWK_INLINE void look_up_32(const uint8_t* codes, __m512 table, __m512& low, __m512& high) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m512i wide = _mm512_cvtepu8_epi32(packed);
  const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), table);
  const __m512 odd = _mm512_permutexvar_ps(wide, table);  // it reads the low 4 bits only
  const __m512i first =
      _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = _mm512_permutex2var_ps(even, first, odd);
  high = _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd);
}

// 16 finite values rounded to Type, as a table in a register: once, or twice where of 16 bits.
template <class Type>
SWK_FN SWK_INLINE __m512i table_of(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  if constexpr (sizeof(typename Type::Bits) == 4) return bits;
  if constexpr (Type::kInfinity == Float16::kInfinity) {
    return _mm512_broadcast_i64x4(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
  }
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}

// The same of 16 bits each. The permutation reads 5 bits: the table stands there twice.
SWK_FN SWK_INLINE __m512i look_up_32(const uint8_t* codes, __m512i table) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m512i wide = _mm512_cvtepu8_epi32(packed);
  const __m512i index = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
  return _mm512_permutexvar_epi16(index, table);
}
#endif

// The elements [p, p + n) of one block, rounded to Type; `base` [16] is what codes of 4 bits stand
// for. `past_cache`: out is written past the caches; it must then lie on a boundary of 64 bytes.
template <class Type>
SWK_FN SWK_INLINE void decode_run(const uint8_t* codes, const Layout& layout, const float* base,
                                  int64_t p, int64_t n, int32_t zero, float scale,
                                  typename Type::Bits* SWK_RESTRICT out, bool past_cache) {
  const float shift = static_cast<float>(zero);
  if (layout.bytes()) {
    const auto* const SWK_RESTRICT integers = reinterpret_cast<const int8_t*>(codes + p);
    if (layout.symmetric) {
      for (int64_t i = 0; i < n; ++i) {
        out[i] = from_float<Type>(static_cast<float>(integers[i]) * scale);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const auto value = static_cast<float>(static_cast<uint8_t>(integers[i]));
        out[i] = from_float<Type>((value - shift) * scale);
      }
    }
    return;
  }
  const auto value = [&](int code) SWK_FN { return from_float<Type>((base[code] - shift) * scale); };
  int64_t i = 0;
  if (p % 2 && n > 0) out[i++] = value(codes[p / 2] & 15);
  const uint8_t* SWK_RESTRICT at = codes + (p + i) / 2;
#ifdef SWK_ZMM
  past_cache = past_cache && i == 0;
  const __m512i table = table_of<Type>(_mm512_mul_ps(
      _mm512_sub_ps(_mm512_loadu_ps(base), _mm512_set1_ps(shift)), _mm512_set1_ps(scale)));
  for (; i + 32 <= n; i += 32, at += 16) {
    __m512i parts[2];
    constexpr int kParts = sizeof(typename Type::Bits) == 4 ? 2 : 1;
    if constexpr (kParts == 2) {
      __m512 low, high;
      look_up_32(at, _mm512_castsi512_ps(table), low, high);
      parts[0] = _mm512_castps_si512(low);
      parts[1] = _mm512_castps_si512(high);
    } else {
      parts[0] = look_up_32(at, table);
    }
    for (int part = 0; part < kParts; ++part) {
      auto* const to = out + i + 16 * part;
      if (past_cache) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), parts[part]);
      } else {
        _mm512_storeu_si512(to, parts[part]);
      }
    }
  }
#else
  (void)past_cache;
#endif
  for (; i + 2 <= n; i += 2, ++at) {
    out[i] = value(*at >> 4);
    out[i + 1] = value(*at & 15);
  }
  if (i < n) out[i] = value(*at >> 4);
}

// The elements [begin, end), whatever their blocks.
template <class Type>
SWK_FN SWK_INLINE void decode(const uint8_t* codes, const Layout& layout, const Scales& scales,
                              int64_t begin, int64_t end, typename Type::Bits* out,
                              bool past_cache) {
  float base[16];
  for (int i = 0; i < 16; ++i) base[i] = layout.value4(i);
  int64_t block = begin < end ? layout.block_of(begin) : 0;
  for (int64_t p = begin; p < end;) {
    const int64_t run_end = layout.r == 0 ? std::min(layout.elements(), (block + 1) * layout.c)
                                          : layout.run_end(p);
    const int64_t stop = std::min(end, run_end);
    auto* const to = out + (p - begin);
    const bool aligned = past_cache && reinterpret_cast<uintptr_t>(to) % 64 == 0;
    decode_run<Type>(codes, layout, base, p, stop - p, scales.zero_point(block),
                     scale_of(scales, block), to, aligned);
    p = stop;
    if (p < end) block = layout.r == 0 ? block + 1 : layout.block_of(p);
  }
}
