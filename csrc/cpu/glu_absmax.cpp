// h = act(gate) * up, and the per-channel peaks of h, in one pass.
//
// Eight rows of a few hundred channels are computed in float32, rounded, stored, and, while they
// are in the first-level cache, taken into the peaks as column_absmax.cpp does.
//
// Every activation here is x times a function of x in [0, 1]:
//   silu       x / (1 + exp(-x))
//   gelu_tanh  0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)),  u = sqrt(2/pi) (x + 0.044715 x^3)
//   gelu       x Phi(x); for |x| < 1 Phi(x) = 1/2 + x g(x^2), else with a = |x|
//              Phi(-a) = exp(-a^2 / 2) t f(t), t = 1 / (1 + a / 4)
//   relu       max(x, 0)
// so all that is needed is exp. The polynomials are minimax fits (Remez) of a relative error of
// 3.1e-9 (e^r, |r| <= ln(2) / 2), 7.1e-10 (g) and 2.0e-8 (f, 1 <= a <= 14).

#ifndef SWK_IN_ISA

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "../swkernels.h"
#include "dtypes.h"
#include "isa.h"
#include "peaks.h"
#include "tokens.h"

namespace swk {

struct Glu {
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* h;
  int64_t h_stride;
};

}  // namespace swk

#define SWK_SELF "glu_absmax.cpp"
#include "each_isa.h"

namespace swk {
namespace {

template <class Type, int activation>
auto glu_kernel(int isa) {
#define SWK_KERNEL glu_rows<Type, activation>
  return SWK_FOR_ISA(isa, SWK_KERNEL);
}

template <class Type, int activation>
void glu_absmax(const Glu& glu, int64_t T, int64_t C, int64_t* keys, const RowOrder& order,
                int threads, int isa) {
  constexpr int64_t kGrain = 16 << 10;  // more arithmetic than a pass over the same elements
  const auto kernel = glu_kernel<Type, activation>(isa);
  find_peaks<Type>(
      Grid(T, C, kGrain, threads), keys, order,
      [&](int64_t begin, int64_t end, int64_t first, int64_t width, PeakState<Type>& state) {
        const int64_t counted = keys ? order.counted() : 0;
        kernel(glu, order.rows(), begin, end, counted, first, width, state.best, state.where);
      });
}

template <class Type>
auto for_activation(int activation) {
  return activation == SWK_SILU        ? &glu_absmax<Type, SWK_SILU>
         : activation == SWK_GELU      ? &glu_absmax<Type, SWK_GELU>
         : activation == SWK_GELU_TANH ? &glu_absmax<Type, SWK_GELU_TANH>
                                       : &glu_absmax<Type, SWK_RELU>;
}

}  // namespace
}  // namespace swk

int swk_cpu_glu_absmax(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
                       void* h, int64_t h_stride, int dtype, int activation, int64_t T, int64_t C,
                       int64_t* keys, const int64_t* token_index, int64_t token_offset, int threads,
                       int isa) {
  using namespace swk;
  if (T < 0 || C < 0) return SWK_BAD_SIZE;
  const int resolved = resolve_isa(isa);
  if (!resolved) return SWK_BAD_ISA;
  if (dtype < SWK_FLOAT32 || dtype > SWK_FLOAT16) return SWK_BAD_DTYPE;
  if (activation < SWK_SILU || activation > SWK_RELU) return SWK_BAD_ACTIVATION;
  if (T == 0 || C == 0) return SWK_OK;
  if (!gate || !up || !h) return SWK_BAD_SIZE;

  const Glu glu = {gate, gate_stride, up, up_stride, h, h_stride};
  try {
    const RowOrder order(keys ? token_index : nullptr, keys ? token_offset : 0, T);
    if (order.status() != SWK_OK) return order.status();
    const auto run = dtype == SWK_FLOAT32    ? for_activation<Float32>(activation)
                     : dtype == SWK_BFLOAT16 ? for_activation<BFloat16>(activation)
                                             : for_activation<Float16>(activation);
    run(glu, T, C, keys, order, threads, resolved);
    return SWK_OK;
  } catch (const std::bad_alloc&) {
    return SWK_OUT_OF_MEMORY;
  }
}

#else  // once per instruction set

// e^x within 1 ulp; infinity above 88.72, 0 below -87. Anything for NaN: the activations multiply
// by their argument.
SWK_FN SWK_INLINE float exponential(float x) {
  x = x < 89.0f ? x : 89.0f;
  x = x > -87.3f ? x : -87.3f;
  // x / ln 2 rounds to an integer n once 1.5 * 2^23 is added; 126 more makes the lowest bits the
  // exponent field of 2^(n - 1). That and twice e^r reach up to 2^128 without overflow between.
  constexpr float kShift = 12582912.0f + 126.0f;
  const float shifted = x * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
  float p = 2 * 0.00139505405f;
  p = p * r + 2 * 0.00836891774f;
  p = p * r + 2 * 0.0416662060f;
  p = p * r + 2 * 0.166665182f;
  p = p * r + 2 * 0.5f;
  p = p * r + 2.0f;
  p = p * r + 2.0f;
  return p * float_of(bits_of(shifted) << 23);
}

// Phi(x), the standard normal distribution function: near 0 exact to the last bits of 1/2, and in
// the lower tail to a relative 1e-6, where 1 + erf(x / sqrt(2)) would cancel.
SWK_FN SWK_INLINE float normal_cdf(float x) {
  const float a = float_of(bits_of(x) & 0x7FFFFFFF);
  const float square = x * x;
  float g = -7.65420873e-6f;
  g = g * square + 1.13486373e-4f;
  g = g * square - 1.18632994e-3f;
  g = g * square + 9.97332341e-3f;
  g = g * square - 6.64903599e-2f;
  g = g * square + 3.98942280e-1f;
  const float centre = 0.5f + x * g;

  const float t = 1.0f / (1.0f + 0.25f * a);
  float f = -0.0464073438f;
  f = f * t + 0.108180189f;
  f = f * t - 0.0209685361f;
  f = f * t + 0.0912888449f;
  f = f * t + 0.0739624732f;
  f = f * t + 0.0945082500f;
  f = f * t + 0.0996684181f;
  f = f * t + 0.0997366545f;
  const float below = exponential(-0.5f * square) * (f * t);  // Phi(-a)
  const float tail = x > 0.0f ? 1.0f - below : below;
  return a < 1.0f ? centre : tail;
}

template <int activation>
SWK_FN SWK_INLINE float activate(float x) {
  if (activation == SWK_SILU) return x / (1.0f + exponential(-x));
  if (activation == SWK_GELU) return x * normal_cdf(x);
  if (activation == SWK_GELU_TANH) {
    // -2 sqrt(2/pi) and -2 sqrt(2/pi) 0.044715
    return x / (1.0f + exponential(x * (-1.59576912f - 0.0713548163f * (x * x))));
  }
  return x < 0.0f ? 0.0f : x;
}

#ifdef SWK_F16C
// float16 by the CPU's own conversions, kBlock elements.
SWK_FN SWK_INLINE void widen_f16(const int16_t* from, int32_t* to) {
  for (int i = 0; i < kBlock; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_castps_si256(_mm256_cvtph_ps(half)));
  }
}

SWK_FN SWK_INLINE void narrow_f16(const int32_t* from, int16_t* to) {
  for (int i = 0; i < kBlock; i += 8) {
    const __m256i full = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_castsi256_ps(full), _MM_FROUND_TO_NEAREST_INT));
  }
}
#endif

// Computes `count` channels of one row, a multiple of kBlock.
template <class Type, int activation>
SWK_FN void glu_span(const typename Type::Bits* SWK_RESTRICT gate,
                     const typename Type::Bits* SWK_RESTRICT up,
                     typename Type::Bits* SWK_RESTRICT h, int count) {
#ifdef SWK_F16C
  if constexpr (std::is_same_v<Type, Float16>) {
    int32_t wide[3][kBlock];
    for (int i = 0; i < count; i += kBlock) {
      widen_f16(gate + i, wide[0]);
      widen_f16(up + i, wide[1]);
      glu_span<Float32, activation>(wide[0], wide[1], wide[2], kBlock);
      narrow_f16(wide[2], h + i);
    }
    return;
  }
#endif
  for (int i = 0; i < count / kBlock * kBlock; ++i) {
    h[i] = from_float<Type>(activate<activation>(to_float<Type>(gate[i])) * to_float<Type>(up[i]));
  }
}

// Computes the last channels of a row, fewer than kBlock.
template <class Type, int activation>
SWK_FN void glu_rest(const typename Type::Bits* gate, const typename Type::Bits* up,
                     typename Type::Bits* h, int count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof *h;
  typename Type::Bits padded[3][kBlock] = {};
  std::memcpy(padded[0], gate, bytes);
  std::memcpy(padded[1], up, bytes);
  glu_span<Type, activation>(padded[0], padded[1], padded[2], kBlock);
  std::memcpy(h, padded[2], bytes);
}

// Computes the rows at the positions [begin, end) of `rows` (of the matrix itself where null), and
// takes those at positions below `counted` into the state.
template <class Type, int activation>
SWK_FN void glu_rows(const Glu& glu, const int64_t* rows, int64_t begin, int64_t end,
                     int64_t counted, int64_t first, int64_t width, typename Type::Bits* best,
                     uint32_t* where) {
  using Bits = typename Type::Bits;
  constexpr int kSpan = 8 * kBlock;
  for (int64_t position = begin; position < end; position += kRows) {
    const int count = static_cast<int>(end - position < kRows ? end - position : kRows);
    const int64_t left = counted - position;
    const int taken = static_cast<int>(left < 0 ? 0 : left < count ? left : count);
    const Bits* gate[kRows];
    const Bits* up[kRows];
    Bits* h[kRows];
    for (int k = 0; k < count; ++k) {
      const int64_t row = rows ? rows[position + k] : position + k;
      gate[k] = static_cast<const Bits*>(glu.gate) + row * glu.gate_stride + first;
      up[k] = static_cast<const Bits*>(glu.up) + row * glu.up_stride + first;
      h[k] = static_cast<Bits*>(glu.h) + row * glu.h_stride + first;
    }
    for (int64_t c = 0; c < width; c += kSpan) {
      const int span = static_cast<int>(width - c < kSpan ? width - c : kSpan);
      const int whole = span / kBlock * kBlock;
      for (int k = 0; k < count; ++k) {
        glu_span<Type, activation>(gate[k] + c, up[k] + c, h[k] + c, whole);
        if (span > whole) {
          const int64_t last = c + whole;
          glu_rest<Type, activation>(gate[k] + last, up[k] + last, h[k] + last, span - whole);
        }
      }
      if (taken == 0) continue;
      // As in column_absmax.cpp, the last row stands in for those past the end.
      const Bits* peaks[kRows];
      for (int k = 0; k < kRows; ++k) peaks[k] = h[k < taken ? k : taken - 1] + c;
      take_rows<Type>(peaks, best + c, where + c, static_cast<uint32_t>(position), span);
    }
  }
}

#endif
