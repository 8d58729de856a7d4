// bottleneck and its backward on CUDA: checks, TF32, lists of features, launches.
#include <ATen/Context.h>
#include <ATen/ops/cat.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "cuda/bindings.h"
#include "cuda/kernels/bottleneck_launchers.h"

namespace effdense {
namespace {

// What the calling thread has been told, before PyTorch's settings: checks do so.
thread_local std::optional<bool> tf32_override;

void override_tf32(std::optional<bool> permitted) { tf32_override = permitted; }

// Whether float32 convolutions may run in TF32. torch 2.8 has one setting for everything that cuDNN does;
// later versions name the operation, 2.9 by a string, and then by an enumerator.
// Templates, of which only the one that fits is used.
template <typename Context>
bool ask(bool (Context::*permits)() const) {
  return (at::globalContext().*permits)();
}

template <typename Context>
bool ask(bool (Context::*permits)(const std::string&) const) {
  return (at::globalContext().*permits)("conv");
}

template <typename Context, typename Operation>
bool ask(bool (Context::*permits)(std::optional<Operation>) const) {
  return (at::globalContext().*permits)(Operation::CONV);
}

// What PyTorch asks before it runs a float32 convolution in TF32; this is one.
bool tf32_permitted() { return tf32_override.value_or(ask(&at::Context::allowTF32CuDNN)); }

template <typename A>
const A* data_or_null(const std::optional<Tensor>& vector) {
  return vector ? vector->const_data_ptr<A>() : nullptr;
}

// Maps that lie in one buffer as its channels, side by side, as one map; undefined for any others.
Tensor as_one_map(TensorList maps) {
  const Tensor& first = maps[0];
  if (maps.size() == 1) return first;
  const std::optional<int64_t> step = matrix_step(first);
  int64_t channels = 0;
  for (const Tensor& map : maps) {
    const bool adjacent = step && map.is_alias_of(first) && map.strides() == first.strides() &&
                          map.storage_offset() == first.storage_offset() + channels;
    if (!adjacent) return {};
    channels += map.size(1);
  }
  // One pixel of each is no proof that the next one does not lie where a wider map would have its channels.
  if (channels > *step) return {};
  std::vector<int64_t> sizes = first.sizes().vec(), strides = first.strides().vec();
  sizes[1] = channels;
  strides[1] = 1;
  return first.as_strided(sizes, strides);
}

// An uninitialised channels-last map with the sizes of `like`, in rows of whole 16 bytes.
Tensor empty_map(const Tensor& like, int64_t channels) {
  const int64_t unit = 16 / like.itemsize();
  std::vector<int64_t> sizes = like.sizes().vec();
  sizes.erase(sizes.begin() + 1);
  sizes.push_back((channels + unit - 1) / unit * unit);
  return at::empty(sizes, like.options()).movedim(-1, 1).narrow(1, 0, channels);
}

// The features side by side: as they are, or gathered.
Tensor joined(TensorList features) {
  if (const Tensor map = as_one_map(features); map.defined()) return map;
  const Tensor map = empty_map(features[0], count_channels(features));
  int64_t first = 0;
  for (const Tensor& feature : features) {
    map.narrow(1, first, feature.size(1)).copy_(feature);
    first += feature.size(1);
  }
  return map;
}

// The weight in rows that cp.async can copy, which moves 4 bytes at least.
template <typename T>
struct ReadableWeight {
  explicit ReadableWeight(const Tensor& weight) : rows(weight) {
    const int64_t unit = std::max<int64_t>(4 / weight.itemsize(), 1);
    if (weight.size(1) % unit == 0) return;
    rows = at::empty({weight.size(0), (weight.size(1) + unit - 1) / unit * unit}, weight.options())
               .narrow(1, 0, weight.size(1));
    rows.copy_(weight);
  }
  kernels::Matrix<const T> matrix() const {
    return {static_cast<const T*>(rows.const_data_ptr()), rows.stride(0)};
  }
  Tensor rows;
};

void bottleneck(StatisticsTo& to, TensorList features, const Tensor& scale, const Tensor& shift,
                const Tensor& weight, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_shift,
                bool statistics, Tensor& y) {
  constexpr const char* op = "bottleneck";
  check_bottleneck(op, features, scale, shift, weight, bias, out_scale, out_shift, y);
  const OnDevice device(y);
  const int64_t out_channels = weight.size(0);
  make(to, y, statistics ? out_channels : 0);
  if (y.numel() == 0) return statistics ? finish_empty(to) : void();
  EFFDENSE_CUDA_DISPATCH(op, y, [&] {
    const kernels::Matrix<T> out = writable_matrix<T>(op, "y", y);
    const ReadableMatrix<T> x(joined(features));
    const ReadableWeight<T> w(weight);
    const kernels::Size size = size_of(x.dense);
    const kernels::Epilogue<A> epilogue{data_or_null<A>(bias), data_or_null<A>(out_scale),
                                        data_or_null<A>(out_shift)};
    const auto run = [&](const kernels::StatisticsOut<A>& results, const kernels::Scratch<A>& scratch) {
      kernels::bottleneck(size, out_channels, x.matrix, norm_of<A>(scale, shift), w.matrix(), epilogue,
                          tf32_permitted(), out, results, scratch, device.stream);
    };
    if (!statistics) return run({nullptr, nullptr}, {});
    const Temporary<A> temporary(kernels::bottleneck_workspace_size<T>(size, out_channels), scale.options(),
                                 to.counters);
    std::vector<Tensor> kept;
    run(statistics_of<A>(to, kept), temporary.scratch());
  });
}

Tensor bottleneck_backward(SumsTo& to, TensorList features, const Tensor& grad_y, const Tensor& scale,
                           const Tensor& shift, const Tensor& mean, const Tensor& weight,
                           TensorList grad_features, bool accumulate, bool need_features, bool need_weight,
                           TensorList correction) {
  constexpr const char* op = "bottleneck_backward";
  check_bottleneck_backward(op, features, grad_y, scale, shift, mean, weight, grad_features, correction);
  const Correction missing = Correction::of(correction);
  const OnDevice device(grad_y);
  const int64_t out_channels = weight.size(0), channels = scale.numel();
  const bool nothing = grad_y.numel() == 0;
  const std::array<int64_t, 2> sizes{need_weight ? out_channels : 0, channels};
  const Tensor grad_weight = nothing ? at::zeros(sizes, scale.options()) : at::empty(sizes, scale.options());
  make(to, scale, channels, nothing || !need_features);
  if (nothing) return grad_weight;

  EFFDENSE_CUDA_DISPATCH(op, grad_y, [&] {
    bool wanted = false, whole = true;  // any of the gradients, all of them
    for (size_t i = 0; i < grad_features.size(); ++i) {
      const bool mine = need_features && grad_features[i].numel() > 0;
      if (mine) writable_step(op, ("grad_features[" + std::to_string(i) + "]").c_str(), grad_features[i]);
      wanted = wanted || mine;
      whole = whole && mine;
    }
    const ReadableMatrix<T> x(joined(features)), dy(grad_y);
    const ReadableWeight<T> w(weight);
    // Where the gradients are no one map, they are made as one and handed out.
    const Tensor together = whole ? as_one_map(grad_features) : Tensor();
    const Tensor grad_x = !wanted ? Tensor() : together.defined() ? together : empty_map(grad_y, channels);
    kernels::Correction<T> correction;
    std::optional<ReadableMatrix<T>> y;
    if (missing.any()) {
      y.emplace(missing.y);
      correction = {y->matrix, missing.mean.const_data_ptr<A>(), missing.a.const_data_ptr<A>(),
                    missing.b.const_data_ptr<A>()};
      if (missing.masks()) {
        correction.scale = missing.scale.const_data_ptr<A>();
        correction.shift = missing.shift.const_data_ptr<A>();
      }
    }
    const kernels::Size size = size_of(x.dense);
    const Tensor workspace =
        at::empty({kernels::bottleneck_backward_workspace_size<T>(size, out_channels)}, scale.options());
    kernels::bottleneck_backward(
        size, out_channels, x.matrix, dy.matrix, correction, norm_of<A>(scale, shift, &mean), w.matrix(),
        tf32_permitted(),
        wanted ? writable_matrix<T>(op, "grad_features", grad_x) : kernels::Matrix<T>{nullptr, 0},
        accumulate && together.defined(), need_weight ? grad_weight.mutable_data_ptr<A>() : nullptr,
        need_features ? sums_of<A>(to) : kernels::SumsOut<A>{nullptr, nullptr},
        workspace.mutable_data_ptr<A>(), device.stream);
    if (!wanted || together.defined()) return;
    int64_t first = 0;
    for (size_t i = 0; i < grad_features.size(); ++i) {
      const Tensor part = grad_x.narrow(1, first, features[i].size(1));
      first += features[i].size(1);
      if (grad_features[i].numel() == 0) continue;
      if (accumulate)
        grad_features[i].add_(part);
      else
        grad_features[i].copy_(part);
    }
  });
  return grad_weight;
}

}  // namespace

EFFDENSE_CUDA_LIBRARY(m) {
  EFFDENSE_IMPLEMENT_RETURNING(m, cuda_backend, bottleneck);
  EFFDENSE_IMPLEMENT_RETURNING(m, cuda_backend, bottleneck_backward);
}

// true or false: whether this thread's products may round to TF32, whatever PyTorch's settings say; None:
// those
EFFDENSE_CUDA_FRAGMENT(m) {
  m.def("override_tf32(bool? permitted) -> ()", override_tf32);
  // for how many multiprocessors this thread's launches are cut, and so which tiles they take; 0: for those
  // of the card
  m.def("override_multiprocessors(int count) -> ()",
        [](int64_t count) { kernels::assumed_multiprocessors = static_cast<int>(count); });
}

}  // namespace effdense
