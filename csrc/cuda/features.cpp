// Operators on features, on CUDA: channel_statistics, append_features, apply_correction.
#include "cuda/bindings.h"

namespace effdense {
namespace {

void channel_statistics(StatisticsTo& to, TensorList features) {
  constexpr const char* op = "channel_statistics";
  check_features(op, features);
  TORCH_CHECK(to.then == nullptr || features.size() == 1, op, ": is folded for one feature map only, got ",
              features.size());
  const OnDevice device(features[0]);
  make(to, features[0], count_channels(features));
  if (features[0].numel() == 0) return finish_empty(to);
  EFFDENSE_CUDA_DISPATCH(op, features[0], [&] {
    std::vector<Tensor> kept;
    kernels::StatisticsOut<A> out = statistics_of<A>(to, kept);
    for (const Tensor& feature : features) {
      const ReadableMatrix<T> x(feature);
      const kernels::Size size = size_of(feature);
      const Temporary<A> temporary(kernels::workspace_size<T>(size), to.mean.options(), to.counters);
      kernels::channel_statistics(size, x.matrix, out, temporary.scratch(), device.stream);
      out.mean += size.channels;
      out.var += size.channels;
    }
  });
}

void append_features(StatisticsTo& to, const Tensor& new_features, Tensor& out) {
  constexpr const char* op = "append_features";
  check_append_features(op, new_features, out);
  const OnDevice device(out);
  make(to, out, out.size(1));
  if (out.numel() == 0) return finish_empty(to);
  EFFDENSE_CUDA_DISPATCH(op, out, [&] {
    const ReadableMatrix<T> x(new_features);
    const kernels::Size size = size_of(out);
    const Temporary<A> temporary(kernels::workspace_size<T>(size), to.mean.options(), to.counters);
    std::vector<Tensor> kept;
    kernels::append_features(size, x.matrix, writable_matrix<T>(op, "out", out), statistics_of<A>(to, kept),
                             temporary.scratch(), device.stream);
  });
}

void apply_correction(const Tensor& x, const Tensor& mean, const Tensor& a, const Tensor& b,
                      const Tensor& grad, Tensor& out) {
  constexpr const char* op = "apply_correction";
  check_apply_correction(op, x, mean, a, b, grad, out);
  const OnDevice device(x);
  EFFDENSE_CUDA_DISPATCH(op, x, [&] {
    const ReadableMatrix<T> from(x), g(grad);
    kernels::apply_correction(size_of(x), from.matrix, mean.const_data_ptr<A>(), a.const_data_ptr<A>(),
                              b.const_data_ptr<A>(), g.matrix, writable_matrix<T>(op, "out", out),
                              device.stream);
  });
}

}  // namespace

EFFDENSE_CUDA_LIBRARY(m) {
  EFFDENSE_IMPLEMENT_RETURNING(m, cuda_backend, channel_statistics);
  EFFDENSE_IMPLEMENT_RETURNING(m, cuda_backend, append_features);
  EFFDENSE_IMPLEMENT(m, cuda_backend, apply_correction);
}

}  // namespace effdense
