// The frame of every kernel that finds peaks: work for threads, their state, and the merge.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "dtypes.h"
#include "threads.h"
#include "tokens.h"

namespace swk {

constexpr int kRowsPerStep = 8;  // that kernels look at together; see lanes.h

// A matrix cut into tasks of `chunk` rows and `panel` columns, numbered down the first panel, then
// down the next. Threads take tasks in this order, so each meets the rows of a panel in order.
struct Grid {
  int64_t rows, columns;
  int64_t chunk, panel;
  int64_t chunks, panels;
  int threads;

  // `grain`: how many elements are worth a thread of their own.
  Grid(int64_t T, int64_t C, int64_t grain, int most_threads) : rows(T), columns(C) {
    // So that the state of a panel (8 bytes a channel) stays in the second-level cache.
    constexpr int64_t kWidest = 1 << 16;
    constexpr int64_t kAlign = 64;
    // T is less than 2^32, so this does not overflow.
    const int64_t worth = T * std::min<int64_t>(C, 1 << 30) / grain;
    threads = static_cast<int>(std::clamp<int64_t>(worth, 1, std::max(most_threads, 1)));
    panel = std::min(columns, kWidest);
    chunk = std::max<int64_t>(1, grain / panel / kRowsPerStep) * kRowsPerStep;
    chunks = (rows + chunk - 1) / chunk;
    if (chunks < threads) {  // few rows: share out columns
      const int64_t wanted = (threads + chunks - 1) / chunks;
      panel = std::min(panel, ((columns + wanted - 1) / wanted + kAlign - 1) / kAlign * kAlign);
    }
    panels = (columns + panel - 1) / panel;
  }
};

// Where the peak of each channel of a panel stands so far, for one thread.
template <class Type>
struct PeakState {
  using Bits = typename Type::Bits;
  Bits* best;       // its magnitude, -1 where there is none
  uint32_t* where;  // the position of its row in the RowOrder

  static constexpr size_t kBytes = sizeof(Bits) + sizeof(uint32_t);  // of one channel

  PeakState(unsigned char* memory, int64_t width)
      : best(reinterpret_cast<Bits*>(memory + static_cast<size_t>(width) * sizeof(uint32_t))),
        where(reinterpret_cast<uint32_t*>(memory)) {}

  // Starts just below the peaks that are known: rows that cannot change a key are no records.
  void start(const int64_t* keys, int64_t width) {
    for (int64_t c = 0; c < width; ++c) {
      const uint32_t known = static_cast<uint32_t>(static_cast<uint64_t>(keys[c]) >> 32);
      best[c] = known ? Type::below(std::min(known, kInfinityBits + 1)) : Bits{-1};
      where[c] = kNowhere;
    }
  }

  void merge(int64_t* keys, int64_t width, const RowOrder& order) const {
    for (int64_t c = 0; c < width; ++c) {
      if (where[c] == kNowhere) continue;
      const uint64_t magnitude = best[c] > Type::kInfinity ? kNanBits : Type::key_bits(best[c]);
      const uint64_t token = static_cast<uint64_t>(order.token(where[c]));
      keys[c] = std::max(keys[c], static_cast<int64_t>(magnitude << 32 | (0xFFFFFFFF - token)));
    }
  }

 private:
  static constexpr uint32_t kNowhere = RowOrder::kLastToken + 1;  // there are no more rows
};

// Calls scan(begin, end, first, width, state) for every task: the rows at the positions
// [begin, end) of `order`, the columns [first, first + width); then merges the peaks into keys,
// unless they are null. Throws std::bad_alloc before anything is changed.
template <class Type, class Scan>
void find_peaks(const Grid& grid, int64_t* keys, const RowOrder& order, const Scan& scan) {
  constexpr size_t kCacheLine = 64;
  const size_t slot =
      (static_cast<size_t>(grid.panel) * PeakState<Type>::kBytes / kCacheLine + 2) * kCacheLine;
  std::vector<unsigned char> memory(slot * static_cast<size_t>(grid.threads) + kCacheLine);
  unsigned char* const aligned =
      memory.data() + (kCacheLine - reinterpret_cast<uintptr_t>(memory.data()) % kCacheLine);

  std::atomic<int64_t> next_task{0};
  std::atomic<size_t> next_slot{0};
  std::mutex keys_lock;
  auto work = [&] {
    PeakState<Type> state(aligned + slot * next_slot++, grid.panel);
    int64_t current = -1, first = 0, width = 0;
    const auto leave_panel = [&] {
      if (current < 0 || !keys) return;
      const std::lock_guard<std::mutex> lock(keys_lock);
      state.merge(keys + first, width, order);
    };
    for (;;) {
      const int64_t task = next_task++;
      if (task >= grid.chunks * grid.panels) break;
      if (task / grid.chunks != current) {
        leave_panel();
        current = task / grid.chunks;
        first = current * grid.panel;
        width = std::min(grid.panel, grid.columns - first);
        if (keys) {
          const std::lock_guard<std::mutex> lock(keys_lock);
          state.start(keys + first, width);
        }
      }
      const int64_t row = task % grid.chunks * grid.chunk;
      scan(row, std::min(row + grid.chunk, grid.rows), first, width, state);
    }
    leave_panel();
  };
  run_on_threads(grid.threads, work);
}

}  // namespace swk
