// Per-channel peaks of a matrix, at the speed of reading it.
//
// Rows are read whole and in order, eight at a time. Almost no element is a record (a new peak of
// its channel: about ln T of T in random data), so the fast path only asks whether anything in a
// block of 8 x 64 elements is one: per element one load, one `and`, one `max`. Only if so is the
// block's state (magnitude and row of each channel's peak) updated, again without branches, so that
// data of which every row is a record costs little more.
//
// Few rows take another way, because that state would cost more than they do: the peaks of a piece of
// the channels over all rows are found in L1 and merged into the keys at once.

#ifndef SWK_IN_ISA

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "../swkernels.h"
#include "dtypes.h"
#include "isa.h"
#include "peaks.h"
#include "threads.h"
#include "tokens.h"

namespace swk {
constexpr int kFewRows = 64;
constexpr int kPiece = 1024;  // channels of few rows that a thread takes at once: L1 holds them
}  // namespace swk

#define SWK_SELF "column_absmax.cpp"
#include "each_isa.h"

namespace swk {
namespace {

// `worth`: how many threads the work is worth.
template <class Type>
void few_rows(const typename Type::Bits* x, int64_t C, int64_t stride, int64_t* keys,
              const RowOrder& order, int64_t worth, int threads, int isa) {
  const typename Type::Bits* rows[kFewRows];
  uint32_t low[kFewRows];  // the low half of a row's keys
  for (int p = 0; p < static_cast<int>(order.counted()); ++p) {
    rows[p] = x + (order.rows() ? order.rows()[p] : p) * stride;
    low[p] = 0xFFFFFFFF - static_cast<uint32_t>(order.token(p));
  }
  const auto merge = SWK_FOR_ISA(isa, merge_rows<Type>);
  const int count = static_cast<int>(order.counted());
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t first; (first = kPiece * next++) < C;) {
      merge(rows, low, count, first, static_cast<int>(std::min<int64_t>(kPiece, C - first)), keys);
    }
  };
  run_on_threads(static_cast<int>(std::clamp<int64_t>(worth, 1, std::max(threads, 1))), work);
}

template <class Type>
void column_absmax(const void* x, int64_t C, int64_t stride, int64_t* keys, const RowOrder& order,
                   int threads, int isa) {
  constexpr int64_t kGrain = (256 << 10) / sizeof(typename Type::Bits);
  const auto* const values = static_cast<const typename Type::Bits*>(x);
  if (order.counted() <= kFewRows) {
    few_rows<Type>(values, C, stride, keys, order, C * order.counted() / kGrain, threads, isa);
    return;
  }
  const auto kernel = SWK_FOR_ISA(isa, scan_rows<Type>);
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

// Not inlined: GCC would interleave the rows of merge_rows and lose the vector code.
template <class Type>
SWK_FN SWK_NOINLINE void take_row(const typename Type::Bits* SWK_RESTRICT x,
                                  typename Type::Bits row, typename Type::Bits* SWK_RESTRICT best,
                                  typename Type::Bits* SWK_RESTRICT where, int width) {
  for (int i = 0; i < width; ++i) {
    typename Type::Bits magnitude = x[i] & Type::kMagnitude;
    // All NaNs are one value, so that the first of them stays.
    magnitude = magnitude > Type::kInfinity ? Type::kMagnitude : magnitude;
    where[i] = magnitude > best[i] ? row : where[i];
    best[i] = magnitude > best[i] ? magnitude : best[i];
  }
}

// Merges the channels [c, c + width), at most kPiece, of `count` rows, in the order of their tokens,
// into the keys.
template <class Type>
SWK_FN void merge_rows(const typename Type::Bits* const* rows, const uint32_t* low, int count,
                       int64_t c, int width, int64_t* SWK_RESTRICT keys) {
  using Bits = typename Type::Bits;
  Bits best[kPiece], where[kPiece];  // the magnitude, and its place in `rows`
  for (int i = 0; i < width; ++i) best[i] = -1;
  for (int i = 0; i < width; ++i) where[i] = 0;
  for (int k = 0; k < count; ++k) {
    take_row<Type>(rows[k] + c, static_cast<Bits>(k), best, where, width);
  }
  for (int i = 0; i < width; ++i) {
    const uint64_t magnitude = best[i] > Type::kInfinity ? kNanBits : Type::key_bits(best[i]);
    const int64_t key = static_cast<int64_t>(magnitude << 32 | low[where[i]]);
    keys[c + i] = key > keys[c + i] ? key : keys[c + i];
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
