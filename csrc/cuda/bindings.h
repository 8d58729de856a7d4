// Shared by the CUDA operators: device and stream, element types, maps as the launchers take them. The same
// sources also make torch.ops.effdense_simt (EFFDENSE_SIMT is its name, harness/simt): CPU tensors, and a
// harness that runs the kernels. This file alone tells the two apart.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
#ifndef EFFDENSE_SIMT
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <optional>
#include <stdexcept>
#include <vector>

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

// ---- What a launcher takes beside maps, out of what its caller has given. All of it is there before the
// first launch.

// Memory that a call needs until it is done.
template <typename A>
struct Temporary {
  Temporary(int64_t partial_size, const at::TensorOptions& options, const Tensor& given_counters)
      : partial(at::empty({partial_size}, options)),
        counters(given_counters.defined() ? given_counters
                                          : at::zeros({kernels::kCounters}, options.dtype(at::kInt))) {}
  kernels::Scratch<A> scratch() const {
    return {partial.mutable_data_ptr<A>(), counters.mutable_data_ptr<int>()};
  }
  Tensor partial, counters;
};

inline kernels::Parameter parameter_of(const char* name, const Tensor& vector, const Tensor& like,
                                       std::vector<Tensor>& kept) {
  if (!vector.defined()) return {};
  const bool is_known = vector.is_contiguous() && vector.dim() == 1;
  Tensor x = is_known ? vector : vector.contiguous();
  check_device("fold", name, x, like.device());
  TORCH_CHECK_VALUE(x.dim() == 1 && x.numel() == like.numel(), "fold: ", name,
                    " must be a contiguous vector of ", like.numel(),
                    " elements (one per channel), got shape ", x.sizes());
  const auto type_of = [&]() -> std::optional<kernels::Element> {
    switch (x.scalar_type()) {
      case at::kFloat:
        return kernels::Element::float32;
      case at::kDouble:
        return kernels::Element::float64;
      case at::kHalf:
        return kernels::Element::float16;
      case at::kBFloat16:
        return kernels::Element::bfloat16;
      default:
        return std::nullopt;
    }
  };
  if (!type_of()) x = x.to(like.scalar_type());
  kept.push_back(x);
  return {x.const_data_ptr(), *type_of()};
}

// `kept`: copies of parameters, until the launch.
template <typename A>
kernels::Fold<A> fold_of(const FoldOf& norm, std::vector<Tensor>& kept) {
  return {norm.mean.numel(),
          norm.mean.mutable_data_ptr<A>(),
          norm.var.mutable_data_ptr<A>(),
          parameter_of("weight", norm.weight, norm.mean, kept),
          parameter_of("bias", norm.bias, norm.mean, kept),
          static_cast<A>(norm.eps),
          norm.rstd.mutable_data_ptr<A>(),
          norm.scale.mutable_data_ptr<A>(),
          norm.shift.mutable_data_ptr<A>(),
          parameter_of("running_mean", norm.running_mean, norm.mean, kept),
          parameter_of("running_var", norm.running_var, norm.mean, kept)};
}

// The statistics of `channels` channels of a map like `like`: makes the vectors where there are none.
inline void make(StatisticsTo& to, const Tensor& like, int64_t channels) {
  if (to.mean.defined()) return;
  to.mean = at::empty({channels}, like.options().dtype(accumulate_type(like.scalar_type())));
  to.var = at::empty_like(to.mean);
}

// Of no values: 0 and 1, and what is folded of them.
inline void finish_empty(const StatisticsTo& to) {
  to.mean.zero_();
  to.var.fill_(1);
  if (to.then != nullptr) cuda_backend.fold(*to.then);
}

template <typename A>
kernels::StatisticsOut<A> statistics_of(const StatisticsTo& to, std::vector<Tensor>& kept) {
  kernels::StatisticsOut<A> out{to.mean.mutable_data_ptr<A>(), to.var.mutable_data_ptr<A>()};
  if (to.then != nullptr) out.then = fold_of<A>(*to.then, kept);
  out.first = to.first;
  return out;
}

// The two sums of `channels` channels of a norm with this scale, and what else is made of them: makes the
// vectors, of zeros where nothing is added.
inline void make(SumsTo& to, const Tensor& scale, int64_t channels, bool nothing) {
  const auto vector = [&] {
    return nothing ? at::zeros({channels}, scale.options()) : at::empty({channels}, scale.options());
  };
  to.sum_d = vector();
  to.sum_dx = vector();
  if (to.coefficients != SumsTo::Coefficients::made) return;
  to.a = vector();
  to.b = vector();
}

template <typename A>
kernels::SumsOut<A> sums_of(const SumsTo& to) {
  kernels::SumsOut<A> out{to.sum_d.mutable_data_ptr<A>(), to.sum_dx.mutable_data_ptr<A>()};
  if (to.rstd.defined()) out.rstd = to.rstd.const_data_ptr<A>();
  if (to.coefficients == SumsTo::Coefficients::none) return out;
  out.scale = to.scale.const_data_ptr<A>();
  out.a = to.a.mutable_data_ptr<A>();
  out.b = to.b.mutable_data_ptr<A>();
  out.adds = to.coefficients == SumsTo::Coefficients::added;
  out.share = kernels::share_of<A>(to.count);
  return out;
}

}  // namespace effdense
