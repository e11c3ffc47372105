// The k entries of largest magnitude over matrices, at the speed of reading them.
//
// Magnitudes are compared as integers of their type's own width (see dtypes.h). A run of elements
// is held against one threshold with straight vector code, and only a run in which something
// exceeds it is looked at element by element. What a thread finds it keeps in a list of its own,
// cut to the k best when it is full; the k-th of any list is a bound for all threads.
//
// The first threshold is a guess from a sample. Where it was too high it costs a second search,
// never an entry.

#ifndef SWK_IN_ISA

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <vector>

#include "../swkernels.h"
#include "dtypes.h"
#include "isa.h"
#include "peaks.h"

namespace swk {

constexpr int kRun = 64;             // elements that are held against the threshold at once
constexpr int64_t kTask = 1 << 16;   // elements that a thread takes at once
constexpr int64_t kStratum = 4096;   // elements of which a sample takes one run of kSampled
constexpr int64_t kSampled = 32;     // two cache lines of float32
constexpr int64_t kGathered = 1024;  // elements that are copied together where they lie apart
constexpr int64_t kLast = std::numeric_limits<int64_t>::max();

// A matrix as lines: its rows, or its columns where the elements of those lie closer together.
// Elements are numbered through all matrices, by row and column: `place`. The search goes line by
// line.
struct Lines {
  const void* x;
  int dtype;
  int64_t first;   // place of its first element
  int64_t size;    // elements
  int64_t length;  // of a line
  int64_t line_stride, stride;  // elements from a line to the next, and within it
  int64_t line_step, step;      // the same in places
};

struct Ranked {
  int64_t place;
  uint32_t key;   // the bits of |v| as float32
  uint32_t sign;  // of v, where float32 has it
};

inline bool before(const Ranked& a, const Ranked& b) {
  return a.key != b.key ? a.key > b.key : a.place < b.place;
}

// What the threads of a search share.
struct Race {
  std::atomic<uint32_t> bound{0};   // only rises: the key of what is worth taking
  std::atomic<int64_t> nan{kLast};  // only falls: the place of the first NaN

  void raise(uint32_t key) {
    uint32_t seen = bound.load(std::memory_order_relaxed);
    while (seen < key && !bound.compare_exchange_weak(seen, key, std::memory_order_relaxed)) {
    }
  }
  void met_nan(int64_t place) {
    int64_t seen = nan.load(std::memory_order_relaxed);
    while (place < seen && !nan.compare_exchange_weak(seen, place, std::memory_order_relaxed)) {
    }
  }
};

// The best entries that one thread has found. Never allocates after it was made. On a cache line of
// its own, since the others lie beside it.
class alignas(64) Best {
 public:
  Best(int64_t k, int64_t most, Race& with) : race(with), k_(static_cast<size_t>(k)) {
    entries_.reserve(std::min(2 * k_ + 1024, static_cast<size_t>(most)));
  }

  // The least key that is worth a look at `place` and what comes after it.
  uint32_t least(int64_t place) const {
    const uint32_t own = last_.key + (place >= last_.place ? 1 : 0);
    return std::max(own, race.bound.load(std::memory_order_relaxed));
  }

  void take(const Ranked& entry) {
    if (!before(entry, last_) || entry.key < race.bound.load(std::memory_order_relaxed)) return;
    if (entries_.size() == entries_.capacity()) cut();
    entries_.push_back(entry);
  }

  std::vector<Ranked>& entries() { return entries_; }

  Race& race;

 private:
  void cut() {
    const auto end = entries_.begin() + static_cast<std::ptrdiff_t>(k_);
    std::nth_element(entries_.begin(), end - 1, entries_.end(), before);
    entries_.erase(end, entries_.end());
    last_ = entries_.back();
    race.raise(last_.key);
  }

  size_t k_;
  std::vector<Ranked> entries_;
  Ranked last_{kLast, 0, 0};  // k entries are this one or before it
};

// The largest magnitude (or -1) whose float32 bits are below `least`, exactly.
template <class Type>
typename Type::Bits largest_below(uint32_t least) {
  if (sizeof(typename Type::Bits) == 4) return static_cast<typename Type::Bits>(least - 1);
  int low = -1, high = Type::kInfinity + 1;  // low is below, high is not
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    const bool is_below = Type::key_bits(static_cast<typename Type::Bits>(middle)) < least;
    (is_below ? low : high) = middle;
  }
  return static_cast<typename Type::Bits>(low);
}

// Where the sample of the stratum that begins at `begin` lies: anywhere, but always there.
inline int64_t drawn(int64_t begin) {
  uint64_t bits = static_cast<uint64_t>(begin) * 0x9E3779B97F4A7C15u;
  bits = (bits ^ (bits >> 32)) * 0xD6E8FEB86659FD93u;
  return static_cast<int64_t>(bits >> 32) % (kStratum / kSampled) * kSampled;
}

}  // namespace swk

#define SWK_SELF "topk_abs.cpp"
#include "each_isa.h"

namespace swk {
namespace {

struct Task {
  const Lines* matrix;
  int64_t begin, end;  // in the order of the search
};

using Search = void (*)(const Lines&, int64_t, int64_t, bool, Best&);

Search search_of(int dtype, int isa) {
  switch (dtype) {
    case SWK_FLOAT32: return SWK_FOR_ISA(isa, search<Float32>);
    case SWK_BFLOAT16: return SWK_FOR_ISA(isa, search<BFloat16>);
    case SWK_FLOAT16: return SWK_FOR_ISA(isa, search<Float16>);
    case SWK_FLOAT8_E4M3: return SWK_FOR_ISA(isa, search<Float8E4M3>);
    default: return SWK_FOR_ISA(isa, search<Float8E5M2>);
  }
}

// The k first entries of all lists, or all, in order. They are shared out by key first: sorting
// them at once would take as long as the search.
std::vector<Ranked> first_of(std::vector<Best>& lists, int64_t k) {
  constexpr uint32_t kBuckets = 4096;
  uint32_t low = ~uint32_t{0}, high = 0;
  size_t wanted = 0;
  for (Best& list : lists) {
    wanted += list.entries().size();
    for (const Ranked& entry : list.entries()) {
      low = std::min(low, entry.key);
      high = std::max(high, entry.key);
    }
  }
  wanted = std::min(wanted, static_cast<size_t>(k));
  if (wanted == 0) return {};
  int shift = 0;
  while ((high - low) >> shift >= kBuckets) ++shift;
  const auto bucket_of = [&](const Ranked& entry) { return (high - entry.key) >> shift; };

  std::vector<size_t> begins(kBuckets + 1);
  for (Best& list : lists) {
    for (const Ranked& entry : list.entries()) ++begins[bucket_of(entry) + 1];
  }
  uint32_t buckets = 0;  // that hold the k first
  for (; begins[buckets] < wanted; ++buckets) begins[buckets + 1] += begins[buckets];
  std::vector<Ranked> all(begins[buckets]);
  std::vector<size_t> next(begins);
  for (Best& list : lists) {
    for (const Ranked& entry : list.entries()) {
      if (bucket_of(entry) < buckets) all[next[bucket_of(entry)]++] = entry;
    }
  }
  for (uint32_t b = 0; b < buckets; ++b) {
    std::sort(all.begin() + static_cast<std::ptrdiff_t>(begins[b]),
              all.begin() + static_cast<std::ptrdiff_t>(begins[b + 1]), before);
  }
  all.resize(wanted);
  return all;
}

// The k first entries, in order; fewer where `race` starts from a bound that fewer reach, or
// where there is a NaN. `sampled`: among a sample only.
std::vector<Ranked> find(const std::vector<Task>& tasks, int64_t k, int64_t total, bool sampled,
                        Race& race, int threads, int isa) {
  std::vector<Best> lists;
  const size_t wanted = std::min(static_cast<size_t>(std::max(threads, 1)), tasks.size());
  lists.reserve(wanted);
  while (lists.size() < wanted) lists.emplace_back(k, total, race);
  std::atomic<size_t> next_list{0}, next_task{0};
  auto share = [&] {
    const size_t own = next_list.fetch_add(1, std::memory_order_relaxed);
    if (own >= lists.size()) return;
    for (size_t i; (i = next_task.fetch_add(1, std::memory_order_relaxed)) < tasks.size();) {
      const Task& task = tasks[i];
      const Lines& matrix = *task.matrix;
      const int64_t place = matrix.first + (matrix.step == 1 ? task.begin : 0);
      if (race.nan.load(std::memory_order_relaxed) < place) break;  // what follows comes later
      search_of(matrix.dtype, isa)(matrix, task.begin, task.end, sampled, lists[own]);
    }
  };
  run_on_threads(static_cast<int>(lists.size()), share);
  return first_of(lists, k);
}

// A bound that more than k of `total` entries should reach, from a sample.
uint32_t guess(const std::vector<Task>& tasks, int64_t k, int64_t total, int threads, int isa) {
  const double sampled = static_cast<double>(total) * kSampled / kStratum;
  const double expected = static_cast<double>(k) * kSampled / kStratum;
  const double rank = 1.25 * expected + 6 * std::sqrt(expected) + 8;
  if (total < 64 * kStratum || 2 * rank > sampled) return 0;
  Race race;
  const auto count = static_cast<int64_t>(rank);
  const auto found = find(tasks, count, total, true, race, threads, isa);
  return found.size() < static_cast<size_t>(count) ? 0 : found.back().key;
}

}  // namespace
}  // namespace swk

int swk_cpu_topk_abs(const void* const* x, const int* dtypes, const int64_t* D, const int64_t* H,
                     const int64_t* strides, int64_t count, int64_t k, float* values,
                     int64_t* places, int64_t* which, int64_t* nan, int threads, int isa) {
  using namespace swk;
  const int resolved = resolve_isa(isa);
  if (!resolved) return SWK_BAD_ISA;
  if (count < 0 || k < 0) return SWK_BAD_SIZE;
  if (count > 0 && (!x || !dtypes || !D || !H || !strides)) return SWK_BAD_SIZE;
  if ((k > 0 && (!values || !places || !which)) || !nan) return SWK_BAD_SIZE;
  try {
    std::vector<Lines> matrices(static_cast<size_t>(count));
    int64_t total = 0, tasks_wanted = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (dtypes[i] < SWK_FLOAT32 || dtypes[i] > SWK_FLOAT8_E5M2) return SWK_BAD_DTYPE;
      if (D[i] < 0 || H[i] < 0 || (D[i] > 0 && H[i] > kLast / 2 / D[i])) return SWK_BAD_SIZE;
      const int64_t size = D[i] * H[i], rows = strides[2 * i], columns = strides[2 * i + 1];
      if ((size > 0 && !x[i]) || size > kLast / 2 - total) return SWK_BAD_SIZE;
      Lines& matrix = matrices[static_cast<size_t>(i)];
      if (columns == 1 && rows == H[i]) {  // one line
        matrix = {x[i], dtypes[i], total, size, size, 0, 1, 0, 1};
      } else if (D[i] > 1 && std::abs(rows) < std::abs(columns)) {
        matrix = {x[i], dtypes[i], total, size, D[i], columns, rows, 1, H[i]};
      } else {
        matrix = {x[i], dtypes[i], total, size, H[i], rows, columns, H[i], 1};
      }
      total += size;
      tasks_wanted += (size + kTask - 1) / kTask;
    }
    if (k > total) return SWK_BAD_SIZE;
    if (k == 0) return SWK_OK;
    std::vector<Task> tasks;
    tasks.reserve(static_cast<size_t>(tasks_wanted));
    for (const Lines& matrix : matrices) {
      for (int64_t begin = 0; begin < matrix.size; begin += kTask) {
        tasks.push_back({&matrix, begin, std::min(begin + kTask, matrix.size)});
      }
    }
    Race race;
    race.raise(guess(tasks, k, total, threads, resolved));
    auto found = find(tasks, k, total, false, race, threads, resolved);
    if (race.nan == kLast && found.size() < static_cast<size_t>(k)) {  // the guess was too high
      race.bound = 0;
      found = find(tasks, k, total, false, race, threads, resolved);
    }
    const auto owner = [&](int64_t place) {
      const auto after = std::upper_bound(
          matrices.begin(), matrices.end(), place,
          [](int64_t left, const Lines& right) { return left < right.first; });
      return after - 1 - matrices.begin();
    };
    if (race.nan != kLast) {
      nan[0] = owner(race.nan);
      nan[1] = race.nan - matrices[static_cast<size_t>(nan[0])].first;
      return SWK_NOT_A_NUMBER;
    }
    for (int64_t i = 0; i < k; ++i) {
      const Ranked& entry = found[static_cast<size_t>(i)];
      values[i] = float_of(entry.key | entry.sign);
      which[i] = owner(entry.place);
      places[i] = entry.place - matrices[static_cast<size_t>(which[i])].first;
    }
    return SWK_OK;
  } catch (const std::exception&) {  // bad_alloc, or length_error of a list
    return SWK_OUT_OF_MEMORY;
  }
}

#else  // once per instruction set

template <class Type>
SWK_FN SWK_INLINE bool any_above(const typename Type::Bits* x, int count,
                                 typename Type::Bits threshold) {
  using Bits = typename Type::Bits;
  Bits above = 0;
  for (int i = 0; i < count; ++i) {
    above |= static_cast<Bits>((x[i] & Type::kMagnitude) > threshold ? -1 : 0);
  }
  return above != 0;
}

// A threshold in the type's own bits, made anew when the key that it comes from changes.
template <class Type>
struct Threshold {
  typename Type::Bits bits = largest_below<Type>(0);
  uint32_t key = 0;

  void rise(const Best& found, int64_t place) {
    const uint32_t least = found.least(place);
    if (least == key) return;
    key = least;
    bits = largest_below<Type>(least);
  }
};

// Takes what exceeds the threshold among `count` elements, at most kRun; `place` is that of x[0].
template <class Type>
SWK_FN SWK_NOINLINE void take_run(const typename Type::Bits* x, int count, int64_t place,
                                  int64_t step, typename Type::Bits threshold, Best& found) {
  constexpr int kShift = 8 * (4 - static_cast<int>(sizeof(typename Type::Bits)));
  uint8_t above[kRun] = {};
  for (int i = 0; i < count; ++i) above[i] = (x[i] & Type::kMagnitude) > threshold ? 1 : 0;
  for (int group = 0; group < count; group += 8) {
    uint64_t any;  // of eight
    std::memcpy(&any, above + group, sizeof any);
    for (int i = group; any != 0 && i < group + 8; ++i) {
      if (!above[i]) continue;
      const auto magnitude = static_cast<typename Type::Bits>(x[i] & Type::kMagnitude);
      if (magnitude > Type::kInfinity) {
        found.race.met_nan(place + i * step);
        continue;
      }
      const uint32_t sign = static_cast<uint32_t>(x[i]) << kShift & 0x80000000u;
      found.take({place + i * step, Type::key_bits(magnitude), sign});
    }
  }
}

// Searches n adjacent elements, of which the places lie `step` apart.
template <class Type>
SWK_FN SWK_INLINE void search_line(const typename Type::Bits* x, int64_t n, int64_t place,
                                   int64_t step, Threshold<Type>& threshold, Best& found) {
  threshold.rise(found, place);
  int64_t i = 0;
  for (; i + kRun <= n; i += kRun) {
    if (!any_above<Type>(x + i, kRun, threshold.bits)) continue;
    take_run<Type>(x + i, kRun, place + i * step, step, threshold.bits, found);
    threshold.rise(found, place + (i + kRun) * step);
  }
  const int rest = static_cast<int>(n - i);
  if (any_above<Type>(x + i, rest, threshold.bits)) {
    take_run<Type>(x + i, rest, place + i * step, step, threshold.bits, found);
  }
}

// Searches the elements [begin, end) of the lines, or a sample of them; begin is that of a stratum.
template <class Type>
SWK_FN void search(const Lines& matrix, int64_t begin, int64_t end, bool sampled, Best& found) {
  using Bits = typename Type::Bits;
  const auto* const base = static_cast<const Bits*>(matrix.x);
  Bits gathered[kGathered];
  Threshold<Type> threshold;
  for (int64_t at = begin, stop = end; at < end; at = stop) {
    int64_t from = at;
    stop = end;
    if (sampled) {
      stop = std::min(at + kStratum, end);
      from = at + drawn(matrix.first + at);
    }
    const int64_t last = sampled ? std::min(from + kSampled, stop) : stop;
    while (from < last) {
      const int64_t line = from / matrix.length, offset = from % matrix.length;
      int64_t n = std::min(last - from, matrix.length - offset);
      const Bits* x = base + line * matrix.line_stride + offset * matrix.stride;
      if (matrix.stride != 1) {
        n = std::min(n, kGathered);
        for (int64_t i = 0; i < n; ++i) gathered[i] = x[i * matrix.stride];
        x = gathered;
      }
      const int64_t place = matrix.first + line * matrix.line_step + offset * matrix.step;
      search_line<Type>(x, n, place, matrix.step, threshold, found);
      from += n;
    }
  }
}

#endif
