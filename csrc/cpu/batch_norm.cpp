// bn_relu: z = relu(scale * x + shift) of one feature map, and its backward through ReLU and batch
// normalisation.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/tiles.h"

namespace effdense {
namespace {

void bn_relu(const Tensor& x, const Tensor& scale, const Tensor& shift, Tensor& out) {
  constexpr const char* op = "bn_relu";
  check_features(op, x);
  check_per_channel(op, "scale", scale, x, x.size(1));
  check_per_channel(op, "shift", shift, x, x.size(1));
  check_same_shape(op, "out", out, x);
  const int64_t channels = x.size(1), pixels = count_pixels(x);
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Planes<T> in = Planes<T>::readable(x);
    const Planes<T> z = Planes<T>::writable(op, "out", {out}, {x});
    const A *scale_data = scale.const_data_ptr<A>(), *shift_data = shift.const_data_ptr<A>();
    at::parallel_for(0, x.size(0) * channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / channels, c = i % channels;
        loops.bn_relu_store(pixels, in[c].row(n), scale_data[c], shift_data[c], z[c].row(n));
      }
    });
  });
}

// With statistics of the batch (`batch_statistics`), the sums of the whole batch enter every pixel's
// gradient: grad = scale * d - a - b * (x - mean), a = scale * sum d / M, b = scale * rstd^2 * sum d (x -
// mean) / M. One thread does both passes over a channel, so that the second finds it in cache.
std::tuple<Tensor, Tensor> bn_relu_backward(Tensor& grad, const Tensor& x, const Tensor& scale,
                                            const Tensor& shift, const Tensor& mean, const Tensor& rstd,
                                            bool batch_statistics) {
  constexpr const char* op = "bn_relu_backward";
  check_features(op, x);
  const int64_t channels = x.size(1), images = x.size(0), pixels = count_pixels(x);
  check_per_channel(op, "scale", scale, x, channels);
  check_per_channel(op, "shift", shift, x, channels);
  check_per_channel(op, "mean", mean, x, channels);
  check_per_channel(op, "rstd", rstd, x, channels);
  check_same_shape(op, "grad", grad, x);
  Tensor sum_d = at::empty({channels}, scale.options()), sum_dx = at::empty({channels}, scale.options());
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Planes<T> in = Planes<T>::readable(x);
    const Planes<T> dz = Planes<T>::writable(op, "grad", {grad}, {x});
    const A *scale_data = scale.const_data_ptr<A>(), *shift_data = shift.const_data_ptr<A>();
    const A *mean_data = mean.const_data_ptr<A>(), *rstd_data = rstd.const_data_ptr<A>();
    A *sum_d_data = sum_d.mutable_data_ptr<A>(), *sum_dx_data = sum_dx.mutable_data_ptr<A>();
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        double d = 0, dx = 0;
        for (int64_t n = 0; n < images; ++n) {
          A sums[2];
          loops.bn_relu_backward_sums(pixels, in[c].row(n), scale_data[c], shift_data[c], mean_data[c],
                                      dz[c].row(n), sums);
          d += sums[0];
          dx += sums[1];
        }
        sum_d_data[c] = static_cast<A>(d);
        sum_dx_data[c] = static_cast<A>(dx);
        const double over = batch_statistics ? scale_data[c] / static_cast<double>(images * pixels) : 0.0;
        const A a = static_cast<A>(over * d);
        const A b = static_cast<A>(over * dx * rstd_data[c] * rstd_data[c]);
        for (int64_t n = 0; n < images; ++n)
          loops.bn_relu_backward(pixels, in[c].row(n), scale_data[c], shift_data[c], mean_data[c], a, b,
                                 dz[c].row(n));
      }
    });
  });
  return {sum_d, sum_dx};
}

}  // namespace

TORCH_LIBRARY_IMPL(effdense, CPU, m) {
  m.impl("bn_relu", bn_relu);
  m.impl("bn_relu_backward", bn_relu_backward);
}

}  // namespace effdense
