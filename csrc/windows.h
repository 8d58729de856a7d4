// The windows of pools, for every backend: shapes checked, one to three spatial dimensions as three.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <vector>

#include "checks.h"

namespace effdense {

using Size3 = std::array<int64_t, 3>;

// One to three spatial sizes as three, the missing ones in front.
inline Size3 three(at::IntArrayRef sizes, int64_t missing) {
  Size3 all{missing, missing, missing};
  std::copy(sizes.begin(), sizes.end(), all.end() - static_cast<int64_t>(sizes.size()));
  return all;
}

inline Size3 spatial(const Tensor& x) { return three(x.sizes().slice(2), 1); }

inline int64_t product(const Size3& size) { return size[0] * size[1] * size[2]; }

inline Tensor channels_last_empty(const Tensor& like, const Size3& size, at::ScalarType type) {
  std::vector<int64_t> sizes{like.size(0)};
  sizes.insert(sizes.end(), size.end() - (like.dim() - 2), size.end());
  sizes.push_back(like.size(1));
  return at::empty(sizes, like.options().dtype(type)).movedim(-1, 1);
}

struct Windows {
  Size3 in, kernel, stride, padding, out;
};

// Windows side by side; what is left over at the end of a dimension is in none.
inline Windows average_windows(const char* op, const Tensor& x, at::IntArrayRef kernel_size) {
  check_kernel(op, "kernel_size", kernel_size, x, 1);
  const Size3 in = spatial(x), k = three(kernel_size, 1);
  for (int i = 0; i < 3; ++i)
    TORCH_CHECK_VALUE(k[i] <= in[i], op, ": kernel_size must fit into the image of shape ", x.sizes(),
                      ", got ", kernel_size);
  return {in, k, k, {0, 0, 0}, {in[0] / k[0], in[1] / k[1], in[2] / k[2]}};
}

// As in torch.nn.MaxPool without dilation and ceil_mode.
inline Windows maximum_windows(const char* op, const Tensor& x, at::IntArrayRef kernel_size,
                               at::IntArrayRef stride, at::IntArrayRef padding) {
  check_kernel(op, "kernel_size", kernel_size, x, 1);
  check_kernel(op, "stride", stride, x, 1);
  check_kernel(op, "padding", padding, x, 0);
  Windows windows{spatial(x), three(kernel_size, 1), three(stride, 1), three(padding, 0), {}};
  int64_t taps = 1;
  for (int i = 0; i < 3; ++i) {
    const int64_t size = windows.in[i] + 2 * windows.padding[i];
    TORCH_CHECK_VALUE(
        windows.in[i] > 0 && 2 * windows.padding[i] <= windows.kernel[i] && windows.kernel[i] <= size, op,
        ": kernel_size must be at least twice the padding and fit into the padded image, got ", kernel_size,
        " with padding ", padding, " for shape ", x.sizes());
    windows.out[i] = (size - windows.kernel[i]) / windows.stride[i] + 1;
    taps *= windows.kernel[i];
  }
  TORCH_CHECK_VALUE(taps <= 256, op,
                    ": kernel_size must have at most 256 taps (they are kept in a byte), got ", kernel_size);
  return windows;
}

}  // namespace effdense
