// Included before all else in what the sanitizers look at: at::parallel_for on std::thread. ThreadSanitizer
// sees where those begin and end, and not how GCC's OpenMP waits. Compiled without -fopenmp, ATen leaves
// invoke_parallel open.
#pragma once

#ifdef _OPENMP
#error "compile this without -fopenmp"
#endif

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace effdense::sanitizers {
int count_threads();  // at::get_num_threads, which this header comes before
}

#define INTRA_OP_PARALLEL
namespace at::internal {

// Cuts the work as ATen's OpenMP does, the calling thread takes the first part.
template <typename F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  int64_t count = effdense::sanitizers::count_threads();
  if (grain_size > 0) count = std::min(count, (end - begin + grain_size - 1) / grain_size);
  const int64_t step = (end - begin + count - 1) / count;
  std::vector<std::exception_ptr> errors(count);
  const auto part = [&](int64_t i) {
    const int64_t first = begin + i * step;
    if (first >= end) return;
    try {
      f(first, std::min(end, first + step));
    } catch (...) {
      errors[i] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < count; ++i) threads.emplace_back(part, i);
  part(0);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace at::internal
