// The parts of the CPU library that are not kernels.

#include <atomic>

#include "isa.h"
#include "threads.h"

namespace swk {
namespace {
std::atomic<ThreadPool> chosen_pool{nullptr};
}

ThreadPool thread_pool() { return chosen_pool.load(std::memory_order_acquire); }
}  // namespace swk

int swk_cpu_isa(int isa) { return swk::resolve_isa(isa); }

void swk_cpu_set_thread_pool(void* gomp_parallel) {
  swk::chosen_pool.store(reinterpret_cast<swk::ThreadPool>(gomp_parallel),
                         std::memory_order_release);
}
