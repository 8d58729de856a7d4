// Feature maps as matrices of pixels by channels, for every backend.
//
// Channels-last is the layout of everything effdense makes itself: a map [N, C, *spatial] is then a matrix
// [N * pixels, C] with some step from pixel to pixel, and the prefix of a block's feature buffer is such a
// matrix too.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace effdense {

using at::Tensor;

inline int64_t count_pixels(const Tensor& x) {
  int64_t pixels = 1;
  for (int64_t i = 2; i < x.dim(); ++i) pixels *= x.size(i);
  return pixels;
}

// The step from pixel to pixel, where all pixels of an image are equally far apart (1 where there is only
// one).
inline std::optional<int64_t> pixel_step(const Tensor& x) {
  std::optional<int64_t> step;
  int64_t pixels = 1;
  for (int64_t i = x.dim() - 1; i >= 2; --i) {
    if (x.size(i) == 1) continue;
    if (!step) step = x.stride(i) / pixels;
    if (x.stride(i) != *step * pixels) return std::nullopt;
    pixels *= x.size(i);
  }
  return step.value_or(1);
}

// The step from row to row of x as a matrix [N * pixels, C], channels side by side; nothing where it is none.
inline std::optional<int64_t> matrix_step(const Tensor& x) {
  if (x.numel() == 0) return x.size(1);
  const std::optional<int64_t> step = pixel_step(x);
  const int64_t pixels = count_pixels(x);
  if (!step || (x.size(1) != 1 && x.stride(1) != 1)) return std::nullopt;
  if (pixels == 1) return x.size(0) == 1 ? x.size(1) : x.stride(0);
  if (x.size(0) != 1 && x.stride(0) != *step * pixels) return std::nullopt;
  return step;
}

inline Tensor channels_last_copy(const Tensor& x) { return x.movedim(1, -1).contiguous().movedim(-1, 1); }

// The step of a map that is written in place as a matrix: no copy can stand in for it.
inline int64_t writable_step(const char* op, const char* name, const Tensor& x) {
  const std::optional<int64_t> step = matrix_step(x);
  TORCH_CHECK_VALUE(step.has_value(), op, ": ", name, " must be channels-last (written in place), got shape ",
                    x.sizes(), " with strides ", x.strides());
  TORCH_CHECK_VALUE(*step >= x.size(1) || x.size(0) * count_pixels(x) <= 1, op, ": ", name,
                    " must not overlap itself (written in place), got shape ", x.sizes(), " with strides ",
                    x.strides());
  return *step;
}

}  // namespace effdense
