// Zeroes or scales a matrix at k coordinates, in place.

#include <cstdint>
#include <cstring>

#include "../swkernels.h"
#include "coordinates.h"
#include "dtypes.h"
#include "isa.h"
#include "peaks.h"

namespace swk::scalar {
#define SWK_FN
#include "elements.h"
#undef SWK_FN
}  // namespace swk::scalar

namespace swk {
namespace {

template <class Type>
void masked_grad(void* grad, int64_t stride, const int32_t* rows, const int32_t* cols, int64_t k,
                 float scale) {
  auto* const values = static_cast<typename Type::Bits*>(grad);
  for (int64_t i = 0; i < k; ++i) {
    auto& value = values[rows[i] * stride + cols[i]];
    value = scale == 0.0f ? typename Type::Bits{0}
                          : scalar::from_float<Type>(scalar::to_float<Type>(value) * scale);
  }
}

}  // namespace
}  // namespace swk

int swk_cpu_masked_grad(void* grad, int dtype, int64_t stride, int64_t D, int64_t H,
                        const int32_t* rows, const int32_t* cols, int64_t k, float scale, int,
                        int isa) {
  using namespace swk;
  if (D < 0 || H < 0 || k < 0) return SWK_BAD_SIZE;
  if (!resolve_isa(isa)) return SWK_BAD_ISA;
  if (dtype < SWK_FLOAT32 || dtype > SWK_FLOAT16) return SWK_BAD_DTYPE;
  if (k == 0) return SWK_OK;
  if (!grad || !rows || !cols) return SWK_BAD_SIZE;
  if (!all_inside(rows, cols, k, D, H)) return SWK_BAD_INDEX;
  const auto run = dtype == SWK_FLOAT32    ? &masked_grad<Float32>
                   : dtype == SWK_BFLOAT16 ? &masked_grad<BFloat16>
                                           : &masked_grad<Float16>;
  run(grad, stride, rows, cols, k, scale);
  return SWK_OK;
}
