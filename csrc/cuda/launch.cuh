// What every CUDA entry point needs: the device's size, and a launch that says what went wrong.

#pragma once

#include <cuda_runtime.h>

#include <cstdio>

#include "../swkernels.h"

namespace swk {

// The text of swk_cuda_last_error; one per thread.
inline char* last_error() {
  static thread_local char text[256] = "";
  return text;
}

inline int fail(const char* what, cudaError_t error) {
  std::snprintf(last_error(), 256, "%s: %s (%s)", what, cudaGetErrorString(error),
                cudaGetErrorName(error));
  return SWK_CUDA_ERROR;
}

inline cudaError_t multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// Queues kernel(arguments...) on the stream. The return value is of this launch alone: errors that
// earlier work left behind are not taken from those who will ask for them.
template <class... Parameters>
int launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
           Parameters... parameters) {
  void* addresses[] = {&parameters...};
  const cudaError_t error =
      cudaLaunchKernel(kernel, grid, block, addresses, 0, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return SWK_OK;
  char what[128];
  std::snprintf(what, sizeof what, "%s<<<(%u, %u, %u), (%u, %u, %u)>>>", name, grid.x, grid.y,
                grid.z, block.x, block.y, block.z);
  return fail(what, error);
}

}  // namespace swk
