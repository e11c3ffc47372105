// The gradient of a weight at k coordinates: k dot products over tokens, no dense gradient.
//
// Tokens come one after the other: a row of x and a row of dy fit into the first caches, and the
// elements that the list names are gathered from there. The tokens are cut into at most 64 chunks;
// each keeps float32 sums of its own, which are added up in double and always in the same order,
// so the result depends neither on the threads nor on who was first. Rows in 16 bits are widened
// to float32 first where so many of their elements are used that this pays.

#ifndef SWK_IN_ISA

#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

#include "../swkernels.h"
#include "coordinates.h"
#include "dtypes.h"
#include "isa.h"
#include "peaks.h"

namespace swk {

struct Samples {
  const void* dy;
  int64_t dy_stride;
  const void* x;
  int64_t x_stride;
  int64_t D, H;
  const int32_t* rows;
  const int32_t* cols;
  int64_t k;
};

}  // namespace swk

#define SWK_SELF "sampled_grad.cpp"
#include "each_isa.h"

namespace swk {
namespace {

constexpr int64_t kFewestTokens = 256;  // of a chunk
constexpr int64_t kMostChunks = 64;
constexpr int64_t kPanel = 16 << 10;  // coordinates whose sums stay in the second-level cache
constexpr int64_t kGrain = 64 << 10;  // products that are worth a thread

template <class Dy, class X>
void sampled_grad(const Samples& all, int64_t T, float* values, int threads, int isa) {
#define SWK_KERNEL sum_tokens<Dy, X>
  const auto kernel = SWK_FOR_ISA(isa, SWK_KERNEL);
#undef SWK_KERNEL
  const int64_t chunk = std::max(kFewestTokens, (T + kMostChunks - 1) / kMostChunks);
  const int64_t chunks = (T + chunk - 1) / chunk;
  const int64_t panel = std::min(all.k, kPanel);
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  std::vector<float> sums(size(chunks * panel));
  const int64_t worth = T * panel / kGrain;
  const int used = static_cast<int>(std::clamp<int64_t>(worth, 1, std::max(threads, 1)));
  // Room of each chunk for one widened row of dy and of x.
  std::vector<float> wide(size(chunks * (all.D + all.H)));
  for (int64_t first = 0; first < all.k; first += panel) {
    Samples part = all;
    part.rows += first;
    part.cols += first;
    part.k = std::min(panel, all.k - first);
    run_tasks(chunks, used, [&](int64_t task) {
      const int64_t begin = task * chunk, end = std::min(T, begin + chunk);
      kernel(part, begin, end, sums.data() + task * panel,
             wide.data() + task * (all.D + all.H));
    });
    for (int64_t i = 0; i < part.k; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += sums[size(c * panel + i)];
      values[first + i] = static_cast<float>(sum);
    }
  }
}

template <class Dy>
auto for_x(int dtype) {
  return dtype == SWK_FLOAT32    ? &sampled_grad<Dy, Float32>
         : dtype == SWK_BFLOAT16 ? &sampled_grad<Dy, BFloat16>
                                 : &sampled_grad<Dy, Float16>;
}

}  // namespace
}  // namespace swk

int swk_cpu_sampled_grad(const void* dy, int dy_dtype, int64_t dy_stride, const void* x,
                         int x_dtype, int64_t x_stride, int64_t T, int64_t D, int64_t H,
                         const int32_t* rows, const int32_t* cols, int64_t k, float* values,
                         int threads, int isa) {
  using namespace swk;
  if (T < 0 || D < 0 || H < 0 || k < 0) return SWK_BAD_SIZE;
  const int resolved = resolve_isa(isa);
  if (!resolved) return SWK_BAD_ISA;
  if (dy_dtype < SWK_FLOAT32 || dy_dtype > SWK_FLOAT16) return SWK_BAD_DTYPE;
  if (x_dtype < SWK_FLOAT32 || x_dtype > SWK_FLOAT16) return SWK_BAD_DTYPE;
  if (k == 0) return SWK_OK;
  if (!rows || !cols || !values || (T > 0 && (!dy || !x))) return SWK_BAD_SIZE;
  if (!all_inside(rows, cols, k, D, H)) return SWK_BAD_INDEX;
  if (T == 0) {
    std::fill(values, values + k, 0.0f);
    return SWK_OK;
  }
  try {
    const auto run = dy_dtype == SWK_FLOAT32    ? for_x<Float32>(x_dtype)
                     : dy_dtype == SWK_BFLOAT16 ? for_x<BFloat16>(x_dtype)
                                                : for_x<Float16>(x_dtype);
    run({dy, dy_stride, x, x_stride, D, H, rows, cols, k}, T, values, threads, resolved);
    return SWK_OK;
  } catch (const std::bad_alloc&) {
    return SWK_OUT_OF_MEMORY;
  }
}

#else  // once per instruction set

template <class Type>
SWK_FN void widen_row(const typename Type::Bits* SWK_RESTRICT from, float* SWK_RESTRICT to,
                      int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float<Type>(from[i]);
}

// sums[i] = the products of the tokens [begin, end), one after the other.
template <class Dy, class X>
SWK_FN void sum_tokens(const Samples& samples, int64_t begin, int64_t end,
                       float* SWK_RESTRICT sums, float* SWK_RESTRICT wide) {
  constexpr int64_t kWorthWidening = 8;  // one of how many elements is used
  const int32_t* const SWK_RESTRICT rows = samples.rows;
  const int32_t* const SWK_RESTRICT cols = samples.cols;
  const int64_t k = samples.k;
  const bool widen_dy = !std::is_same_v<Dy, Float32> && k * kWorthWidening > samples.D;
  const bool widen_x = !std::is_same_v<X, Float32> && k * kWorthWidening > samples.H;
  for (int64_t i = 0; i < k; ++i) sums[i] = 0;
  for (int64_t t = begin; t < end; ++t) {
    const auto* const dy = static_cast<const typename Dy::Bits*>(samples.dy) +
                           t * samples.dy_stride;
    const auto* const x = static_cast<const typename X::Bits*>(samples.x) + t * samples.x_stride;
    if (widen_dy) widen_row<Dy>(dy, wide, samples.D);
    if (widen_x) widen_row<X>(x, wide + samples.D, samples.H);
    const float* const SWK_RESTRICT wide_dy = wide;
    const float* const SWK_RESTRICT wide_x = wide + samples.D;
    if (widen_dy && widen_x) {
      for (int64_t i = 0; i < k; ++i) sums[i] += wide_dy[rows[i]] * wide_x[cols[i]];
    } else if (widen_dy) {
      for (int64_t i = 0; i < k; ++i) sums[i] += wide_dy[rows[i]] * to_float<X>(x[cols[i]]);
    } else if (widen_x) {
      for (int64_t i = 0; i < k; ++i) sums[i] += to_float<Dy>(dy[rows[i]]) * wide_x[cols[i]];
    } else {
      for (int64_t i = 0; i < k; ++i) {
        sums[i] += to_float<Dy>(dy[rows[i]]) * to_float<X>(x[cols[i]]);
      }
    }
  }
}

#endif
