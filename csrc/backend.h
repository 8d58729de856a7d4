// The operators of one backend as C++ functions, for callers that want no dispatcher in between (stage.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace effdense {

using at::Tensor;
using at::TensorList;

// One vector per statistic or sum, [C] each.
using TwoVectors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

// What a dense stage is made of; schemas.h says what each does. Without a kernel for a convolution a backend
// has no function there.
struct Backend {
  ThreeTensors (*fold)(const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, double eps);
  void (*defer)(const Tensor& sum_d, const Tensor& sum_dx, const Tensor& rstd, const Tensor& scale,
                int64_t count, Tensor& a, Tensor& b);
  TwoVectors (*channel_statistics)(TensorList features);
  TwoVectors (*append_features)(const Tensor& new_features, Tensor& out);
  TwoVectors (*bottleneck)(TensorList features, const Tensor& scale, const Tensor& shift,
                           const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_shift,
                           bool statistics, Tensor& y);
  ThreeTensors (*bottleneck_backward)(TensorList features, const Tensor& grad_y, const Tensor& scale,
                                      const Tensor& shift, const Tensor& mean, const Tensor& weight,
                                      TensorList grad_features, bool accumulate, bool need_features,
                                      bool need_weight, TensorList deferred);
  void (*take_gradient)(const Tensor& x, const Tensor& mean, const Tensor& a, const Tensor& b,
                        const Tensor& grad, Tensor& out);
  void (*bn_relu)(const Tensor& x, const Tensor& scale, const Tensor& shift, Tensor& out);
  TwoVectors (*bn_relu_with_sums)(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                  const Tensor& shift, const Tensor& mean, Tensor& out);
  TwoVectors (*bn_relu_backward)(Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                 const Tensor& mean, const Tensor& rstd, bool batch_statistics);
  TwoVectors (*bn_relu_accumulate)(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                   const Tensor& shift, const Tensor& mean, Tensor& grad_x);
  Tensor (*bn_relu_avg_pool)(const Tensor& x, const Tensor& scale, const Tensor& shift,
                             at::IntArrayRef kernel_size);
  TwoVectors (*bn_relu_avg_pool_backward)(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                          const Tensor& shift, const Tensor& mean,
                                          at::IntArrayRef kernel_size, Tensor& grad_x);
  TwoVectors (*bn_relu_conv3x3)(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                const Tensor& weight, const std::optional<Tensor>& bias, Tensor& out);
  ThreeTensors (*bn_relu_conv3x3_backward)(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                           const Tensor& shift, const Tensor& mean, const Tensor& weight,
                                           Tensor& grad_x, bool accumulate, bool need_x, bool need_weight);
};

// Filled by the files that implement the operators, when the library is loaded.
inline Backend cpu_backend{}, cuda_backend{};

// Makes a function the backend's operator of its name, for the dispatcher and for C++.
#define EFFDENSE_IMPLEMENT(m, backend, name) \
  do {                                       \
    m.impl(#name, name);                     \
    (backend).name = name;                   \
  } while (false)

}  // namespace effdense
