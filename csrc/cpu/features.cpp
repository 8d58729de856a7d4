// What is done to a list of feature maps as a list: channel_statistics, once when channels are produced, and
// take_gradient, the part of batch normalisation's backward that needs the sums of the whole batch.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/tiles.h"

namespace effdense {
namespace {

// Pixels whose moments are taken at once: small enough for two passes in L1.
constexpr int64_t kRow = 4096;

std::tuple<Tensor, Tensor> channel_statistics(TensorList features) {
  constexpr const char* op = "channel_statistics";
  check_features(op, features);
  const Tensor& first = features[0];
  const auto options = first.options().dtype(accumulate_type(first.scalar_type()));
  const int64_t channels = count_channels(features), images = first.size(0), pixels = count_pixels(first);
  Tensor mean = at::empty({channels}, options), var = at::empty({channels}, options);
  EFFDENSE_DISPATCH(first.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Planes<T> x = Planes<T>::readable(features);
    A* mean_data = mean.mutable_data_ptr<A>();
    A* var_data = var.mutable_data_ptr<A>();
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        Moments total;
        for (int64_t n = 0; n < images; ++n)
          for (int64_t p = 0; p < pixels; p += kRow) {
            const int64_t count = std::min(kRow, pixels - p);
            double row_mean, row_m2;
            loops.moments(count, x[c].row(n) + p, &row_mean, &row_m2);
            total.merge(static_cast<double>(count), row_mean, row_m2);
          }
        mean_data[c] = static_cast<A>(total.mean);
        var_data[c] = static_cast<A>(total.variance());
      }
    });
  });
  return {mean, var};
}

void take_gradient(TensorList features, const Tensor& mean, const Tensor& a, const Tensor& b,
                   TensorList grad_features) {
  constexpr const char* op = "take_gradient";
  check_features(op, features);
  const Tensor& first = features[0];
  const int64_t channels = count_channels(features), images = first.size(0), pixels = count_pixels(first);
  check_per_channel(op, "mean", mean, first, channels);
  check_per_channel(op, "a", a, first, channels);
  check_per_channel(op, "b", b, first, channels);
  check_grad_features(op, grad_features, features);
  EFFDENSE_DISPATCH(first.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Planes<T> x = Planes<T>::readable(features);
    const Planes<T> grad = Planes<T>::writable(op, "grad_features", grad_features, features);
    const A *mean_data = mean.const_data_ptr<A>(), *a_data = a.const_data_ptr<A>(),
            *b_data = b.const_data_ptr<A>();
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        if (grad[c].data == nullptr) continue;
        for (int64_t n = 0; n < images; ++n)
          loops.take_gradient(pixels, x[c].row(n), mean_data[c], a_data[c], b_data[c], grad[c].row(n));
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(effdense, CPU, m) {
  m.impl("channel_statistics", channel_statistics);
  m.impl("take_gradient", take_gradient);
}

}  // namespace effdense
