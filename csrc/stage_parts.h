// What both ways of a dense stage share (stage_forward.cpp, stage_backward.cpp): maps and parameters in the
// forms that operators want, scratch memory, PyTorch's convolutions, dropout.
#pragma once

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>

#include "pages.h"
#include "stage.h"
#include "stage_layout.h"

namespace effdense {

// ---- Maps and parameters in the forms that the operators want

// An uninitialised [N, channels, *spatial] with `step` elements from pixel to pixel.
inline Tensor empty_rows(const Tensor& like, int64_t channels, int64_t step) {
  const RowsLayout layout(like, channels, step);
  return at::empty_strided(layout.sizes, layout.strides, like.options());
}

inline Tensor on_large_pages(Tensor x) {
  constexpr int64_t kLarge = 4 << 20;
  if (static_cast<int64_t>(x.nbytes()) >= kLarge) use_large_pages(x);
  return x;
}

// In rows of whole 16 bytes.
inline Tensor empty_buffer(const Tensor& like, int64_t channels) {
  const int64_t unit = std::max<int64_t>(1, 16 / static_cast<int64_t>(like.itemsize()));
  return on_large_pages(empty_rows(like, channels, (channels + unit - 1) / unit * unit));
}

inline Tensor channels_last(const Tensor& x) {
  const Tensor y = x.movedim(1, -1).contiguous().movedim(-1, 1);
  if (y.stride(1) == 1) return y;
  std::vector<int64_t> strides = y.strides().vec();
  strides[1] = 1;
  return y.as_strided(y.sizes(), strides);
}

inline Tensor matrix(const Tensor& conv_weight) {
  const int64_t rows = conv_weight.size(0), columns = conv_weight.size(1);
  const bool is_one = conv_weight.stride(1) == 1 && conv_weight.stride(0) == columns;
  if (conv_weight.numel() == rows * columns && is_one)
    return view_of(conv_weight, {rows, columns}, {columns, 1}, conv_weight.storage_offset());
  return conv_weight.flatten(1).contiguous();
}

// A convolution's bias in the type that sums are kept in.
inline std::optional<Tensor> bias_of(const Tensor& conv_bias, at::ScalarType type) {
  return conv_bias.defined() ? std::optional<Tensor>(conv_bias.to(type).contiguous()) : std::nullopt;
}

inline Tensor sum_per_channel(const Tensor& x) {
  std::vector<int64_t> others{0};
  for (int64_t i = 2; i < x.dim(); ++i) others.push_back(i);
  return x.sum(others);
}

// A gradient in the dtype and shape of its parameter, and a 1x1 convolution's in its strides.
inline Tensor shaped(const Tensor& like, Tensor grad) {
  if (grad.scalar_type() != like.scalar_type()) grad = grad.to(like.scalar_type());
  const bool one_pixel = like.dim() > 2 && like.numel() == like.size(0) * like.size(1);
  if (one_pixel && like.stride(0) == like.size(1) && like.stride(1) == 1) {
    const Tensor rows = grad.flatten(1).contiguous();
    return view_of(rows, like.sizes(), like.strides(), rows.storage_offset());
  }
  return grad.sizes() == like.sizes() ? grad : grad.view(like.sizes());
}

// ---- Scratch memory

// One block, handed out front to back; a layer starts again at the front.
class Scratch {
 public:
  // `block`: bytes, at a cache line's beginning.
  Scratch(const Tensor& block, at::ScalarType type) : block_(block.view(type)) {}
  void start_again() { used_ = 0; }

  // An uninitialised [N, channels, *spatial] in channels-last layout.
  Tensor map(const Tensor& like, int64_t channels) {
    const int64_t first = used_, size = like.size(0) * count_pixels(like) * channels;
    used_ += padded(size * static_cast<int64_t>(like.itemsize()));
    TORCH_CHECK(used_ <= static_cast<int64_t>(block_.nbytes()), "dense_stage: scratch has ", block_.nbytes(),
                " bytes, too few");
    return as_map(block_, first / static_cast<int64_t>(like.itemsize()), like, channels);
  }

 private:
  Tensor block_;
  int64_t used_ = 0;
};

// ---- PyTorch's convolutions: odd kernel sizes, the image's size is kept

struct Convolution {
  Convolution(const Tensor& weight, int64_t dilation) : one_dimension(weight.dim() == 3) {
    for (int64_t i = 2; i < weight.dim(); ++i) padding.push_back(dilation * (weight.size(i) / 2));
    if (one_dimension) padding.insert(padding.begin(), 0);  // as 2D, which knows channels-last
    ones.assign(padding.size(), 1);
    zeros.assign(padding.size(), 0);
    dilations.assign(padding.size(), dilation);
  }
  Tensor form(const Tensor& x) const { return one_dimension ? x.unsqueeze(2) : x; }
  bool one_dimension;
  std::vector<int64_t> padding, ones, zeros, dilations;
};

inline Tensor convolve(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t dilation = 1) {
  const Convolution c(weight, dilation);
  const Tensor y = at::convolution(c.form(x), c.form(weight), given(bias), c.ones, c.padding, c.dilations,
                                   false, c.zeros, 1);
  return c.one_dimension ? y.squeeze(2) : y;
}

inline ThreeTensors convolve_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                      const Tensor& bias, std::array<bool, 3> needs, int64_t dilation = 1) {
  const Convolution c(weight, dilation);
  at::OptionalIntArrayRef bias_sizes;
  if (bias.defined()) bias_sizes = bias.sizes();
  auto [grad_x, grad_weight, grad_bias] =
      at::convolution_backward(c.form(grad), c.form(x), c.form(weight), bias_sizes, c.ones, c.padding,
                               c.dilations, false, c.zeros, 1, needs);
  if (c.one_dimension) {
    if (needs[0]) grad_x = grad_x.squeeze(2);
    if (needs[1]) grad_weight = grad_weight.squeeze(2);
  }
  return {grad_x, grad_weight, grad_bias};
}

// ---- The two ways

// Dropout and its backward, in place: zero where the mask is, the rest scaled up.
inline void drop_(Tensor& x, const Tensor& mask, double keep) {
  if (mask.defined()) x.mul_(mask).mul_(keep > 0 ? 1 / keep : 0.0);
}

// What the backend's kernels count their blocks with, for all calls of a way.
inline Tensor make_counters(const Backend& backend, const Tensor& like) {
  return backend.counters > 0 ? at::zeros({backend.counters}, like.options().dtype(at::kInt)) : Tensor();
}

}  // namespace effdense
