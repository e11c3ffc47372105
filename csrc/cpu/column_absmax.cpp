// Per-channel peaks of a matrix, at the speed of reading it.
//
// Rows are read whole and in order, eight at a time. Almost no element is a record (a new peak of
// its channel: about ln T of T in random data), so the fast path only asks whether anything in a
// block of 8 x 64 elements is one: per element one load, one `and`, one `max`. Only if so is the
// block's state (magnitude and row of each channel's peak) updated, again without branches, so that
// data of which every row is a record costs little more.

#ifndef SWK_IN_ISA

#include <cstdint>
#include <new>

#include "../swkernels.h"
#include "dtypes.h"
#include "isa.h"
#include "peaks.h"
#include "tokens.h"

#define SWK_SELF "column_absmax.cpp"
#include "each_isa.h"

namespace swk {
namespace {

template <class Type>
void column_absmax(const void* x, int64_t C, int64_t stride, int64_t* keys, const RowOrder& order,
                   int threads, int isa) {
  constexpr int64_t kGrain = (256 << 10) / sizeof(typename Type::Bits);
  if (order.counted() < kRowsPerStep) {  // the state of find_peaks would cost more than the rows
    const auto merge = SWK_FOR_ISA(isa, merge_row<Type>);
    for (int64_t p = 0; p < order.counted(); ++p) {
      const int64_t row = order.rows() ? order.rows()[p] : p;
      const auto* const from = static_cast<const typename Type::Bits*>(x) + row * stride;
      merge(from, 0xFFFFFFFF - static_cast<uint64_t>(order.token(p)), keys, C);
    }
    return;
  }
  const auto kernel = SWK_FOR_ISA(isa, scan_rows<Type>);
  const auto* const values = static_cast<const typename Type::Bits*>(x);
  find_peaks<Type>(
      Grid(order.counted(), C, kGrain, threads), keys, order,
      [&](int64_t begin, int64_t end, int64_t first, int64_t width, PeakState<Type>& state) {
        kernel(values + first, stride, order.rows(), begin, end, width, state.best, state.where);
      });
}

}  // namespace
}  // namespace swk

int swk_cpu_column_absmax(const void* x, int dtype, int64_t T, int64_t C, int64_t stride,
                          int64_t* keys, const int64_t* token_index, int64_t token_offset,
                          int threads, int isa) {
  using namespace swk;
  if (T < 0 || C < 0) return SWK_BAD_SIZE;
  const int resolved = resolve_isa(isa);
  if (!resolved) return SWK_BAD_ISA;
  if (dtype < SWK_FLOAT32 || dtype > SWK_FLOAT16) return SWK_BAD_DTYPE;
  if (T == 0 || C == 0) return SWK_OK;
  if (!x || !keys) return SWK_BAD_SIZE;
  try {
    const RowOrder order(token_index, token_offset, T);
    if (order.status() != SWK_OK || order.counted() == 0) return order.status();
    const auto run = dtype == SWK_FLOAT32    ? &column_absmax<Float32>
                     : dtype == SWK_BFLOAT16 ? &column_absmax<BFloat16>
                                             : &column_absmax<Float16>;
    run(x, C, stride, keys, order, threads, resolved);
    return SWK_OK;
  } catch (const std::bad_alloc&) {
    return SWK_OUT_OF_MEMORY;
  }
}

#else  // once per instruction set

// keys[c] = max(keys[c], key of x[c]) for one row, `low` the low half of its keys.
template <class Type>
SWK_FN void merge_row(const typename Type::Bits* SWK_RESTRICT x, uint64_t low,
                      int64_t* SWK_RESTRICT keys, int64_t width) {
  for (int64_t c = 0; c < width; ++c) {
    uint32_t magnitude = bits_of(to_float<Type>(x[c])) & 0x7FFFFFFF;
    magnitude = magnitude > kInfinityBits ? kNanBits : magnitude;
    const int64_t key = static_cast<int64_t>(static_cast<uint64_t>(magnitude) << 32 | low);
    keys[c] = key > keys[c] ? key : keys[c];
  }
}

// Takes the rows [begin, end) of `rows` (of the matrix itself where null) into the state.
template <class Type>
SWK_FN void scan_rows(const typename Type::Bits* x, int64_t stride, const int64_t* rows,
                      int64_t begin, int64_t end, int64_t width, typename Type::Bits* best,
                      uint32_t* where) {
  for (int64_t position = begin; position < end; position += kRows) {
    const typename Type::Bits* at[kRows];
    for (int k = 0; k < kRows; ++k) {
      // The last row stands in for those past the end: of equals the first counts.
      const int64_t p = position + k < end ? position + k : end - 1;
      at[k] = x + (rows ? rows[p] : p) * stride;
    }
    take_rows<Type>(at, best, where, static_cast<uint32_t>(position), width);
  }
}

#endif
