// y += the part that k deltas of a weight have in x W^T, in place and in one pass over the tokens.
//
// Entries with the same row follow one another where the list is sorted by row; their products are
// summed in float32 and y is read, rounded and written once for the run.

#ifndef SWK_IN_ISA

#include <cstdint>

#include "../swkernels.h"
#include "coordinates.h"
#include "dtypes.h"
#include "isa.h"
#include "peaks.h"

namespace swk {

struct Deltas {
  const void* x;
  int64_t x_stride;
  void* y;
  int64_t y_stride;
  const float* values;
  const int32_t* rows;
  const int32_t* cols;
  int64_t k;
};

}  // namespace swk

#define SWK_SELF "sparse_linear.cpp"
#include "each_isa.h"

namespace swk {
namespace {

template <class X, class Y>
void sparse_linear(const Deltas& deltas, int64_t T, int threads, int isa) {
  constexpr int64_t kGrain = 32 << 10;  // products that are worth a task
#define SWK_KERNEL add_tokens<X, Y>
  const auto kernel = SWK_FOR_ISA(isa, SWK_KERNEL);
#undef SWK_KERNEL
  const int64_t chunk = std::max<int64_t>(1, kGrain / deltas.k);
  run_tasks((T + chunk - 1) / chunk, threads, [&](int64_t task) {
    kernel(deltas, task * chunk, std::min(T, (task + 1) * chunk));
  });
}

template <class X>
auto for_y(int dtype) {
  return dtype == SWK_FLOAT32    ? &sparse_linear<X, Float32>
         : dtype == SWK_BFLOAT16 ? &sparse_linear<X, BFloat16>
                                 : &sparse_linear<X, Float16>;
}

}  // namespace
}  // namespace swk

int swk_cpu_sparse_linear(const void* x, int x_dtype, int64_t x_stride, void* y, int y_dtype,
                          int64_t y_stride, int64_t T, int64_t D, int64_t H, const float* values,
                          const int32_t* rows, const int32_t* cols, int64_t k, int threads,
                          int isa) {
  using namespace swk;
  if (T < 0 || D < 0 || H < 0 || k < 0) return SWK_BAD_SIZE;
  const int resolved = resolve_isa(isa);
  if (!resolved) return SWK_BAD_ISA;
  if (x_dtype < SWK_FLOAT32 || x_dtype > SWK_FLOAT16) return SWK_BAD_DTYPE;
  if (y_dtype < SWK_FLOAT32 || y_dtype > SWK_FLOAT16) return SWK_BAD_DTYPE;
  if (k == 0) return SWK_OK;
  if (!rows || !cols || !values || (T > 0 && (!x || !y))) return SWK_BAD_SIZE;
  if (!all_inside(rows, cols, k, D, H)) return SWK_BAD_INDEX;
  const auto run = x_dtype == SWK_FLOAT32    ? for_y<Float32>(y_dtype)
                   : x_dtype == SWK_BFLOAT16 ? for_y<BFloat16>(y_dtype)
                                             : for_y<Float16>(y_dtype);
  run({x, x_stride, y, y_stride, values, rows, cols, k}, T, threads, resolved);
  return SWK_OK;
}

#else  // once per instruction set

template <class X, class Y>
SWK_FN void add_tokens(const Deltas& deltas, int64_t begin, int64_t end) {
  const float* const SWK_RESTRICT values = deltas.values;
  const int32_t* const SWK_RESTRICT rows = deltas.rows;
  const int32_t* const SWK_RESTRICT cols = deltas.cols;
  for (int64_t t = begin; t < end; ++t) {
    const auto* const x = static_cast<const typename X::Bits*>(deltas.x) + t * deltas.x_stride;
    auto* const y = static_cast<typename Y::Bits*>(deltas.y) + t * deltas.y_stride;
    for (int64_t i = 0; i < deltas.k;) {
      const int32_t row = rows[i];
      float sum = to_float<Y>(y[row]);
      for (; i < deltas.k && rows[i] == row; ++i) sum += values[i] * to_float<X>(x[cols[i]]);
      y[row] = from_float<Y>(sum);
    }
  }
}

#endif
