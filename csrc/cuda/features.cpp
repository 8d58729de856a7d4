// What is done to features as such, on CUDA: channel_statistics, append_features, take_gradient.
#include <ATen/ops/empty_like.h>

#include "cuda/bindings.h"

namespace effdense {
namespace {

// mean and variance of `channels` channels; 0 and 1 where `like` has no values.
std::tuple<Tensor, Tensor> empty_statistics(const Tensor& like, int64_t channels) {
  const auto options = like.options().dtype(accumulate_type(like.scalar_type()));
  Tensor mean = at::empty({channels}, options), var = at::empty({channels}, options);
  if (like.numel() == 0) {
    mean.zero_();
    var.fill_(1);
  }
  return {mean, var};
}

std::tuple<Tensor, Tensor> channel_statistics(TensorList features) {
  constexpr const char* op = "channel_statistics";
  check_features(op, features);
  const OnDevice device(features[0]);
  auto [mean, var] = empty_statistics(features[0], count_channels(features));
  EFFDENSE_CUDA_DISPATCH(op, features[0], [&, &mean = mean, &var = var] {
    A *mean_data = mean.mutable_data_ptr<A>(), *var_data = var.mutable_data_ptr<A>();
    for (const Tensor& feature : features) {
      const ReadableMatrix<T> x(feature);
      const kernels::Size size = size_of(feature);
      const Tensor workspace = at::empty({kernels::workspace_size<T>(size)}, mean.options());
      kernels::channel_statistics(size, x.matrix, mean_data, var_data, workspace.mutable_data_ptr<A>(),
                                  device.stream);
      mean_data += size.channels;
      var_data += size.channels;
    }
  });
  return {mean, var};
}

std::tuple<Tensor, Tensor> append_features(const Tensor& new_features, Tensor& out) {
  constexpr const char* op = "append_features";
  check_append_features(op, new_features, out);
  const OnDevice device(out);
  auto [mean, var] = empty_statistics(out, out.size(1));
  EFFDENSE_CUDA_DISPATCH(op, out, [&, &mean = mean, &var = var] {
    const ReadableMatrix<T> x(new_features);
    const kernels::Size size = size_of(out);
    const Tensor workspace = at::empty({kernels::workspace_size<T>(size)}, mean.options());
    kernels::append_features(size, x.matrix, writable_matrix<T>(op, "out", out), mean.mutable_data_ptr<A>(),
                             var.mutable_data_ptr<A>(), workspace.mutable_data_ptr<A>(), device.stream);
  });
  return {mean, var};
}

void take_gradient(const Tensor& x, const Tensor& mean, const Tensor& a, const Tensor& b, const Tensor& grad,
                   Tensor& out) {
  constexpr const char* op = "take_gradient";
  check_take_gradient(op, x, mean, a, b, grad, out);
  const OnDevice device(x);
  EFFDENSE_CUDA_DISPATCH(op, x, [&] {
    const ReadableMatrix<T> from(x), g(grad);
    kernels::take_gradient(size_of(x), from.matrix, mean.const_data_ptr<A>(), a.const_data_ptr<A>(),
                           b.const_data_ptr<A>(), g.matrix, writable_matrix<T>(op, "out", out),
                           device.stream);
  });
}

}  // namespace

EFFDENSE_CUDA_LIBRARY(m) {
  EFFDENSE_IMPLEMENT(m, cuda_backend, channel_statistics);
  EFFDENSE_IMPLEMENT(m, cuda_backend, append_features);
  EFFDENSE_IMPLEMENT(m, cuda_backend, take_gradient);
}

}  // namespace effdense
