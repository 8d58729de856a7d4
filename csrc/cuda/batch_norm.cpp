// Batch normalisation on CUDA: fold and accumulate_correction for one number per channel, bn_relu, and its
// backward in three forms (bn_relu_backward_sums, bn_relu_backward, bn_relu_backward_accumulate).
#include "cuda/bindings.h"

namespace effdense {
namespace {

void fold_all(at::ArrayRef<FoldOf> norms) {
  if (norms.empty()) return;
  const Tensor& like = norms[0].mean;
  const OnDevice device(like);
  AT_DISPATCH_FLOATING_TYPES(like.scalar_type(), "fold", [&] {
    std::vector<Tensor> kept;
    std::vector<kernels::Fold<scalar_t>> folds;
    for (const FoldOf& norm : norms) folds.push_back(fold_of<scalar_t>(norm, kept));
    kernels::fold(folds.data(), static_cast<int64_t>(folds.size()), device.stream);
  });
}

std::tuple<Tensor, Tensor, Tensor> fold(const Tensor& mean, const Tensor& var,
                                        const std::optional<Tensor>& weight,
                                        const std::optional<Tensor>& bias, double eps) {
  constexpr const char* op = "fold";
  check_per_channel(op, "mean", mean, mean, mean.numel());
  check_per_channel(op, "var", var, mean, mean.numel());
  const FoldOf norm{mean,
                    var,
                    weight.value_or(Tensor()),
                    bias.value_or(Tensor()),
                    eps,
                    at::empty_like(mean),
                    at::empty_like(mean),
                    at::empty_like(mean)};
  fold_all(norm);
  return {norm.rstd, norm.scale, norm.shift};
}

void accumulate_correction(const Tensor& sum_d, const Tensor& sum_dx, const Tensor& rstd, const Tensor& scale,
                           int64_t count, Tensor& a, Tensor& b) {
  constexpr const char* op = "accumulate_correction";
  check_accumulate_correction(op, sum_d, sum_dx, rstd, scale, a, b);
  const OnDevice device(sum_d);
  AT_DISPATCH_FLOATING_TYPES(sum_d.scalar_type(), op, [&] {
    kernels::accumulate_correction(sum_d.numel(), sum_d.const_data_ptr<scalar_t>(),
                                   sum_dx.const_data_ptr<scalar_t>(), rstd.const_data_ptr<scalar_t>(),
                                   scale.const_data_ptr<scalar_t>(), count, a.mutable_data_ptr<scalar_t>(),
                                   b.mutable_data_ptr<scalar_t>(), device.stream);
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

void bn_relu_backward_sums(SumsTo& to, const Tensor& grad, const Tensor& x, const Tensor& scale,
                           const Tensor& shift, const Tensor& mean, Tensor& out) {
  constexpr const char* op = "bn_relu_backward_sums";
  check_norm(op, x, scale, shift, &mean);
  check_same_shape(op, "grad", grad, x);
  check_same_shape(op, "out", out, x);
  const OnDevice device(x);
  make(to, scale, x.size(1), x.numel() == 0);
  EFFDENSE_CUDA_DISPATCH(op, x, [&] {
    const ReadableMatrix<T> from(x), dz(grad);
    const Temporary<A> temporary(kernels::workspace_size<T>(size_of(x)), scale.options(), to.counters);
    kernels::bn_relu_backward_sums(size_of(x), dz.matrix, from.matrix, norm_of<A>(scale, shift, &mean),
                                   writable_matrix<T>(op, "out", out), sums_of<A>(to), temporary.scratch(),
                                   device.stream);
  });
}

void bn_relu_backward(SumsTo& to, Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                      const Tensor& mean, const Tensor& rstd, bool batch_statistics) {
  constexpr const char* op = "bn_relu_backward";
  check_norm(op, x, scale, shift, &mean);
  check_per_channel(op, "rstd", rstd, x, x.size(1));
  check_same_shape(op, "grad", grad, x);
  const OnDevice device(x);
  make(to, scale, x.size(1), x.numel() == 0);
  EFFDENSE_CUDA_DISPATCH(op, x, [&] {
    const ReadableMatrix<T> from(x);
    const Temporary<A> temporary(kernels::workspace_size<T>(size_of(x)), scale.options(), to.counters);
    kernels::bn_relu_backward(size_of(x), writable_matrix<T>(op, "grad", grad), from.matrix,
                              norm_of<A>(scale, shift, &mean, &rstd), batch_statistics, sums_of<A>(to),
                              temporary.scratch(), device.stream);
  });
}

void bn_relu_backward_accumulate(SumsTo& to, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                 const Tensor& shift, const Tensor& mean, Tensor& grad_x) {
  constexpr const char* op = "bn_relu_backward_accumulate";
  check_norm(op, x, scale, shift, &mean);
  check_same_shape(op, "grad", grad, x);
  check_same_shape(op, "grad_x", grad_x, x);
  const OnDevice device(x);
  make(to, scale, x.size(1), x.numel() == 0);
  EFFDENSE_CUDA_DISPATCH(op, x, [&] {
    const ReadableMatrix<T> from(x), dz(grad);
    const Temporary<A> temporary(kernels::workspace_size<T>(size_of(x)), scale.options(), to.counters);
    kernels::bn_relu_backward_accumulate(size_of(x), dz.matrix, from.matrix, norm_of<A>(scale, shift, &mean),
                                         writable_matrix<T>(op, "grad_x", grad_x), sums_of<A>(to),
                                         temporary.scratch(), device.stream);
  });
}

}  // namespace

EFFDENSE_CUDA_LIBRARY(m) {
  m.impl("fold", fold);
  cuda_backend.fold = fold_all;
  cuda_backend.counters = kernels::kCounters;
  m.impl("accumulate_correction", accumulate_correction);
  EFFDENSE_IMPLEMENT(m, cuda_backend, bn_relu);
  EFFDENSE_IMPLEMENT_RETURNING(m, cuda_backend, bn_relu_backward_sums);
  EFFDENSE_IMPLEMENT_RETURNING(m, cuda_backend, bn_relu_backward);
  EFFDENSE_IMPLEMENT_RETURNING(m, cuda_backend, bn_relu_backward_accumulate);
}

}  // namespace effdense
