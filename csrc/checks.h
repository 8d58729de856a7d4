// Argument checks shared by every backend. A message says which operator, which argument, what was expected
// and what came. A wrong type raises TypeError, a wrong value ValueError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string>

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

inline void check_features(const char* op, TensorList features) {
  TORCH_CHECK_VALUE(!features.empty(), op, ": features must hold at least one tensor, got an empty list");
  for (size_t i = 0; i < features.size(); ++i) {
    const std::string name = "features[" + std::to_string(i) + "]";
    TORCH_CHECK_VALUE(features[i].dim() >= 2, op, ": ", name, " must be [N, C, *spatial], got shape ",
                      features[i].sizes());
    TORCH_CHECK_VALUE(features[i].size(1) > 0, op, ": ", name, " must have at least one channel, got shape ",
                      features[i].sizes());
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

}  // namespace effdense
