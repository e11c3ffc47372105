// The k entries of largest magnitude over products B A of low rank, none of which is formed.
//
// An entry is the sum of its r products in double, one after the other. Most entries are far too
// small, and float32 tells: tiles of a product are computed in registers, and only an entry whose
// float32 sum comes within its rounding error of the k-th largest found so far is summed in double.
// What a thread finds it keeps in a list of its own, cut to the k best when it is full; the k-th of
// any list is a bound for all threads.

#ifndef SWK_IN_ISA

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "../swkernels.h"
#include "coordinates.h"
#include "dtypes.h"
#include "isa.h"
#include "peaks.h"

namespace swk {

constexpr int kTileRows = 4;
constexpr int kTileCols = 32;
constexpr int64_t kPanel = 512;   // columns of A that stay in the first cache
constexpr int64_t kTaskRows = 256;

struct Product {
  const float* B;  // [D, r]
  const float* A;  // [r, H]
  int64_t D, H, r;
};

struct Entry {
  uint64_t key;  // the bits of |sum|; one value for all NaN, above infinity
  double sum;
  int64_t product, place;  // place = row * H + column
};

inline bool before(const Entry& a, const Entry& b) {
  if (a.key != b.key) return a.key > b.key;
  return a.product != b.product ? a.product < b.product : a.place < b.place;
}

inline uint64_t key_of(double sum) {
  if (std::isnan(sum)) return ~uint64_t{0} >> 1;
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  return bits & (~uint64_t{0} >> 1);
}

// The k-th largest key so far; it only rises.
class Bound {
 public:
  uint64_t key() const { return key_.load(std::memory_order_relaxed); }
  double value() const {
    const uint64_t bits = key();
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  void raise(uint64_t key) {
    uint64_t seen = this->key();
    while (seen < key && !key_.compare_exchange_weak(seen, key, std::memory_order_relaxed)) {
    }
  }

 private:
  std::atomic<uint64_t> key_{0};
};

// The best entries that one thread has found. Never allocates after it was made.
class Found {
 public:
  explicit Found(int64_t k) : k_(static_cast<size_t>(k)) { entries_.reserve(2 * k_ + 1024); }

  void take(const Product& product, int64_t number, int64_t row, int64_t column, Bound& bound) {
    double sum = 0;
    for (int64_t q = 0; q < product.r; ++q) {
      sum += static_cast<double>(product.B[row * product.r + q]) *
             static_cast<double>(product.A[q * product.H + column]);
    }
    const Entry entry{key_of(sum), sum, number, row * product.H + column};
    if (entry.key < bound.key()) return;
    if (entries_.size() == entries_.capacity()) cut(bound);
    entries_.push_back(entry);
  }

  std::vector<Entry>& entries() { return entries_; }

 private:
  void cut(Bound& bound) {
    const auto last = entries_.begin() + static_cast<std::ptrdiff_t>(k_);
    std::nth_element(entries_.begin(), last - 1, entries_.end(), before);
    entries_.erase(last, entries_.end());
    bound.raise(entries_.back().key);
  }

  size_t k_;
  std::vector<Entry> entries_;
};

// The least bits of a float32 sum's magnitude that are worth a sum in double, for products of which
// the magnitudes sum to at most `most`: what lies below is below the bound, whatever float32 has
// rounded or flushed to zero. NaN and infinity are always worth it.
inline int32_t worth(double bound, double most, int64_t r) {
  const double steps = static_cast<double>(r) + 4;
  const double least = bound - steps * (most * 0x1p-24 + 0x1p-126);
  if (!(least > 0)) return 0;
  const float rounded = least > static_cast<double>(std::numeric_limits<float>::max())
                            ? std::numeric_limits<float>::infinity()
                            : std::nextafter(static_cast<float>(least), 0.0f);
  return static_cast<int32_t>(bits_of(rounded));
}

}  // namespace swk

#define SWK_SELF "topk_low_rank.cpp"
#include "each_isa.h"

namespace swk {
namespace {

struct Task {
  int64_t product, first_row;
};

void find(const std::vector<Product>& products, const std::vector<Task>& tasks,
          std::vector<Found>& lists, Bound& bound, int isa) {
  const auto search = SWK_FOR_ISA(isa, search_rows);
  std::atomic<size_t> next_list{0};
  std::atomic<size_t> next_task{0};
  auto share = [&] {
    const size_t own = next_list.fetch_add(1, std::memory_order_relaxed);
    if (own >= lists.size()) return;
    for (size_t task; (task = next_task.fetch_add(1, std::memory_order_relaxed)) < tasks.size();) {
      const Product& product = products[static_cast<size_t>(tasks[task].product)];
      const int64_t first = tasks[task].first_row;
      const int64_t last = std::min(first + kTaskRows, product.D);
      search(product, tasks[task].product, first, last, lists[own], bound);
    }
  };
  run_on_threads(static_cast<int>(lists.size()), share);
}

}  // namespace
}  // namespace swk

int swk_cpu_topk_low_rank(const float* const* B, const float* const* A, const int64_t* D,
                          const int64_t* H, const int64_t* r, int64_t count, int64_t k,
                          double* sums, int64_t* places, int64_t* which, int threads, int isa) {
  using namespace swk;
  const int resolved = resolve_isa(isa);
  if (!resolved) return SWK_BAD_ISA;
  if (count < 0 || k < 0) return SWK_BAD_SIZE;
  if (k == 0) return SWK_OK;
  if (!B || !A || !D || !H || !r || !sums || !places || !which) return SWK_BAD_SIZE;
  try {
    std::vector<Product> products;
    std::vector<Task> tasks;
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (D[i] < 0 || H[i] < 0 || r[i] < 1 || (D[i] > 0 && H[i] > 0 && (!B[i] || !A[i]))) {
        return SWK_BAD_SIZE;
      }
      products.push_back({B[i], A[i], D[i], H[i], r[i]});
      total += D[i] * H[i];
      for (int64_t row = 0; H[i] > 0 && row < D[i]; row += kTaskRows) tasks.push_back({i, row});
    }
    if (k > total) return SWK_BAD_SIZE;
    const size_t wanted = static_cast<size_t>(std::max(threads, 1));
    std::vector<Found> lists;
    lists.reserve(std::min(wanted, tasks.size()));
    while (lists.size() < std::min(wanted, tasks.size())) lists.emplace_back(k);
    Bound bound;
    find(products, tasks, lists, bound, resolved);
    std::vector<Entry> all;
    for (Found& list : lists) all.insert(all.end(), list.entries().begin(), list.entries().end());
    const auto end = all.begin() + static_cast<std::ptrdiff_t>(k);
    std::partial_sort(all.begin(), end, all.end(), before);
    for (int64_t i = 0; i < k; ++i) {
      const Entry& entry = all[static_cast<size_t>(i)];
      sums[i] = entry.sum;
      places[i] = entry.place;
      which[i] = entry.product;
    }
    return SWK_OK;
  } catch (const std::bad_alloc&) {
    return SWK_OUT_OF_MEMORY;
  }
}

#else  // once per instruction set

#if defined(__GNUC__)
// Vectors of half a tile's width: the compiler keeps a tile of them in registers.
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int kLanes = 16;

// Whether any entry of a tile of the product has a magnitude, as bits, of at least `least` of its
// row. b: kTileRows rows of B.
SWK_FN SWK_INLINE bool tile_hits(const float* const b[kTileRows], const float* a, int64_t stride,
                                 int64_t r, const int32_t least[kTileRows]) {
  Lanes low[kTileRows] = {}, high[kTileRows] = {};
  for (int64_t q = 0; q < r; ++q) {
    const Lanes left = *reinterpret_cast<const Lanes*>(a + q * stride);
    const Lanes right = *reinterpret_cast<const Lanes*>(a + q * stride + kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kTileRows; ++i) {
      low[i] += b[i][q] * left;
      high[i] += b[i][q] * right;
    }
  }
  Bits negative = {};  // lanes of which a sign says that an entry reaches its bound
#pragma GCC unroll 4
  for (int i = 0; i < kTileRows; ++i) {
    const int32_t below = least[i] - 1;
    negative |= below - (reinterpret_cast<const Bits&>(low[i]) & 0x7FFFFFFF);
    negative |= below - (reinterpret_cast<const Bits&>(high[i]) & 0x7FFFFFFF);
  }
  int64_t pairs[kLanes / 2], any = 0;
  std::memcpy(pairs, &negative, sizeof pairs);
  for (const int64_t pair : pairs) any |= pair;
  return (static_cast<uint64_t>(any) & 0x8000000080000000u) != 0;
}
#else
SWK_FN inline bool tile_hits(const float* const b[kTileRows], const float* a, int64_t stride,
                             int64_t r, const int32_t least[kTileRows]) {
  for (int i = 0; i < kTileRows; ++i) {
    for (int c = 0; c < kTileCols; ++c) {
      float sum = 0;
      for (int64_t q = 0; q < r; ++q) sum += b[i][q] * a[q * stride + c];
      if (static_cast<int32_t>(bits_of(sum) & 0x7FFFFFFF) >= least[i]) return true;
    }
  }
  return false;
}
#endif

// Takes the entries of one row and some columns whose float32 sum is worth it.
SWK_FN SWK_NOINLINE void take_columns(const Product& product, int64_t number, int64_t row,
                                      int64_t begin, int64_t end, double most, Found& found,
                                      Bound& bound) {
  const float* const b = product.B + row * product.r;
  for (int64_t c = begin; c < end; ++c) {
    float sum = 0;
    for (int64_t q = 0; q < product.r; ++q) sum += b[q] * product.A[q * product.H + c];
    const auto magnitude = static_cast<int32_t>(bits_of(sum) & 0x7FFFFFFF);
    if (magnitude < worth(bound.value(), most, product.r)) continue;
    found.take(product, number, row, c, bound);
  }
}

// Searches the rows [first, last) of a product.
SWK_FN void search_rows(const Product& product, int64_t number, int64_t first, int64_t last,
                        Found& found, Bound& bound) {
  const int64_t r = product.r, H = product.H;
  double sums[kTaskRows];  // of the magnitudes of each row of B
  for (int64_t i = first; i < last; ++i) {
    double sum = 0;
    for (int64_t q = 0; q < r; ++q) {
      sum += std::fabs(static_cast<double>(product.B[i * r + q]));
    }
    sums[i - first] = sum;
  }
  for (int64_t begin = 0; begin < H; begin += kPanel) {
    const int64_t end = std::min(begin + kPanel, H);
    float largest = 0;
    bool finite = true;
    for (int64_t q = 0; q < r; ++q) {
      const float* const a = product.A + q * H;
      for (int64_t c = begin; c < end; ++c) {
        const float magnitude = std::fabs(a[c]);
        largest = magnitude > largest ? magnitude : largest;
        finite &= magnitude <= std::numeric_limits<float>::max();
      }
    }
    const double factor = finite ? largest : std::numeric_limits<double>::infinity();
    for (int64_t i = first; i < last; i += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, last - i);
      const float* b[kTileRows];
      double most[kTileRows];  // no entry of the row is larger, but for rounding; may be NaN
      int32_t least[kTileRows];
      bool wanted = false;
      const double limit = bound.value();
      for (int64_t j = 0; j < kTileRows; ++j) {
        const int64_t row = std::min(i + j, last - 1);
        b[j] = product.B + row * r;
        most[j] = sums[row - first] * factor;
        least[j] = j < rows ? worth(limit, most[j], r) : std::numeric_limits<int32_t>::max();
        wanted |= j < rows && !(most[j] * (1 + 0x1p-40) < limit);
      }
      if (!wanted) continue;
      int64_t c = begin;
      for (; c + kTileCols <= end; c += kTileCols) {
        if (!tile_hits(b, product.A + c, H, r, least)) continue;
        for (int64_t j = 0; j < rows; ++j) {
          take_columns(product, number, i + j, c, c + kTileCols, most[j], found, bound);
          least[j] = worth(bound.value(), most[j], r);
        }
      }
      for (int64_t j = 0; c < end && j < rows; ++j) {
        take_columns(product, number, i + j, c, end, most[j], found, bound);
      }
    }
  }
}

#endif
