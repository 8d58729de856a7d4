// What the CUDA operators share: where they run, the element types, maps as the launchers take them. The same
// sources also make torch.ops.effdense_simt (EFFDENSE_SIMT is its name, tests/simt): CPU tensors, and a
// harness that runs the kernels. This file alone tells the two apart.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#ifndef EFFDENSE_SIMT
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <optional>
#include <stdexcept>

#include "backend.h"
#include "checks.h"
#include "cuda/kernels/launchers.h"
#include "maps.h"

namespace effdense {

// The tensors' device and its current stream, for as long as this lives.
#ifdef EFFDENSE_SIMT
#define EFFDENSE_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(EFFDENSE_SIMT, CPU, m)
#define EFFDENSE_CUDA_FRAGMENT(m) TORCH_LIBRARY_FRAGMENT(EFFDENSE_SIMT, m)
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  static constexpr kernels::Stream stream = nullptr;
};
#else
#define EFFDENSE_CUDA_LIBRARY(m) TORCH_LIBRARY_IMPL(effdense, CUDA, m)
#define EFFDENSE_CUDA_FRAGMENT(m) TORCH_LIBRARY_FRAGMENT(effdense, m)
struct OnDevice {
  explicit OnDevice(const Tensor& x) : guard(x.device()), stream(c10::cuda::getCurrentCUDAStream()) {}
  const c10::cuda::CUDAGuard guard;
  const kernels::Stream stream;
};
#endif

template <typename scalar_t>
struct DeviceType {
  using Type = scalar_t;
};
template <>
struct DeviceType<at::Half> {
  using Type = __half;
};
template <>
struct DeviceType<at::BFloat16> {
  using Type = __nv_bfloat16;
};

// Runs the body for the type of the map `like`; T is the storage type, A the one for sums. A launch that
// fails says for which operator and shape.
#define EFFDENSE_CUDA_DISPATCH(op, like, ...)                                                                \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (like).scalar_type(), op, [&] {                  \
    using T = DeviceType<scalar_t>::Type;                                                                    \
    using A [[maybe_unused]] = kernels::acc_t<T>;                                                            \
    try {                                                                                                    \
      __VA_ARGS__();                                                                                         \
    } catch (const std::runtime_error& error) {                                                              \
      TORCH_CHECK(false, op, ": failed for shape ", (like).sizes(), " of type ", (like).scalar_type(), ": ", \
                  error.what());                                                                             \
    }                                                                                                        \
  })

inline kernels::Size size_of(const Tensor& x) { return {x.size(0) * count_pixels(x), x.size(1)}; }

// A map that is read as a matrix, and the copy that this may have taken.
template <typename T>
struct ReadableMatrix {
  explicit ReadableMatrix(const Tensor& x)
      : dense(matrix_step(x) ? x : channels_last_copy(x)),
        matrix{static_cast<const T*>(dense.const_data_ptr()), *matrix_step(dense)} {}
  Tensor dense;
  kernels::Matrix<const T> matrix;
};

// A map that is written in place as a matrix.
template <typename T>
kernels::Matrix<T> writable_matrix(const char* op, const char* name, const Tensor& x) {
  const int64_t step = writable_step(op, name, x);
  return {static_cast<T*>(x.mutable_data_ptr()), step};
}

// Folded batch normalisation; mean and rstd where the operator has them.
template <typename A>
kernels::Norm<A> norm_of(const Tensor& scale, const Tensor& shift, const Tensor* mean = nullptr,
                         const Tensor* rstd = nullptr) {
  return {scale.const_data_ptr<A>(), shift.const_data_ptr<A>(),
          mean == nullptr ? nullptr : mean->const_data_ptr<A>(),
          rstd == nullptr ? nullptr : rstd->const_data_ptr<A>()};
}

// The two sums of a backward, 0 where there is nothing to add.
struct Sums {
  Sums(const Tensor& x, const Tensor& scale)
      : d(at::empty({x.size(1)}, scale.options())), dx(at::empty_like(d)) {
    if (x.numel() > 0) return;
    d.zero_();
    dx.zero_();
  }
  Tensor d, dx;
};

}  // namespace effdense
