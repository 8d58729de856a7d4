// Batch normalisation on CUDA: fold and defer, bn_relu and its two backwards.
#include <ATen/ops/empty_like.h>

#include "cuda/bindings.h"

namespace effdense {
namespace {

std::tuple<Tensor, Tensor, Tensor> fold(const Tensor& mean, const Tensor& var,
                                        const std::optional<Tensor>& weight,
                                        const std::optional<Tensor>& bias, double eps) {
  constexpr const char* op = "fold";
  check_per_channel(op, "mean", mean, mean, mean.numel());
  check_per_channel(op, "var", var, mean, mean.numel());
  const OnDevice device(mean);
  const Tensor w = norm_parameter(op, "weight", weight, mean), b = norm_parameter(op, "bias", bias, mean);
  Tensor rstd = at::empty_like(mean), scale = at::empty_like(mean), shift = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), op, [&] {
    kernels::fold(mean.numel(), mean.const_data_ptr<scalar_t>(), var.const_data_ptr<scalar_t>(),
                  w.defined() ? w.const_data_ptr<scalar_t>() : nullptr,
                  b.defined() ? b.const_data_ptr<scalar_t>() : nullptr, static_cast<scalar_t>(eps),
                  rstd.mutable_data_ptr<scalar_t>(), scale.mutable_data_ptr<scalar_t>(),
                  shift.mutable_data_ptr<scalar_t>(), device.stream);
  });
  return {rstd, scale, shift};
}

void defer(const Tensor& sum_d, const Tensor& sum_dx, const Tensor& rstd, const Tensor& scale, int64_t count,
           Tensor& a, Tensor& b) {
  constexpr const char* op = "defer";
  check_defer(op, sum_d, sum_dx, rstd, scale, a, b);
  const OnDevice device(sum_d);
  AT_DISPATCH_FLOATING_TYPES(sum_d.scalar_type(), op, [&] {
    kernels::defer(sum_d.numel(), sum_d.const_data_ptr<scalar_t>(), sum_dx.const_data_ptr<scalar_t>(),
                   rstd.const_data_ptr<scalar_t>(), scale.const_data_ptr<scalar_t>(), count,
                   a.mutable_data_ptr<scalar_t>(), b.mutable_data_ptr<scalar_t>(), device.stream);
  });
}

void bn_relu(const Tensor& x, const Tensor& scale, const Tensor& shift, Tensor& out) {
  constexpr const char* op = "bn_relu";
  check_norm(op, x, scale, shift);
  check_same_shape(op, "out", out, x);
  const OnDevice device(x);
  EFFDENSE_CUDA_DISPATCH(op, x, [&] {
    const ReadableMatrix<T> from(x);
    kernels::bn_relu(size_of(x), from.matrix, norm_of<A>(scale, shift), writable_matrix<T>(op, "out", out),
                     device.stream);
  });
}

std::tuple<Tensor, Tensor> bn_relu_with_sums(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                             const Tensor& shift, const Tensor& mean, Tensor& out) {
  constexpr const char* op = "bn_relu_with_sums";
  check_norm(op, x, scale, shift, &mean);
  check_same_shape(op, "grad", grad, x);
  check_same_shape(op, "out", out, x);
  const OnDevice device(x);
  const Sums sums(x, scale);
  EFFDENSE_CUDA_DISPATCH(op, x, [&] {
    const ReadableMatrix<T> from(x), dz(grad);
    const Tensor workspace = at::empty({kernels::workspace_size<T>(size_of(x))}, scale.options());
    kernels::bn_relu_with_sums(size_of(x), dz.matrix, from.matrix, norm_of<A>(scale, shift, &mean),
                               writable_matrix<T>(op, "out", out), sums.d.mutable_data_ptr<A>(),
                               sums.dx.mutable_data_ptr<A>(), workspace.mutable_data_ptr<A>(), device.stream);
  });
  return {sums.d, sums.dx};
}

std::tuple<Tensor, Tensor> bn_relu_backward(Tensor& grad, const Tensor& x, const Tensor& scale,
                                            const Tensor& shift, const Tensor& mean, const Tensor& rstd,
                                            bool batch_statistics) {
  constexpr const char* op = "bn_relu_backward";
  check_norm(op, x, scale, shift, &mean);
  check_per_channel(op, "rstd", rstd, x, x.size(1));
  check_same_shape(op, "grad", grad, x);
  const OnDevice device(x);
  const Sums sums(x, scale);
  EFFDENSE_CUDA_DISPATCH(op, x, [&] {
    const ReadableMatrix<T> from(x);
    const Tensor workspace = at::empty({kernels::workspace_size<T>(size_of(x))}, scale.options());
    kernels::bn_relu_backward(size_of(x), writable_matrix<T>(op, "grad", grad), from.matrix,
                              norm_of<A>(scale, shift, &mean, &rstd), batch_statistics,
                              sums.d.mutable_data_ptr<A>(), sums.dx.mutable_data_ptr<A>(),
                              workspace.mutable_data_ptr<A>(), device.stream);
  });
  return {sums.d, sums.dx};
}

std::tuple<Tensor, Tensor> bn_relu_accumulate(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                              const Tensor& shift, const Tensor& mean, Tensor& grad_x) {
  constexpr const char* op = "bn_relu_accumulate";
  check_norm(op, x, scale, shift, &mean);
  check_same_shape(op, "grad", grad, x);
  check_same_shape(op, "grad_x", grad_x, x);
  const OnDevice device(x);
  const Sums sums(x, scale);
  EFFDENSE_CUDA_DISPATCH(op, x, [&] {
    const ReadableMatrix<T> from(x), dz(grad);
    const Tensor workspace = at::empty({kernels::workspace_size<T>(size_of(x))}, scale.options());
    kernels::bn_relu_accumulate(size_of(x), dz.matrix, from.matrix, norm_of<A>(scale, shift, &mean),
                                writable_matrix<T>(op, "grad_x", grad_x), sums.d.mutable_data_ptr<A>(),
                                sums.dx.mutable_data_ptr<A>(), workspace.mutable_data_ptr<A>(),
                                device.stream);
  });
  return {sums.d, sums.dx};
}

}  // namespace

EFFDENSE_CUDA_LIBRARY(m) {
  EFFDENSE_IMPLEMENT(m, cuda_backend, fold);
  EFFDENSE_IMPLEMENT(m, cuda_backend, defer);
  EFFDENSE_IMPLEMENT(m, cuda_backend, bn_relu);
  EFFDENSE_IMPLEMENT(m, cuda_backend, bn_relu_with_sums);
  EFFDENSE_IMPLEMENT(m, cuda_backend, bn_relu_backward);
  EFFDENSE_IMPLEMENT(m, cuda_backend, bn_relu_accumulate);
}

}  // namespace effdense
