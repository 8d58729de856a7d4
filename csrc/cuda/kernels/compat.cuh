// The differences between nvcc and g++, and the architecture that is compiled for; no other file asks. Under
// nvcc: launches, shared memory and inline PTX. Under g++ the same names run on the CPU, in harness/simt.
// Kernels touch global memory only through load, store and cp_async, which count there what they move.
//
// What 8.0 and later have and 7.5 lacks is in namespace `ampere`; kernels get it from architecture.cuh.
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#ifdef __CUDA_ARCH__
#define EFFDENSE_ARCHITECTURE __CUDA_ARCH__
#else
#define EFFDENSE_ARCHITECTURE 800  // of host code, where it means nothing
#endif

// Dynamic shared memory as an array of T. One declaration serves every T of a file, hence the cast.
#define DYN_SHARED(T, name)                                                 \
  extern __shared__ __align__(128) unsigned char effdense_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(effdense_dynamic_shared)

namespace effdense::kernels {

// Whether threads may return before a barrier that others still reach: sm_70 and later allow it, the harness
// asks.
enum class Exit { together, early };

// Throws std::runtime_error if the launch is refused.
template <Exit kExit = Exit::together, typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  // Without asking a kernel may have 48 KB, of which its static arrays take their part.
  constexpr size_t kUnasked = 32 * 1024;
  cudaError_t status = cudaSuccess;
  if (dynamic_shared_bytes > kUnasked) {
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(dynamic_shared_bytes));
  }
  if (status == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = dynamic_shared_bytes;
    config.stream = stream;
    status = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  }
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reported here; not again by whoever asks next
  const char* name = nullptr;
  if (cudaFuncGetName(&name, reinterpret_cast<const void*>(kernel)) != cudaSuccess || name == nullptr)
    name = "a kernel";
  const auto text = [](dim3 size) {
    return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + ")";
  };
  throw std::runtime_error(std::string("launch of ") + name + ", grid " + text(grid) + ", block " +
                           text(block) + ", " + std::to_string(dynamic_shared_bytes) +
                           " bytes of shared memory: " + cudaGetErrorString(status));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute, const char* name) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess)
    throw std::runtime_error(std::string("CUDA does not tell the ") + name);
  return value;
}

inline int multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount, "number of multiprocessors");
}

// Shared memory of a multiprocessor, for all of its blocks.
inline int multiprocessor_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, "shared memory of a multiprocessor");
}

inline int compute_capability_major() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor, "compute capability");
}

template <size_t kBytes>
struct Words;
template <>
struct Words<1> {
  using Type = unsigned char;
};
template <>
struct Words<2> {
  using Type = unsigned short;
};
template <>
struct Words<4> {
  using Type = unsigned;
};
template <>
struct Words<8> {
  using Type = uint2;
};
template <>
struct Words<16> {
  using Type = uint4;
};

// One access to global memory of sizeof(T) <= 16 bytes; the address is a multiple of that.
template <typename T>
__device__ __forceinline__ T load(const T* address) {
  static_assert(sizeof(T) == alignof(T));
  const auto words = *reinterpret_cast<const typename Words<sizeof(T)>::Type*>(address);
  T value;
  memcpy(&value, &words, sizeof(T));
  return value;
}

template <typename T>
__device__ __forceinline__ void store(T* address, const std::type_identity_t<T>& value) {
  static_assert(sizeof(T) == alignof(T));
  // Not by memcpy as above: in a large kernel the compiler then stores 4 bytes at a time.
  using Type = typename Words<sizeof(T)>::Type;
  *reinterpret_cast<Type*>(address) = *reinterpret_cast<const Type*>(&value);
}

// Adds 1 for the whole device, and returns what was there; orders no other access.
__device__ __forceinline__ int count_up(int* counter) { return atomicAdd(counter, 1); }

// What the calling thread has stored, or seen stored, before, is there for whoever sees what it stores or
// adds after, and what it loads after is no older than what it has read before: on the whole device.
__device__ __forceinline__ void fence() { __threadfence(); }

// Four 8x8 matrices of 16-bit elements: lane 8m + i gives the address of row i of matrix m (in shared memory,
// a multiple of 16); lane l receives, of each, elements (l / 4, 2 * (l % 4)) and the one right of it. _trans:
// of the transposed matrices.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// accumulator += A B, A of 16 x 8, B of 8 x 8, of __half. With g = lane / 4 and t = lane % 4:
//   accumulator   (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
//   a0, a1        (g, 2t..) (g + 8, 2t..), each a pair of columns
//   b             (2t.., g), a pair of rows
__device__ __forceinline__ void mma_16x8x8_half(float (&accumulator)[4], uint32_t a0, uint32_t a1,
                                                uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
      : "r"(a0), "r"(a1), "r"(b));
}

namespace ampere {

// Asynchronous copy of kBytes (4, 8 or 16, both sides aligned to that) to shared memory, of which the first
// `valid_bytes` come from `global` and the rest are zeros. 16 bytes bypass L1.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int valid_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes),
                 "r"(valid_bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void cp_async16(void* shared, const void* global, int valid_bytes = 16) {
  cp_async<16>(shared, global, valid_bytes);
}

// Closes the calling thread's current group of copies, which may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when at most kGroups of the calling thread's groups are outstanding. Other threads' copies need a
// barrier too.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// accumulator += A B, A of 16 x 16, B of 16 x 8, of __half or __nv_bfloat16. With g = lane / 4 and t = lane %
// 4:
//   accumulator   (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
//   a             (g, 2t..) (g + 8, 2t..) (g, 2t + 8..) (g + 8, 2t + 8..), each a pair of columns
//   b0, b1        (2t.., g) (2t + 8.., g), each a pair of rows
// ldmatrix_x4 of a row-major 16 x 16 tile gives a (matrices: top left, bottom left, top right, bottom right),
// and of row-major B^T gives b0 and b1.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&accumulator)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// accumulator += A B, A of 16 x 8, B of 8 x 8, of TF32 (to_tf32); the accumulator as above.
//   a (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)      b0, b1 (t, g) (t + 4, g)
__device__ __forceinline__ void mma_16x8x8_tf32(float (&accumulator)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The nearest TF32, ties away from zero, as the operand that the mma takes.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// relu of two floats as one register of T, `low` in the lower half, in one instruction; NaN stays NaN.
template <typename T>
__device__ __forceinline__ uint32_t pack_relu(float low, float high) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  uint32_t pair;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace ampere

}  // namespace effdense::kernels

#else

#include "simt/launch.h"

#define EFFDENSE_ARCHITECTURE EFFDENSE_SIMT_ARCHITECTURE

namespace effdense::kernels {

using simt::count_up;
using simt::Exit;
using simt::fence;
using simt::launch;
using simt::ldmatrix_x4;
using simt::ldmatrix_x4_trans;
using simt::load;
using simt::mma_16x8x8_half;
using simt::multiprocessor_shared_bytes;
using simt::multiprocessors;
using simt::store;

inline int compute_capability_major() { return EFFDENSE_SIMT_ARCHITECTURE / 100; }

namespace ampere {

using simt::cp_async;
using simt::cp_async16;
using simt::cp_async_commit;
using simt::cp_async_wait;
using simt::mma_16x8x16;
using simt::mma_16x8x8_tf32;
using simt::pack_relu;
using simt::to_tf32;

}  // namespace ampere
}  // namespace effdense::kernels

#endif

namespace effdense::kernels {

// kCount elements that load and store move at once.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vec {
  T data[kCount];
  __host__ __device__ T& operator[](int i) { return data[i]; }
  __host__ __device__ const T& operator[](int i) const { return data[i]; }
};

}  // namespace effdense::kernels
