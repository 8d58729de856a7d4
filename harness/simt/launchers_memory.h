// The launchers' program's arrays: on the CPU, for its sanitizers, a std::vector; under nvcc memory of the
// device that ends where the array ends, for compute-sanitizer.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __CUDACC__

#include <cuda_runtime.h>

inline void succeed(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Waits for what was launched: an error is then that of the launches before it.
inline void wait_for_device() { succeed(cudaDeviceSynchronize(), "a launcher"); }

// Without values its memory is as it was allocated, so that initcheck sees who reads what nobody wrote.
template <typename T>
class Memory {
 public:
  explicit Memory(size_t count) : count_(count) {
    if (count > 0) succeed(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)), "cudaMalloc");
  }
  explicit Memory(const std::vector<T>& values) : Memory(values.size()) {
    if (count_ > 0)
      succeed(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Memory(size_t count, T value) : Memory(std::vector<T>(count, value)) {}
  Memory(const Memory&) = delete;
  Memory& operator=(Memory&& other) {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Memory() { cudaFree(data_); }
  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

#else

template <typename T>
using Memory = std::vector<T>;

inline void wait_for_device() {}

#endif
