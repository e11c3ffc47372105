// The two passes of a search for the entries of largest magnitude on a GPU: a histogram of keys or
// of places, and the collection of what lies above a bound. backends/cuda/topk_abs.py has the rest.
//
// A pass is one launch over up to 32 matrices. Its blocks share the tiles of all rows; a thread has
// four loads of 16 bytes in flight. The elements of a 32-bit word are compared with the bound at
// once, so nearly all of a matrix costs three instructions a word. Positions are 64-bit.

#include <cstdint>

#include "elements.cuh"
#include "launch.cuh"

namespace swk {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // of a multiprocessor: 64 registers a thread
constexpr int kUnroll = 4;  // loads that a thread has in flight
constexpr int kTile = kThreads * kUnroll;  // loads
constexpr int kMostMatrices = 32;          // of one launch: its arguments have 4 KiB
constexpr int kMostBins = 2048;

// Of a matrix whose columns are adjacent, its columns are the rows here.
struct Matrix {
  const void* x;
  int64_t length, stride;  // of a row
  int64_t place;           // of its first entry
  int64_t next_row, next;  // from the place of an entry to those of its neighbours
  int64_t first_tile;      // among those of the launch
  int64_t tiles_a_row;
};

struct Pass {
  Matrix matrices[kMostMatrices];
  int count;
  uint32_t low;
  int64_t tiles, step;
  unsigned long long* nan;
};

struct CountProblem {
  Pass pass;
  int64_t first;
  int ties, shift, bins;
  unsigned long long* counts;
};

struct GatherProblem {
  Pass pass;
  int64_t last, capacity;
  uint32_t* values;
  int64_t* places;
  unsigned long long* found;
};

template <class Type>
constexpr int kBits = 8 * sizeof(typename Type::Bits);

// The bits of the smallest magnitude whose key is at least `low`: magnitudes are ordered like
// their bits, and NaN comes last.
template <class Type>
__device__ uint32_t smallest_from(uint32_t low) {
  uint32_t from = 0, to = (1u << (kBits<Type> - 1)) - 1;
  while (from < to) {
    const uint32_t middle = from + (to - from) / 2;
    if (Type::magnitude(static_cast<typename Type::Bits>(middle)) >= low) {
      to = middle;
    } else {
      from = middle + 1;
    }
  }
  return from;
}

template <class Type, class Visit>
__device__ void consider(const Pass& pass, typename Type::Bits bits, int64_t place, Visit& visit) {
  const uint32_t key = Type::magnitude(bits);
  if (key > kInfinityBits) {
    // A stale value only means a needless atomic.
    const unsigned long long here = static_cast<unsigned long long>(place);
    if (here < *pass.nan) atomicMin(pass.nan, here);
  } else if (key >= pass.low) {
    visit(key | static_cast<uint32_t>(bits >> (kBits<Type> - 1)) << 31, place);
  }
}

// Calls visit(float32 bits, place) for this thread's share of the entries from pass.low on.
template <class Type, class Visit>
__device__ void walk(const Pass& pass, Visit& visit) {
  using Bits = typename Type::Bits;
  constexpr int kVector = 16 / sizeof(Bits);
  constexpr int kLanes = 4 / sizeof(Bits);  // of a 32-bit word
  constexpr uint32_t kOnes = kLanes == 1 ? 1u : kLanes == 2 ? 0x00010001u : 0x01010101u;
  constexpr uint32_t kSigns = kOnes << (kBits<Type> - 1);
  const uint32_t bounds = kOnes * smallest_from<Type>(pass.low);
  const int thread = static_cast<int>(threadIdx.x);

  const int64_t stride = static_cast<int64_t>(gridDim.x) * pass.step;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * pass.step; tile < pass.tiles && !visit.full;
       tile += stride) {
    int which = 0;
#pragma unroll
    for (int half = kMostMatrices / 2; half > 0; half /= 2) {
      const int next = which + half;
      if (next < pass.count && pass.matrices[next].first_tile <= tile) which = next;
    }
    const Matrix& matrix = pass.matrices[which];
    int64_t row = 0, part = tile - matrix.first_tile;
    if (part >= matrix.tiles_a_row) {
      row = part / matrix.tiles_a_row;
      part -= row * matrix.tiles_a_row;
    }
    const Bits* const x = static_cast<const Bits*>(matrix.x) + row * matrix.stride;
    const int64_t place = matrix.place + row * matrix.next_row;
    // Elements before the first boundary of 16 bytes, whole vectors, the rest.
    const int64_t before = -reinterpret_cast<intptr_t>(x) & 15;
    const int64_t ahead = before / static_cast<int64_t>(sizeof(Bits));
    const int64_t head = ahead < matrix.length ? ahead : matrix.length;
    const int64_t vectors = (matrix.length - head) / kVector;

    const int64_t start = part * kTile + thread;
    uint4 loaded[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t at = start + k * kThreads;
      loaded[k] = at < vectors ? reinterpret_cast<const uint4*>(x + head)[at] : uint4{};
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t at = start + k * kThreads;
      const uint32_t words[] = {loaded[k].x, loaded[k].y, loaded[k].z, loaded[k].w};
      uint32_t reached[4];  // the sign bits of the elements from the bound on
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        reached[word] = ((words[word] | kSigns) - bounds) & kSigns;  // no borrow leaves an element
      }
      if (!(reached[0] | reached[1] | reached[2] | reached[3]) || at >= vectors) continue;
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        for (uint32_t left = reached[word]; left; left &= left - 1) {
          const int shift = __ffs(static_cast<int>(left)) - kBits<Type>;
          const int64_t index = head + at * kVector + word * kLanes + shift / kBits<Type>;
          consider<Type>(pass, static_cast<Bits>(words[word] >> shift),
                         place + index * matrix.next, visit);
        }
      }
    }
    if (part == 0 && thread < 2 * kVector) {
      const int64_t index = thread < kVector ? thread : head + (vectors - 1) * kVector + thread;
      if (thread < kVector ? index < head : index < matrix.length) {
        consider<Type>(pass, x[index], place + index * matrix.next, visit);
      }
    }
  }
}

// Counts runs of the same bin in a register.
struct Counter {
  const CountProblem& problem;
  unsigned* bins;
  unsigned bin = 0, run = 0;
  static constexpr bool full = false;

  __device__ void operator()(uint32_t bits, int64_t place) {
    const uint32_t above = (bits & 0x7FFFFFFF) - problem.pass.low;
    if (problem.ties && above != 0) return;
    const unsigned long long distance =
        problem.ties ? static_cast<unsigned long long>(place - problem.first) : above;
    const unsigned long long at = distance >> problem.shift;
    if (at >= static_cast<unsigned>(problem.bins)) return;  // a place before `first` too
    if (at != bin) flush();
    bin = static_cast<unsigned>(at);
    ++run;
  }
  __device__ void flush() {
    if (run > 0) atomicAdd(&bins[bin], run);
    run = 0;
  }
};

template <class Type>
__global__ void __launch_bounds__(kThreads, kBlocks)
    topk_abs_count_kernel(const __grid_constant__ CountProblem problem) {
  __shared__ unsigned bins[kMostBins];
  for (int i = static_cast<int>(threadIdx.x); i < problem.bins; i += kThreads) bins[i] = 0;
  __syncthreads();
  Counter counter{problem, bins};
  walk<Type>(problem.pass, counter);
  counter.flush();
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < problem.bins; i += kThreads) {
    if (bins[i] > 0) atomicAdd(&problem.counts[i], static_cast<unsigned long long>(bins[i]));
  }
}

struct Gatherer {
  const GatherProblem& problem;
  bool full;

  __device__ void operator()(uint32_t bits, int64_t place) {
    if (full || ((bits & 0x7FFFFFFF) == problem.pass.low && place > problem.last)) return;
    const int64_t at = static_cast<int64_t>(atomicAdd(problem.found, 1ull));
    full = at >= problem.capacity;
    if (full) return;
    problem.values[at] = bits;
    problem.places[at] = place;
  }
};

template <class Type>
__global__ void __launch_bounds__(kThreads, kBlocks)
    topk_abs_gather_kernel(const __grid_constant__ GatherProblem problem) {
  const bool full = static_cast<int64_t>(*problem.found) > problem.capacity;
  Gatherer gatherer{problem, full};
  walk<Type>(problem.pass, gatherer);
}

template <class Type>
int run(CountProblem& problem, dim3 grid, void* stream) {
  return launch("topk_abs_count", topk_abs_count_kernel<Type>, grid, dim3(kThreads), stream,
                problem);
}

template <class Type>
int run(GatherProblem& problem, dim3 grid, void* stream) {
  return launch("topk_abs_gather", topk_abs_gather_kernel<Type>, grid, dim3(kThreads), stream,
                problem);
}

template <class Problem>
int run(Problem& problem, int64_t dtype, void* stream) {
  int processors = 0;
  const cudaError_t error = multiprocessors(&processors);
  if (error != cudaSuccess) return fail("topk_abs", error);
  const Pass& pass = problem.pass;
  const int64_t tiles = (pass.tiles - 1) / pass.step + 1;
  const int64_t most = static_cast<int64_t>(processors) * kBlocks;
  const dim3 grid(static_cast<unsigned>(tiles < most ? tiles : most));
  if (dtype == SWK_FLOAT32) return run<Float32>(problem, grid, stream);
  if (dtype == SWK_BFLOAT16) return run<BFloat16>(problem, grid, stream);
  if (dtype == SWK_FLOAT16) return run<Float16>(problem, grid, stream);
  if (dtype == SWK_FLOAT8_E4M3) return run<Float8E4M3>(problem, grid, stream);
  return run<Float8E5M2>(problem, grid, stream);
}

bool has_rows(const swk_matrix& given) { return given.column_stride == 1 || given.H == 1; }
bool has_columns(const swk_matrix& given) { return given.row_stride == 1 || given.D == 1; }

// With no tiles yet; `place` is that of its first entry.
Matrix describe(const swk_matrix& given, int64_t place) {
  const int64_t size = given.D * given.H;
  const bool flat = given.column_stride == 1 && (given.D == 1 || given.row_stride == given.H);
  if (flat) return {given.x, size, 0, place, size, 1, 0, 0};
  if (has_rows(given)) return {given.x, given.H, given.row_stride, place, given.H, 1, 0, 0};
  return {given.x, given.D, given.column_stride, place, 1, given.H, 0, 0};
}

int check(const swk_matrix* matrices, int64_t count, int64_t low, const void* nan) {
  if (count < 0 || low < 0 || low > kInfinityBits || !nan || (count > 0 && !matrices)) {
    return SWK_BAD_SIZE;
  }
  int64_t room = INT64_MAX;
  for (int64_t i = 0; i < count; ++i) {
    const swk_matrix& given = matrices[i];
    if (given.dtype < SWK_FLOAT32 || given.dtype > SWK_FLOAT8_E5M2) return SWK_BAD_DTYPE;
    if (given.D < 0 || given.H < 0) return SWK_BAD_SIZE;
    if (given.D == 0 || given.H == 0) continue;
    if (!given.x || given.D > room / given.H) return SWK_BAD_SIZE;
    if (!has_rows(given) && !has_columns(given)) return SWK_BAD_SIZE;
    room -= given.D * given.H;
  }
  return SWK_OK;
}

// Launches for the matrices of each type, `kMostMatrices` at a time.
template <class Problem>
int for_all(Problem& problem, const swk_matrix* matrices, int64_t count, void* stream) {
  static constexpr int64_t kVector[] = {4, 8, 8, 16, 16};  // by swk_dtype
  Pass& pass = problem.pass;
  for (int64_t dtype = SWK_FLOAT32; dtype <= SWK_FLOAT8_E5M2; ++dtype) {
    int64_t place = 0;
    pass.count = 0;
    pass.tiles = 0;
    for (int64_t i = 0; i < count; ++i) {
      const swk_matrix& given = matrices[i];
      const int64_t size = given.D * given.H;
      if (given.dtype == dtype && size > 0) {
        Matrix& matrix = pass.matrices[pass.count++];
        matrix = describe(given, place);
        matrix.first_tile = pass.tiles;
        // 1 for a row of no vector.
        matrix.tiles_a_row = (matrix.length / kVector[dtype] - 1) / kTile + 1;
        pass.tiles += size / matrix.length * matrix.tiles_a_row;
      }
      place += size;
      if (pass.count == kMostMatrices || (i == count - 1 && pass.count > 0)) {
        const int status = run(problem, dtype, stream);
        if (status != SWK_OK) return status;
        pass.count = 0;
        pass.tiles = 0;
      }
    }
  }
  return SWK_OK;
}

}  // namespace
}  // namespace swk

int swk_cuda_topk_abs_count(const swk_matrix* matrices, int64_t count, int64_t step, int low,
                            int ties, int64_t first, int shift, int bins, int64_t* counts,
                            int64_t* nan, void* stream) {
  using namespace swk;
  const int status = check(matrices, count, low, nan);
  if (status != SWK_OK) return status;
  if (step < 1 || first < 0 || shift < 0 || shift > 62 || bins < 1 || bins > kMostBins || !counts) {
    return SWK_BAD_SIZE;
  }
  CountProblem problem{};
  problem.pass.low = static_cast<uint32_t>(low);
  problem.pass.step = step;
  problem.pass.nan = reinterpret_cast<unsigned long long*>(nan);
  problem.first = first;
  problem.ties = ties;
  problem.shift = shift;
  problem.bins = bins;
  problem.counts = reinterpret_cast<unsigned long long*>(counts);
  return for_all(problem, matrices, count, stream);
}

int swk_cuda_topk_abs_gather(const swk_matrix* matrices, int64_t count, int low, int64_t last,
                             int64_t capacity, float* values, int64_t* places, int64_t* found,
                             int64_t* nan, void* stream) {
  using namespace swk;
  const int status = check(matrices, count, low, nan);
  if (status != SWK_OK) return status;
  if (last < 0 || capacity < 0 || !found || (capacity > 0 && (!values || !places))) {
    return SWK_BAD_SIZE;
  }
  GatherProblem problem{};
  problem.pass.low = static_cast<uint32_t>(low);
  problem.pass.step = 1;
  problem.pass.nan = reinterpret_cast<unsigned long long*>(nan);
  problem.last = last;
  problem.capacity = capacity;
  problem.values = reinterpret_cast<uint32_t*>(values);
  problem.places = places;
  problem.found = reinterpret_cast<unsigned long long*>(found);
  return for_all(problem, matrices, count, stream);
}
