// As much of CUDA as csrc/cuda needs, on the threads of a CPU: the kernels' own source, compiled as
// C++, runs where there is no GPU. One block at a time, one thread for each of its threads.

#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 gridDim;
inline pthread_barrier_t block_barrier;

inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class Number>
Number atomicAdd(Number* address, Number value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline void atomicMin(unsigned long long* address, unsigned long long value) {
  unsigned long long seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (seen > value && !__atomic_compare_exchange_n(address, &seen, value, false,
                                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

inline void atomicMax(unsigned long long* address, unsigned long long value) {
  unsigned long long seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(address, &seen, value, false,
                                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum { cudaDevAttrMultiProcessorCount = 16 };

inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidConfiguration"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 1, cudaSuccess; }

inline bool next_launch_fails = false;
extern "C" __attribute__((used)) inline void fail_next_launch() { next_launch_fails = true; }

// As the real one, which takes the addresses of the arguments; kernels here have one argument.
template <class Parameter>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameter), dim3 grid, dim3 block, void** arguments,
                             size_t, cudaStream_t) {
  const Parameter argument = *static_cast<Parameter*>(arguments[0]);
  if (next_launch_fails || grid.y > 65535 || block.x * block.y * block.z > 1024) {
    next_launch_fails = false;
    return cudaErrorInvalidConfiguration;
  }
  const unsigned threads = block.x * block.y;
  gridDim = grid;
  pthread_barrier_init(&block_barrier, nullptr, threads);
  std::vector<std::thread> running;
  for (unsigned thread = 0; thread < threads; ++thread) {
    running.emplace_back([=] {
      threadIdx = dim3(thread % block.x, thread / block.x);
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y);
          kernel(argument);
          __syncthreads();
        }
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  pthread_barrier_destroy(&block_barrier);
  return cudaSuccess;
}
