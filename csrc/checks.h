// Argument checks shared by every backend. A message says which operator, which argument, what was expected
// and what came. A wrong type raises TypeError, a wrong value ValueError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace effdense {

using at::Tensor;
using at::TensorList;

// Statistics, scale and shift are kept in the type that sums are kept in.
inline at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_type(const char* op, const char* name, const Tensor& tensor, at::ScalarType expected,
                       const char* why) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, op, ": ", name, " must be ", expected, " (", why,
                   "), got ", tensor.scalar_type());
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, at::Device expected) {
  TORCH_CHECK_VALUE(tensor.device() == expected, op, ": ", name, " must be on ", expected,
                    " like the features, got ", tensor.device());
}

// One number per channel, contiguous.
inline void check_per_channel(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                              int64_t channels) {
  check_device(op, name, tensor, like.device());
  check_type(op, name, tensor, accumulate_type(like.scalar_type()), "the type that sums are kept in");
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == channels && tensor.is_contiguous(), op, ": ", name,
                    " must be a contiguous vector of ", channels, " elements (one per channel), got shape ",
                    tensor.sizes());
}

// [N, C, *spatial], of which only C may differ between `tensor` and `like`.
inline void check_same_images(const char* op, const std::string& name, const Tensor& tensor,
                              const Tensor& like) {
  check_device(op, name.c_str(), tensor, like.device());
  check_type(op, name.c_str(), tensor, like.scalar_type(), "the features' type");
  bool same = tensor.dim() == like.dim();
  for (int64_t i = 0; same && i < like.dim(); ++i) same = i == 1 || tensor.size(i) == like.size(i);
  TORCH_CHECK_VALUE(same, op, ": ", name, " must have the batch and spatial sizes of ", like.sizes(),
                    ", got ", tensor.sizes());
}

// [N, C, *spatial] with one to three spatial dimensions and at least one channel.
inline void check_map(const char* op, const std::string& name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 3 && x.dim() <= 5, op, ": ", name,
                    " must be [N, C, *spatial] with 1 to 3 spatial dimensions, got shape ", x.sizes());
  TORCH_CHECK_VALUE(x.size(1) > 0, op, ": ", name, " must have at least one channel, got shape ", x.sizes());
}

inline void check_features(const char* op, TensorList features) {
  TORCH_CHECK_VALUE(!features.empty(), op, ": features must hold at least one tensor, got an empty list");
  for (size_t i = 0; i < features.size(); ++i) {
    const std::string name = "features[" + std::to_string(i) + "]";
    check_map(op, name, features[i]);
    if (i > 0) check_same_images(op, name, features[i], features[0]);
  }
}

inline int64_t count_channels(TensorList features) {
  int64_t channels = 0;
  for (const Tensor& feature : features) channels += feature.size(1);
  return channels;
}

// The matrix of a 1x1 convolution, [out_channels, channels].
inline void check_weight(const char* op, const Tensor& weight, const Tensor& like, int64_t channels) {
  check_device(op, "weight", weight, like.device());
  check_type(op, "weight", weight, like.scalar_type(), "the features' type");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == channels, op,
                    ": weight must be a matrix [out_channels, ", channels,
                    "] (the features' channels), got shape ", weight.sizes());
  TORCH_CHECK_VALUE(weight.is_contiguous(), op, ": weight must be contiguous, got strides ",
                    weight.strides());
}

inline void check_same_shape(const char* op, const std::string& name, const Tensor& tensor,
                             const Tensor& like) {
  check_same_images(op, name, tensor, like);
  TORCH_CHECK_VALUE(tensor.size(1) == like.size(1), op, ": ", name, " must have ", like.size(1),
                    " channels, got shape ", tensor.sizes());
}

// grad_features[i] is written: the gradient of features[i], or an empty tensor where nobody wants it.
inline void check_grad_features(const char* op, TensorList grad_features, TensorList features) {
  TORCH_CHECK_VALUE(grad_features.size() == features.size(), op, ": grad_features must hold ",
                    features.size(), " tensors (one per feature), got ", grad_features.size());
  for (size_t i = 0; i < features.size(); ++i)
    if (grad_features[i].numel() > 0)
      check_same_shape(op, "grad_features[" + std::to_string(i) + "]", grad_features[i], features[i]);
}

inline void check_channels(const char* op, const char* name, const Tensor& tensor, int64_t channels,
                           const char* why) {
  TORCH_CHECK_VALUE(tensor.size(1) == channels, op, ": ", name, " must have ", channels, " channels (", why,
                    "), got shape ", tensor.sizes());
}

// The list of a Correction (backend.h), or an empty one.
inline void check_correction(const char* op, TensorList correction, const Tensor& grad_y) {
  if (correction.empty()) return;
  TORCH_CHECK_VALUE(correction.size() == 4 || correction.size() == 6, op,
                    ": correction must hold y, mean, a, b, perhaps scale, shift, or nothing, got ",
                    correction.size(), " tensors");
  check_same_shape(op, "correction[0]", correction[0], grad_y);
  for (size_t i = 1; i < correction.size(); ++i)
    check_per_channel(op, ("correction[" + std::to_string(i) + "]").c_str(), correction[i], grad_y,
                      grad_y.size(1));
}

// The weight of a padded convolution 3 wide in each of x's directions, [out_channels, channels, 3, ...].
inline void check_conv3x3(const char* op, const Tensor& weight, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 3 && x.dim() <= 5, op,
                    ": x must be [N, C, L], [N, C, H, W] or [N, C, D, H, W], got shape ", x.sizes());
  check_device(op, "weight", weight, x.device());
  check_type(op, "weight", weight, x.scalar_type(), "the features' type");
  bool fits = weight.dim() == x.dim() && weight.size(0) > 0 && weight.size(1) == x.size(1);
  for (int64_t d = 2; fits && d < x.dim(); ++d) fits = weight.size(d) == 3;
  const char* kernel = x.dim() == 3 ? "3" : x.dim() == 4 ? "3, 3" : "3, 3, 3";
  TORCH_CHECK_VALUE(fits, op, ": weight must be [out_channels, ", x.size(1), ", ", kernel,
                    "] (x's channels and dimensions), got shape ", weight.sizes());
}

// The normalisation that may follow a convolution: both vectors or none.
inline void check_epilogue(const char* op, const std::optional<Tensor>& out_scale,
                           const std::optional<Tensor>& out_shift, const Tensor& like, int64_t channels) {
  TORCH_CHECK_VALUE(out_scale.has_value() == out_shift.has_value(), op,
                    ": out_scale and out_shift must be given together, got one of them");
  if (!out_scale) return;
  check_per_channel(op, "out_scale", *out_scale, like, channels);
  check_per_channel(op, "out_shift", *out_shift, like, channels);
}

// One whole number of at least `smallest` per spatial dimension.
inline void check_kernel(const char* op, const char* name, at::IntArrayRef sizes, const Tensor& x,
                         int64_t smallest) {
  bool right = static_cast<int64_t>(sizes.size()) == x.dim() - 2;
  for (int64_t size : sizes) right = right && size >= smallest;
  TORCH_CHECK_VALUE(right, op, ": ", name, " must have ", x.dim() - 2,
                    " numbers (one per spatial dimension) of at least ", smallest, ", got ", sizes);
}

// What a pool makes of x: its batch and channels, and the spatial sizes given.
inline void check_pooled(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                         at::IntArrayRef spatial) {
  check_device(op, name, tensor, x.device());
  check_type(op, name, tensor, x.scalar_type(), "the features' type");
  std::vector<int64_t> expected{x.size(0), x.size(1)};
  expected.insert(expected.end(), spatial.begin(), spatial.end());
  TORCH_CHECK_VALUE(tensor.sizes() == at::IntArrayRef(expected), op, ": ", name,
                    " must have the pooled shape ", at::IntArrayRef(expected), ", got ", tensor.sizes());
}

// ---- What one operator takes, and its gradient where that takes the same

// A map and the batch norm over it; mean where it is asked for.
inline void check_norm(const char* op, const Tensor& x, const Tensor& scale, const Tensor& shift,
                       const Tensor* mean = nullptr) {
  check_map(op, "x", x);
  check_per_channel(op, "scale", scale, x, x.size(1));
  check_per_channel(op, "shift", shift, x, x.size(1));
  if (mean != nullptr) check_per_channel(op, "mean", *mean, x, x.size(1));
}

inline void check_append_features(const char* op, const Tensor& new_features, const Tensor& out) {
  check_map(op, "new_features", new_features);
  check_same_shape(op, "out", out, new_features);
}

inline void check_apply_correction(const char* op, const Tensor& x, const Tensor& mean, const Tensor& a,
                                   const Tensor& b, const Tensor& grad, const Tensor& out) {
  check_map(op, "x", x);
  check_per_channel(op, "mean", mean, x, x.size(1));
  check_per_channel(op, "a", a, x, x.size(1));
  check_per_channel(op, "b", b, x, x.size(1));
  check_same_shape(op, "grad", grad, x);
  check_same_shape(op, "out", out, x);
}

inline void check_bottleneck(const char* op, TensorList features, const Tensor& scale, const Tensor& shift,
                             const Tensor& weight, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_shift,
                             const Tensor& y) {
  check_features(op, features);
  const Tensor& first = features[0];
  const int64_t channels = count_channels(features);
  check_per_channel(op, "scale", scale, first, channels);
  check_per_channel(op, "shift", shift, first, channels);
  check_weight(op, weight, first, channels);
  const int64_t out_channels = weight.size(0);
  if (bias) check_per_channel(op, "bias", *bias, first, out_channels);
  check_epilogue(op, out_scale, out_shift, first, out_channels);
  check_same_images(op, "y", y, first);
  check_channels(op, "y", y, out_channels, "the weight's rows");
}

inline void check_bottleneck_backward(const char* op, TensorList features, const Tensor& grad_y,
                                      const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                      const Tensor& weight, TensorList grad_features, TensorList correction) {
  check_features(op, features);
  const Tensor& first = features[0];
  const int64_t channels = count_channels(features);
  check_per_channel(op, "scale", scale, first, channels);
  check_per_channel(op, "shift", shift, first, channels);
  check_per_channel(op, "mean", mean, first, channels);
  check_weight(op, weight, first, channels);
  check_same_images(op, "grad_y", grad_y, first);
  check_channels(op, "grad_y", grad_y, weight.size(0), "the weight's rows");
  check_correction(op, correction, grad_y);
  check_grad_features(op, grad_features, features);
}

// A norm's weight or bias in the accumulation type, undefined for None.
inline Tensor norm_parameter(const char* op, const char* name, const std::optional<Tensor>& vector,
                             const Tensor& like) {
  if (!vector) return Tensor();
  Tensor wide = *vector;
  if (wide.scalar_type() != like.scalar_type()) wide = wide.to(like.scalar_type());
  wide = wide.contiguous();
  check_per_channel(op, name, wide, like, like.numel());
  return wide;
}

inline void check_accumulate_correction(const char* op, const Tensor& sum_d, const Tensor& sum_dx,
                                        const Tensor& rstd, const Tensor& scale, const Tensor& a,
                                        const Tensor& b) {
  const int64_t channels = sum_d.numel();
  check_per_channel(op, "sum_d", sum_d, sum_d, channels);
  check_per_channel(op, "sum_dx", sum_dx, sum_d, channels);
  check_per_channel(op, "rstd", rstd, sum_d, channels);
  check_per_channel(op, "scale", scale, sum_d, channels);
  TORCH_CHECK_VALUE(a.is_contiguous() && b.is_contiguous() && a.numel() >= channels && b.numel() == a.numel(),
                    op, ": a and b must be contiguous vectors of at least ", channels,
                    " elements, got shapes ", a.sizes(), " and ", b.sizes());
  for (const auto& [name, tensor] : {std::pair("a", a), std::pair("b", b)}) {
    check_device(op, name, tensor, sum_d.device());
    check_type(op, name, tensor, sum_d.scalar_type(), "the type that sums are kept in");
  }
}

// Which tap of its window the maximum was.
inline void check_where(const char* op, const Tensor& where, const Tensor& grad) {
  check_device(op, "where", where, grad.device());
  check_type(op, "where", where, at::kByte, "taps");
  TORCH_CHECK_VALUE(where.sizes() == grad.sizes(), op, ": where must have grad's shape ", grad.sizes(),
                    ", got ", where.sizes());
}

}  // namespace effdense
