// What the kernels on listed coordinates of a matrix share: the check of the list, and work for
// threads by ranges of tokens.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "threads.h"

namespace swk {

// Whether every (rows[i], cols[i]) lies in a matrix [D, H].
inline bool all_inside(const int32_t* rows, const int32_t* cols, int64_t k, int64_t D, int64_t H) {
  bool inside = true;
  for (int64_t i = 0; i < k; ++i) {
    inside &= rows[i] >= 0 && rows[i] < D && cols[i] >= 0 && cols[i] < H;
  }
  return inside;
}

// Calls work(task) for each task of [0, tasks), on up to `threads` threads.
template <class Work>
void run_tasks(int64_t tasks, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  auto share = [&] {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(task);
  };
  run_on_threads(static_cast<int>(std::clamp<int64_t>(tasks, 1, std::max(threads, 1))), share);
}

}  // namespace swk
