// The values of a packed matrix, outliers in the same pass.

#ifndef SWK_IN_ISA

#include <cstdint>

#include "../swkernels.h"
#include "coordinates.h"
#include "dtypes.h"
#include "isa.h"
#include "packed.h"
#include "pages.h"
#include "peaks.h"

namespace swk {

struct Unpacking {
  const uint8_t* codes;
  Layout layout;
  Scales scales;
  Outliers outliers;
  int64_t begin;  // the element that is written to out[0]
  void* out;
  bool past_cache;
};

}  // namespace swk

#define SWK_PACKING
#define SWK_SELF "block_dequantize.cpp"
#include "each_isa.h"

int swk_cpu_block_dequantize(const uint8_t* codes, int64_t D, int64_t H, int64_t block_rows,
                             int64_t block_columns, int code, int symmetric, const void* scales,
                             int scale_dtype, const void* zero_points, int zero_bytes,
                             const int32_t* positions, const void* values, int value_dtype,
                             int64_t k, int64_t begin, int64_t end, void* out, int dtype,
                             int threads, int isa) {
  using namespace swk;
  const Layout layout(D, H, block_rows, block_columns, code, symmetric);
  if (!layout.valid()) return SWK_BAD_SIZE;
  const int resolved = resolve_isa(isa);
  if (!resolved) return SWK_BAD_ISA;
  const Scales given{scales, scale_dtype, zero_points, zero_bytes};
  if (dtype < SWK_FLOAT32 || dtype > SWK_FLOAT16) return SWK_BAD_DTYPE;
  if (value_dtype < SWK_FLOAT32 || value_dtype > SWK_FLOAT16) return SWK_BAD_DTYPE;
  if (!given.valid()) return SWK_BAD_DTYPE;
  const Outliers outliers{positions, values, value_dtype, k};
  if (!outliers.valid(layout.elements())) return SWK_BAD_INDEX;
  if (begin < 0 || end < begin || end > layout.elements()) return SWK_BAD_INDEX;
  if (begin == end) return SWK_OK;
  if (!codes || !scales || !out || (k > 0 && !values)) return SWK_BAD_SIZE;
  // Elements of a task: even, and a multiple of a cache line. In a large output each thread gets
  // huge pages of its own: the first write to one waits until all of it has been cleared.
  constexpr int64_t kCaches = 16 << 20;  // bytes that are worth the way past the caches
  const int64_t bytes = (end - begin) * (dtype == SWK_FLOAT32 ? 4 : 2);
  const int64_t kTask = bytes > kCaches ? 1 << 20 : 64 << 10;
  expect_writes(out, bytes);
  const Unpacking job{codes, layout, given, outliers, begin, out, bytes > kCaches};
#define SWK_KERNEL unpack<Float32>
  auto run = SWK_FOR_ISA(resolved, SWK_KERNEL);
#undef SWK_KERNEL
#define SWK_KERNEL unpack<BFloat16>
  if (dtype == SWK_BFLOAT16) run = SWK_FOR_ISA(resolved, SWK_KERNEL);
#undef SWK_KERNEL
#define SWK_KERNEL unpack<Float16>
  if (dtype == SWK_FLOAT16) run = SWK_FOR_ISA(resolved, SWK_KERNEL);
#undef SWK_KERNEL
  run_tasks((end - begin + kTask - 1) / kTask, threads, [&](int64_t task) {
    run(job, begin + task * kTask, std::min(end, begin + (task + 1) * kTask));
  });
  return SWK_OK;
}

#else  // once per instruction set

// The elements [begin, end) of the matrix.
template <class Type>
SWK_FN void unpack(const Unpacking& job, int64_t begin, int64_t end) {
  auto* const out = static_cast<typename Type::Bits*>(job.out) - job.begin;
  decode<Type>(job.codes, job.layout, job.scales, begin, end, out + begin, job.past_cache);
#ifdef SWK_ZMM
  if (job.past_cache) _mm_sfence();  // outliers are written after what is on its way
#endif
  const Outliers& outliers = job.outliers;
  for (int64_t i = outliers.from(begin); i < outliers.count && outliers.positions[i] < end; ++i) {
    out[outliers.positions[i]] = from_float<Type>(value_of(outliers.values, outliers.dtype, i));
  }
}

#endif
