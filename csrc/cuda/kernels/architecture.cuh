// Turing (compute capability 7.5) or Ampere and later (8.0). 7.5 has no cp.async, no mma m16n8k16, none of
// bfloat16 and TF32, and 64 KB of shared memory. Kernels find the same names here, made of what 7.5 has.
// Every file whose code depends on the architecture includes this one.
#pragma once

#include "kernels/access.cuh"

namespace effdense::kernels {

enum class Architecture { turing, ampere };

// In a kernel: what it is compiled for. Host code asks architecture(), of the current device, which never
// runs the other one's code: the build makes no PTX of 7.5.
constexpr Architecture kArchitecture =
    EFFDENSE_ARCHITECTURE < 800 ? Architecture::turing : Architecture::ampere;

inline Architecture architecture() {
  return compute_capability_major() < 8 ? Architecture::turing : Architecture::ampere;
}

// The most shared memory of a block: what every card of the kind has room for.
constexpr int most_shared_bytes(Architecture on) { return (on == Architecture::turing ? 64 : 99) * 1024; }

namespace turing {

// A plain copy, which is there when the function returns. valid_bytes is even.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int valid_bytes = kBytes) {
  constexpr int kCount = kBytes / sizeof(uint16_t);
  const auto piece = load_some<kCount>(static_cast<const uint16_t*>(global), valid_bytes / 2);
  *static_cast<Vec<uint16_t, kCount>*>(shared) = piece;
}

__device__ __forceinline__ void cp_async16(void* shared, const void* global, int valid_bytes = 16) {
  cp_async<16>(shared, global, valid_bytes);
}

__device__ __forceinline__ void cp_async_commit() {}

template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {}

// The depth's lower half, then its upper one.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&accumulator)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  static_assert(std::is_same_v<T, __half>, "there is none of another type");
  mma_16x8x8_half(accumulator, a[0], a[1], b0);
  mma_16x8x8_half(accumulator, a[2], a[3], b1);
}

// relu of two floats as one register of T, `low` in the lower half; NaN stays NaN.
template <typename T>
__device__ __forceinline__ uint32_t pack_relu(float low, float high) {
  const T pair[2] = {static_cast<T>(low <= 0.0f ? 0.0f : low), static_cast<T>(high <= 0.0f ? 0.0f : high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}

// The nearest T, ties to even. cuda_bf16.h's emulation takes so many registers that kernels spill.
template <typename T, typename A>
__device__ __forceinline__ T narrow(A value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const uint32_t bits = __float_as_uint(value);
    const uint32_t nearest = value != value ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
    return T(__nv_bfloat16_raw{static_cast<unsigned short>(nearest)});
  } else {
    return static_cast<T>(value);
  }
}

}  // namespace turing

namespace ampere {

template <typename T, typename A>
__device__ __forceinline__ T narrow(A value) {
  return static_cast<T>(value);
}

}  // namespace ampere

#if EFFDENSE_ARCHITECTURE < 800
using namespace turing;
#else
using namespace ampere;
#endif

}  // namespace effdense::kernels
