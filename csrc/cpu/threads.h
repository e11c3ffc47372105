// Work shared among threads.

#pragma once

#include <exception>
#include <thread>
#include <vector>

namespace swk {

// GOMP_parallel(function, data, threads, flags), the entry that compilers call for an OpenMP
// parallel region; libgomp, LLVM's libomp and Intel's libiomp5 all have it. Calling it ourselves
// instead of compiling with -fopenmp means that the library is bound to the runtime which the
// process already uses (PyTorch's own copy, whatever its file is called), never to a second one,
// and that any compiler will do.
using ThreadPool = void (*)(void (*)(void*), void*, unsigned, unsigned);

ThreadPool thread_pool();

// Calls work() on up to `threads` threads at once and waits for all of them. Calls may come fewer
// than asked for: work() takes its share from a common counter until nothing is left, and must not
// throw.
template <class Work>
void run_on_threads(int threads, Work& work) {
  if (threads <= 1) {
    work();
    return;
  }
  if (ThreadPool pool = thread_pool()) {
    pool([](void* data) { (*static_cast<Work*>(data))(); }, &work, static_cast<unsigned>(threads),
         0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back([&work] { work(); });
  } catch (const std::exception&) {
    // No more threads to be had: those that run share the work.
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace swk
