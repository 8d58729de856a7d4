// bn_relu, z = relu(scale * x + shift) of one feature map, and its backward in three forms.
// bn_relu_backward_sums makes z again and takes the sums, bn_relu_backward finishes the gradient through
// batch normalisation at once, and bn_relu_backward_accumulate adds the part that needs no sums of the batch
// to a block's gradient buffer.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/features.h"
#include "cpu/moments.h"
#include "cpu/results.h"
#include "cpu/tiling.h"

namespace effdense {
namespace {

void bn_relu(const Tensor& x, const Tensor& scale, const Tensor& shift, Tensor& out) {
  constexpr const char* op = "bn_relu";
  check_norm(op, x, scale, shift);
  check_same_shape(op, "out", out, x);
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Readable<T> from(x);
    const Block<T> to = writable<T>(op, "out", out);
    Tiling(x.size(0) * count_pixels(x), kRows).for_each([&](int64_t, Tile tile) {
      loops.bn_relu_store(tile.rows(), x.size(1), from_row(from.block, tile.first), scale.const_data_ptr<A>(),
                          shift.const_data_ptr<A>(), from_row(to, tile.first));
    });
  });
}

std::tuple<Tensor, Tensor> bn_relu_backward_sums(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                 const Tensor& shift, const Tensor& mean, Tensor& out) {
  constexpr const char* op = "bn_relu_backward_sums";
  check_norm(op, x, scale, shift, &mean);
  const int64_t channels = x.size(1);
  check_same_shape(op, "grad", grad, x);
  check_same_shape(op, "out", out, x);
  Tensor sum_d = at::empty({channels}, scale.options()), sum_dx = at::empty({channels}, scale.options());
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Readable<T> from(x), dz(grad);
    const Block<T> to = writable<T>(op, "out", out);
    const A *scale_data = scale.const_data_ptr<A>(), *shift_data = shift.const_data_ptr<A>();
    const Tiling tiles(x.size(0) * count_pixels(x), kRows);
    Sums sums(tiles.slots(), channels);
    tiles.for_each([&](int64_t slot, Tile tile) {
      const Block<const T> tile_x = from_row(from.block, tile.first);
      loops.bn_relu_backward_sums(tile.rows(), channels, tile_x, scale_data, shift_data,
                                  mean.const_data_ptr<A>(), from_row(dz.block, tile.first), sums.d(slot),
                                  sums.dx(slot));
      loops.bn_relu_store(tile.rows(), channels, tile_x, scale_data, shift_data, from_row(to, tile.first));
    });
    sums.template write<A>(sum_d, sum_dx);
  });
  return {sum_d, sum_dx};
}

// With statistics of the batch (`batch_statistics`), the sums of the whole batch enter every pixel's
// gradient: grad = scale * d - a - b * (x - mean), a = scale * sum d / M, b = scale * rstd^2 * sum d (x -
// mean) / M.
std::tuple<Tensor, Tensor> bn_relu_backward(Tensor& grad, const Tensor& x, const Tensor& scale,
                                            const Tensor& shift, const Tensor& mean, const Tensor& rstd,
                                            bool batch_statistics) {
  constexpr const char* op = "bn_relu_backward";
  check_norm(op, x, scale, shift, &mean);
  const int64_t channels = x.size(1), count = x.size(0) * count_pixels(x);
  check_per_channel(op, "rstd", rstd, x, channels);
  check_same_shape(op, "grad", grad, x);
  Tensor sum_d = at::empty({channels}, scale.options()), sum_dx = at::empty({channels}, scale.options());
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Readable<T> from(x);
    const Block<T> dz = writable<T>(op, "grad", grad);
    const A *scale_data = scale.const_data_ptr<A>(), *shift_data = shift.const_data_ptr<A>(),
            *mean_data = mean.const_data_ptr<A>(), *rstd_data = rstd.const_data_ptr<A>();
    const Tiling tiles(count, kRows);
    Sums sums(tiles.slots(), channels);
    tiles.for_each([&](int64_t slot, Tile tile) {
      loops.bn_relu_backward_sums(tile.rows(), channels, from_row(from.block, tile.first), scale_data,
                                  shift_data, mean_data, constant(from_row(dz, tile.first)), sums.d(slot),
                                  sums.dx(slot));
    });
    sums.template write<A>(sum_d, sum_dx);
    std::vector<A> a(channels), b(channels);
    for (int64_t c = 0; batch_statistics && c < channels; ++c) {
      const double over = scale_data[c] / static_cast<double>(std::max<int64_t>(count, 1));
      a[c] = static_cast<A>(over * sums.d(0)[c]);
      b[c] = static_cast<A>(over * sums.dx(0)[c] * rstd_data[c] * rstd_data[c]);
    }
    tiles.for_each([&](int64_t, Tile tile) {
      loops.bn_relu_backward(tile.rows(), channels, from_row(from.block, tile.first), scale_data, shift_data,
                             mean_data, a.data(), b.data(), from_row(dz, tile.first));
    });
  });
  return {sum_d, sum_dx};
}

std::tuple<Tensor, Tensor> bn_relu_backward_accumulate(const Tensor& grad, const Tensor& x,
                                                       const Tensor& scale, const Tensor& shift,
                                                       const Tensor& mean, Tensor& grad_x) {
  constexpr const char* op = "bn_relu_backward_accumulate";
  check_norm(op, x, scale, shift, &mean);
  const int64_t channels = x.size(1);
  check_same_shape(op, "grad", grad, x);
  check_same_shape(op, "grad_x", grad_x, x);
  Tensor sum_d = at::empty({channels}, scale.options()), sum_dx = at::empty({channels}, scale.options());
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Readable<T> from(x), dz(grad);
    const Block<T> to = writable<T>(op, "grad_x", grad_x);
    const Tiling tiles(x.size(0) * count_pixels(x), kRows);
    Sums sums(tiles.slots(), channels);
    tiles.for_each([&](int64_t slot, Tile tile) {
      loops.bn_relu_backward_accumulate(tile.rows(), channels, from_row(from.block, tile.first),
                                        scale.const_data_ptr<A>(), shift.const_data_ptr<A>(),
                                        mean.const_data_ptr<A>(), from_row(dz.block, tile.first),
                                        from_row(to, tile.first), sums.d(slot), sums.dx(slot));
    });
    sums.template write<A>(sum_d, sum_dx);
  });
  return {sum_d, sum_dx};
}

}  // namespace

TORCH_LIBRARY_IMPL(effdense, CPU, m) {
  EFFDENSE_IMPLEMENT(m, cpu_backend, bn_relu);
  EFFDENSE_IMPLEMENT_PUTTING(m, bn_relu_backward_sums, SumsTo);
  EFFDENSE_IMPLEMENT_PUTTING(m, bn_relu_backward, SumsTo);
  EFFDENSE_IMPLEMENT_PUTTING(m, bn_relu_backward_accumulate, SumsTo);
}

}  // namespace effdense
