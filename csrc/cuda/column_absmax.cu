// Per-channel peaks of a matrix on a GPU.
//
// A block of 32 x 8 threads looks at a tile of columns: each thread reads 16 bytes of a row (4 or 8
// channels) at a time, four rows in flight, and walks down the matrix in steps of all the blocks
// that share its columns. It keeps the key of each of its channels' peaks in
// registers. The eight threads of a channel meet in shared memory, and the block merges one key
// per channel into the result with a 64-bit atomicMax: exact and independent of order.

#include <cstdint>

#include "elements.cuh"
#include "launch.cuh"

namespace swk {
namespace {

constexpr int kThreadsX = 32;  // side by side in a row
constexpr int kThreadsY = 8;   // rows of a block
constexpr int kUnroll = 4;     // rows that a thread has in flight
constexpr int64_t kLastToken = 0xFFFFFFFE;

struct Problem {
  const void* x;
  int64_t T, C, stride;
  unsigned long long* keys;
  const int64_t* token_index;
  int64_t token_offset;
};

__device__ unsigned long long make_key(uint32_t magnitude, int64_t token) {
  return static_cast<unsigned long long>(magnitude) << 32 |
         (0xFFFFFFFFu - static_cast<uint32_t>(token));
}

// kVector: elements per load, 16 bytes' worth or 1.
template <class Type, int kVector, bool kIndexed>
__global__ void __launch_bounds__(kThreadsX * kThreadsY)
    column_absmax_kernel(Problem problem) {
  using Bits = typename Type::Bits;
  struct alignas(sizeof(Bits) * kVector) Vector {
    Bits lane[kVector];
  };
  constexpr int kTile = kThreadsX * kVector;

  const Bits* const x = static_cast<const Bits*>(problem.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x * kVector;
  const int64_t left = problem.C - first;
  const int channels = left <= 0 ? 0 : left < kVector ? static_cast<int>(left) : kVector;

  unsigned long long best[kVector] = {};
  const int64_t step = static_cast<int64_t>(gridDim.y) * kThreadsY * kUnroll;
  int64_t start = (static_cast<int64_t>(blockIdx.y) * kUnroll) * kThreadsY + threadIdx.y;
  if (channels == 0) start = problem.T;
  for (; start < problem.T; start += step) {
    Vector rows[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t row = start + k * kThreadsY;
      const Bits* const at = x + row * problem.stride + first;
      if (row < problem.T && channels == kVector) {
        rows[k] = *reinterpret_cast<const Vector*>(at);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          rows[k].lane[i] = row < problem.T && i < channels ? at[i] : Bits{0};
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t row = start + k * kThreadsY;
      if (row >= problem.T) break;
      const int64_t index = kIndexed ? problem.token_index[row] : row;
      if (kIndexed && index < 0) continue;
      const int64_t token = problem.token_offset + index;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const uint32_t raw = Type::magnitude(rows[k].lane[i]);
        const uint32_t magnitude = raw > kInfinityBits ? kNanBits : raw;
        const unsigned long long key = make_key(magnitude, token);
        best[i] = key > best[i] ? key : best[i];
      }
    }
  }

  __shared__ unsigned long long shared[kThreadsY][kTile];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    shared[threadIdx.y][threadIdx.x * kVector + i] = best[i];
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.y) * kThreadsX + static_cast<int>(threadIdx.x);
  for (int i = thread; i < kTile; i += kThreadsX * kThreadsY) {
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * kTile + i;
    unsigned long long key = 0;
#pragma unroll
    for (int y = 0; y < kThreadsY; ++y) key = shared[y][i] > key ? shared[y][i] : key;
    // A stale value only means a needless atomic.
    if (channel < problem.C && key > problem.keys[channel]) atomicMax(&problem.keys[channel], key);
  }
}

template <class Type, int kVector>
int run(const Problem& problem, void* stream) {
  constexpr int64_t kTile = kThreadsX * kVector;
  constexpr int64_t kBlocksPerMultiprocessor = 8;  // two or three times what fits at once
  constexpr int64_t kMostBlocksY = 65535;
  int processors = 0;
  const cudaError_t error = multiprocessors(&processors);
  if (error != cudaSuccess) return fail("column_absmax", error);

  const int64_t tiles = (problem.C + kTile - 1) / kTile;
  const int64_t rows_a_block = kThreadsY * kUnroll;
  const int64_t most = (problem.T + rows_a_block - 1) / rows_a_block;
  int64_t shares = (processors * kBlocksPerMultiprocessor + tiles - 1) / tiles;
  shares = shares < most ? shares : most;
  shares = shares < kMostBlocksY ? shares : kMostBlocksY;
  if (tiles > 0x7FFFFFFF) return SWK_BAD_SIZE;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(shares));
  const dim3 block(kThreadsX, kThreadsY);
  return problem.token_index ? launch("column_absmax", column_absmax_kernel<Type, kVector, true>,
                                      grid, block, stream, problem)
                             : launch("column_absmax", column_absmax_kernel<Type, kVector, false>,
                                      grid, block, stream, problem);
}

template <class Type>
int run(const Problem& problem, void* stream) {
  constexpr int kVector = 16 / sizeof(typename Type::Bits);
  const bool aligned = reinterpret_cast<uintptr_t>(problem.x) % 16 == 0 &&
                       problem.stride % kVector == 0;
  return aligned ? run<Type, kVector>(problem, stream) : run<Type, 1>(problem, stream);
}

}  // namespace
}  // namespace swk

int swk_cuda_column_absmax(const void* x, int dtype, int64_t T, int64_t C, int64_t stride,
                           int64_t* keys, const int64_t* token_index, int64_t token_offset,
                           void* stream) {
  using namespace swk;
  if (T < 0 || C < 0) return SWK_BAD_SIZE;
  if (dtype < SWK_FLOAT32 || dtype > SWK_FLOAT16) return SWK_BAD_DTYPE;
  if (token_offset < 0 || token_offset > kLastToken) return SWK_BAD_TOKEN;
  if (!token_index && T - 1 > kLastToken - token_offset) return SWK_BAD_TOKEN;
  if (T == 0 || C == 0) return SWK_OK;
  if (!x || !keys) return SWK_BAD_SIZE;
  // Keys are not negative, so they order alike signed and unsigned.
  const Problem problem = {x, T, C, stride, reinterpret_cast<unsigned long long*>(keys),
                           token_index, token_offset};
  if (dtype == SWK_FLOAT32) return run<Float32>(problem, stream);
  return dtype == SWK_BFLOAT16 ? run<BFloat16>(problem, stream) : run<Float16>(problem, stream);
}

const char* swk_cuda_last_error(void) { return swk::last_error(); }
