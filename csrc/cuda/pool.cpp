// Pooling of relu(scale * x + shift) on CUDA: the average pool and its backward, the max pool and its own.
#include "cuda/bindings.h"
#include "windows.h"

namespace effdense {
namespace {

kernels::Windows windows_of(const char* op, const Tensor& x, const Windows& windows) {
  int64_t pixels = 1;
  for (int axis = 0; axis < 3; ++axis) {
    pixels *= std::max(windows.in[axis] + 2 * windows.padding[axis], windows.stride[axis]);
    TORCH_CHECK_VALUE(pixels < int64_t{1} << 31, op,
                      ": an image must have fewer than 2^31 pixels on CUDA, got shape ", x.sizes());
  }
  kernels::Windows all{x.size(0), x.size(1), {}, {}, {}, {}, {}};
  const auto copy = [](const Size3& from, int (&to)[3]) {
    for (int axis = 0; axis < 3; ++axis) to[axis] = static_cast<int>(from[axis]);
  };
  copy(windows.in, all.in);
  copy(windows.kernel, all.kernel);
  copy(windows.stride, all.stride);
  copy(windows.padding, all.padding);
  copy(windows.out, all.out);
  return all;
}

Tensor bn_relu_avg_pool(const Tensor& x, const Tensor& scale, const Tensor& shift,
                        at::IntArrayRef kernel_size) {
  constexpr const char* op = "bn_relu_avg_pool";
  check_norm(op, x, scale, shift);
  const Windows windows = average_windows(op, x, kernel_size);
  const OnDevice device(x);
  Tensor out = channels_last_empty(x, windows.out, x.scalar_type());
  EFFDENSE_CUDA_DISPATCH(op, x, [&] {
    const ReadableMatrix<T> from(x);
    kernels::bn_relu_avg_pool(windows_of(op, x, windows), from.matrix, norm_of<A>(scale, shift),
                              writable_matrix<T>(op, "out", out), device.stream);
  });
  return out;
}

void bn_relu_avg_pool_backward(SumsTo& to, const Tensor& grad, const Tensor& x, const Tensor& scale,
                               const Tensor& shift, const Tensor& mean, at::IntArrayRef kernel_size,
                               Tensor& grad_x) {
  constexpr const char* op = "bn_relu_avg_pool_backward";
  check_norm(op, x, scale, shift, &mean);
  const Windows windows = average_windows(op, x, kernel_size);
  check_same_shape(op, "grad_x", grad_x, x);
  check_pooled(op, "grad", grad, x, at::IntArrayRef(windows.out).slice(5 - x.dim()));
  const OnDevice device(x);
  make(to, scale, x.size(1), x.numel() == 0);
  EFFDENSE_CUDA_DISPATCH(op, x, [&] {
    const ReadableMatrix<T> from(x), g(grad);
    const kernels::Windows all = windows_of(op, x, windows);
    const Tensor partial = at::empty({kernels::avg_pool_workspace_size<T>(all)}, scale.options());
    kernels::bn_relu_avg_pool_backward(all, g.matrix, from.matrix, norm_of<A>(scale, shift, &mean),
                                       writable_matrix<T>(op, "grad_x", grad_x), sums_of<A>(to),
                                       {partial.mutable_data_ptr<A>(), nullptr}, device.stream);
  });
}

std::tuple<Tensor, Tensor> bn_relu_max_pool(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                            at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                            at::IntArrayRef padding) {
  constexpr const char* op = "bn_relu_max_pool";
  check_norm(op, x, scale, shift);
  const Windows windows = maximum_windows(op, x, kernel_size, stride, padding);
  const OnDevice device(x);
  Tensor out = channels_last_empty(x, windows.out, x.scalar_type());
  Tensor where = channels_last_empty(x, windows.out, at::kByte);
  EFFDENSE_CUDA_DISPATCH(op, x, [&] {
    const ReadableMatrix<T> from(x);
    kernels::bn_relu_max_pool(windows_of(op, x, windows), from.matrix, norm_of<A>(scale, shift),
                              writable_matrix<T>(op, "out", out),
                              writable_matrix<uint8_t>(op, "where", where), device.stream);
  });
  return {out, where};
}

void max_pool_backward(const Tensor& grad, const Tensor& where, at::IntArrayRef kernel_size,
                       at::IntArrayRef stride, at::IntArrayRef padding, Tensor& grad_z) {
  constexpr const char* op = "max_pool_backward";
  const Windows windows = check_max_pool_backward(op, grad, where, kernel_size, stride, padding, grad_z);
  const OnDevice device(grad_z);
  EFFDENSE_CUDA_DISPATCH(op, grad_z, [&] {
    const ReadableMatrix<T> g(grad);
    const ReadableMatrix<uint8_t> taps(where);
    kernels::max_pool_backward(windows_of(op, grad_z, windows), g.matrix, taps.matrix,
                               writable_matrix<T>(op, "grad_z", grad_z), device.stream);
  });
}

}  // namespace

EFFDENSE_CUDA_LIBRARY(m) {
  EFFDENSE_IMPLEMENT(m, cuda_backend, bn_relu_avg_pool);
  EFFDENSE_IMPLEMENT_RETURNING(m, cuda_backend, bn_relu_avg_pool_backward);
  m.impl("bn_relu_max_pool", bn_relu_max_pool);
  m.impl("max_pool_backward", max_pool_backward);
}

}  // namespace effdense
