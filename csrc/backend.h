// One device's operators as C++ functions, for the stage in C++ (stage.h), which calls them without the
// dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace effdense {

using at::Tensor;
using at::TensorList;

// One vector per statistic or sum, [C] each.
using TwoVectors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;

inline std::optional<Tensor> given(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

// A norm to be folded: rstd = 1 / sqrt(var + eps), scale = weight * rstd, shift = bias - mean * scale, [C]
// each; an undefined weight or bias is 1 or 0. The last three are written. Where there are running
// statistics, of any floating type, mean and var are written too: they become those.
struct FoldOf {
  Tensor mean, var, weight, bias;
  double eps;
  Tensor rstd, scale, shift;
  Tensor running_mean{}, running_var{};
};

// What a gradient grad_y still misses: -a - b * (y - mean), [C] each, and before that the backward of
// relu(scale * y + shift) where those are defined. Nothing without y. As the schemas have it: a list of 0, 4
// or 6.
struct Correction {
  Tensor y, mean, a, b, scale, shift;

  static Correction of(TensorList list) {
    Correction correction;
    const std::array<Tensor*, 6> all{&correction.y, &correction.mean,  &correction.a,
                                     &correction.b, &correction.scale, &correction.shift};
    for (size_t i = 0; i < list.size(); ++i) *all.at(i) = list[i];
    return correction;
  }
  bool any() const { return y.defined(); }
  bool masks() const { return scale.defined(); }
  std::vector<Tensor> tensors() const {
    if (!any()) return {};
    return masks() ? std::vector<Tensor>{y, mean, a, b, scale, shift} : std::vector<Tensor>{y, mean, a, b};
  }
};

// Where an operator puts the statistics of what it makes: new vectors where mean and var are undefined. What
// reads them next is folded at once: of its channels these are the ones from `first` on, and of the others
// the statistics are there.
struct StatisticsTo {
  Tensor mean, var;
  const FoldOf* then = nullptr;
  int64_t first = 0;
  Tensor counters{};  // Backend::counters zeros, which are zeros again when the operator is done
};

// What an operator makes of its two sums: sum d, and sum d (x - mean), times rstd where that is defined, as
// the gradients of a norm's parameters are. And what accumulate_correction makes of them: a and b that it
// adds to, or new ones.
struct SumsTo {
  enum class Coefficients { none, added, made };
  Tensor sum_d, sum_dx;  // results
  Tensor rstd, scale;
  Coefficients coefficients = Coefficients::none;
  int64_t count = 0;  // of pixels, for a and b
  Tensor a, b;
  Tensor counters;  // as above
};

// What a dense stage is made of; schemas.h says what each does. Without a kernel for a convolution a backend
// has no function there.
struct Backend {
  int64_t counters = 0;  // int32 elements
  void (*fold)(at::ArrayRef<FoldOf> folds);
  void (*channel_statistics)(StatisticsTo& to, TensorList features);
  void (*append_features)(StatisticsTo& to, const Tensor& new_features, Tensor& out);
  void (*bottleneck)(StatisticsTo& to, TensorList features, const Tensor& scale, const Tensor& shift,
                     const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_shift,
                     bool statistics, Tensor& y);
  Tensor (*bottleneck_backward)(SumsTo& to, TensorList features, const Tensor& grad_y, const Tensor& scale,
                                const Tensor& shift, const Tensor& mean, const Tensor& weight,
                                TensorList grad_features, bool accumulate, bool need_features,
                                bool need_weight, TensorList correction);
  void (*apply_correction)(const Tensor& x, const Tensor& mean, const Tensor& a, const Tensor& b,
                           const Tensor& grad, Tensor& out);
  void (*bn_relu)(const Tensor& x, const Tensor& scale, const Tensor& shift, Tensor& out);
  void (*bn_relu_backward_sums)(SumsTo& to, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                const Tensor& shift, const Tensor& mean, Tensor& out);
  void (*bn_relu_backward)(SumsTo& to, Tensor& grad, const Tensor& x, const Tensor& scale,
                           const Tensor& shift, const Tensor& mean, const Tensor& rstd,
                           bool batch_statistics);
  void (*bn_relu_backward_accumulate)(SumsTo& to, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                      const Tensor& shift, const Tensor& mean, Tensor& grad_x);
  Tensor (*bn_relu_avg_pool)(const Tensor& x, const Tensor& scale, const Tensor& shift,
                             at::IntArrayRef kernel_size);
  void (*bn_relu_avg_pool_backward)(SumsTo& to, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                    const Tensor& shift, const Tensor& mean, at::IntArrayRef kernel_size,
                                    Tensor& grad_x);
  void (*bn_relu_conv3x3)(StatisticsTo& to, const Tensor& x, const Tensor& scale, const Tensor& shift,
                          const Tensor& weight, const std::optional<Tensor>& bias, Tensor& out);
  Tensor (*bn_relu_conv3x3_backward)(SumsTo& to, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                     const Tensor& shift, const Tensor& mean, const Tensor& weight,
                                     Tensor& grad_x, bool accumulate, bool need_x, bool need_weight);
};

// Filled by the files that implement the operators, when the library is loaded.
inline Backend cpu_backend{}, cuda_backend{};

// A function that puts its results somewhere as one that returns them, as the schemas have it.
template <auto function>
struct Returning;
template <typename... Arguments, void (*function)(StatisticsTo&, Arguments...)>
struct Returning<function> {
  static TwoVectors call(Arguments... arguments) {
    StatisticsTo to;
    function(to, arguments...);
    return {to.mean, to.var};
  }
};
template <typename... Arguments, void (*function)(SumsTo&, Arguments...)>
struct Returning<function> {
  static TwoVectors call(Arguments... arguments) {
    SumsTo to;
    function(to, arguments...);
    return {to.sum_d, to.sum_dx};
  }
};
template <typename... Arguments, Tensor (*function)(SumsTo&, Arguments...)>
struct Returning<function> {
  static ThreeTensors call(Arguments... arguments) {
    SumsTo to;
    const Tensor result = function(to, arguments...);
    return {result, to.sum_d, to.sum_dx};
  }
};

// Makes a function the backend's operator of its name, for the dispatcher and for C++.
#define EFFDENSE_IMPLEMENT(m, backend, name) \
  do {                                       \
    m.impl(#name, name);                     \
    (backend).name = name;                   \
  } while (false)
// The same for one that puts its results somewhere.
#define EFFDENSE_IMPLEMENT_RETURNING(m, backend, name) \
  do {                                                 \
    m.impl(#name, Returning<name>::call);              \
    (backend).name = name;                             \
  } while (false)

}  // namespace effdense
