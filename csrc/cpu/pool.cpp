// Pooling of relu(scale * x + shift), which is never stored: the average pool of transitions and heads, over
// windows that do not overlap, and the max pool of stems.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/features.h"
#include "cpu/moments.h"
#include "cpu/results.h"
#include "cpu/tiling.h"
#include "windows.h"

namespace effdense {
namespace {

Tensor bn_relu_avg_pool(const Tensor& x, const Tensor& scale, const Tensor& shift,
                        at::IntArrayRef kernel_size) {
  constexpr const char* op = "bn_relu_avg_pool";
  check_norm(op, x, scale, shift);
  const int64_t channels = x.size(1);
  const Windows windows = average_windows(op, x, kernel_size);
  const Size3 &size = windows.out, &in = windows.in, &k = windows.kernel;
  Tensor out = channels_last_empty(x, size, x.scalar_type());
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Readable<T> from(x);
    const Block<T> to = writable<T>(op, "out", out);
    const A *scale_data = scale.const_data_ptr<A>(), *shift_data = shift.const_data_ptr<A>();
    const A share = A(1) / static_cast<A>(product(k));
    at::parallel_for(0, x.size(0) * size[0] * size[1] * size[2], 1, [&](int64_t begin, int64_t end) {
      std::vector<A> sum(channels);
      for (int64_t o = begin; o < end; ++o) {
        const int64_t w = o % size[2], h = o / size[2] % size[1], d = o / (size[2] * size[1]) % size[0];
        const int64_t image = o / (size[2] * size[1] * size[0]);
        std::fill(sum.begin(), sum.end(), A(0));
        for (int64_t z = d * k[0]; z < (d + 1) * k[0]; ++z)
          for (int64_t y = h * k[1]; y < (h + 1) * k[1]; ++y)
            loops.bn_relu_sum(k[2], channels,
                              from_row(from.block, ((image * in[0] + z) * in[1] + y) * in[2] + w * k[2]),
                              scale_data, shift_data, sum.data());
        for (A& value : sum) value *= share;
        loops.store(1, channels, {sum.data(), channels}, from_row(to, o));
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> bn_relu_avg_pool_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                     const Tensor& shift, const Tensor& mean,
                                                     at::IntArrayRef kernel_size, Tensor& grad_x) {
  constexpr const char* op = "bn_relu_avg_pool_backward";
  check_norm(op, x, scale, shift, &mean);
  const int64_t channels = x.size(1);
  const Windows windows = average_windows(op, x, kernel_size);
  const Size3 &size = windows.out, &in = windows.in, &k = windows.kernel;
  check_same_shape(op, "grad_x", grad_x, x);
  check_pooled(op, "grad", grad, x, at::IntArrayRef(size).slice(5 - x.dim()));
  Tensor sum_d = at::empty({channels}, scale.options()), sum_dx = at::empty({channels}, scale.options());
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Readable<T> from(x), g(grad);
    const Block<T> to = writable<T>(op, "grad_x", grad_x);
    const A *scale_data = scale.const_data_ptr<A>(), *shift_data = shift.const_data_ptr<A>(),
            *mean_data = mean.const_data_ptr<A>();
    const A share = A(1) / static_cast<A>(product(k));
    // One line of pixels after another; what no window covers gets zeros.
    const Tiling lines(x.size(0) * in[0] * in[1], 8);
    Sums sums(lines.slots(), channels);
    lines.for_each([&](int64_t slot, Tile tile) {
      for (int64_t line = tile.first; line < tile.last; ++line) {
        const int64_t y = line % in[1] / k[1], z = line / in[1] % in[0] / k[0];
        const int64_t image = line / (in[1] * in[0]);
        const int64_t count = y < size[1] && z < size[0] ? size[2] : 0;
        if (count > 0)
          loops.bn_relu_avg_pool_backward(
              count * k[2], channels, from_row(from.block, line * in[2]), scale_data, shift_data, mean_data,
              from_row(g.block, ((image * size[0] + z) * size[1] + y) * size[2]), k[2], share,
              from_row(to, line * in[2]), sums.d(slot), sums.dx(slot));
        for (int64_t w = count * k[2]; w < in[2]; ++w) std::fill_n(to.row(line * in[2] + w), channels, T{});
      }
    });
    sums.template write<A>(sum_d, sum_dx);
  });
  return {sum_d, sum_dx};
}

// Calls body(tap, input row) for every pixel of the window of output (d, h, w); rows are within the image.
template <typename Body>
void for_taps(const Windows& windows, int64_t d, int64_t h, int64_t w, const Body& body) {
  const auto& [in, kernel, stride, padding, out] = windows;
  for (int64_t i = 0; i < kernel[0]; ++i)
    for (int64_t j = 0; j < kernel[1]; ++j)
      for (int64_t k = 0; k < kernel[2]; ++k) {
        const int64_t z = d * stride[0] - padding[0] + i, y = h * stride[1] - padding[1] + j,
                      x = w * stride[2] - padding[2] + k;
        if (z >= 0 && z < in[0] && y >= 0 && y < in[1] && x >= 0 && x < in[2])
          body(static_cast<uint8_t>((i * kernel[1] + j) * kernel[2] + k), (z * in[1] + y) * in[2] + x);
      }
}

// Calls body(tap, output row) for every window that the input pixel (z, y, x) is in.
template <typename Body>
void for_windows(const Windows& windows, int64_t z, int64_t y, int64_t x, const Body& body) {
  const Size3 &kernel = windows.kernel, &out = windows.out;
  const auto position = [&](int axis, int64_t i, int64_t tap) -> int64_t {
    const int64_t from = i + windows.padding[axis] - tap, stride = windows.stride[axis];
    return from >= 0 && from % stride == 0 && from / stride < out[axis] ? from / stride : -1;
  };
  for (int64_t i = 0; i < kernel[0]; ++i)
    for (int64_t j = 0; j < kernel[1]; ++j)
      for (int64_t k = 0; k < kernel[2]; ++k) {
        const int64_t d = position(0, z, i), h = position(1, y, j), w = position(2, x, k);
        if (d >= 0 && h >= 0 && w >= 0)
          body(static_cast<uint8_t>((i * kernel[1] + j) * kernel[2] + k), (d * out[1] + h) * out[2] + w);
      }
}

std::tuple<Tensor, Tensor> bn_relu_max_pool(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                            at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                            at::IntArrayRef padding) {
  constexpr const char* op = "bn_relu_max_pool";
  check_norm(op, x, scale, shift);
  const int64_t channels = x.size(1);
  const Windows windows = maximum_windows(op, x, kernel_size, stride, padding);
  Tensor out = channels_last_empty(x, windows.out, x.scalar_type());
  Tensor where = channels_last_empty(x, windows.out, at::kByte);
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Readable<T> from(x);
    const Block<T> to = writable<T>(op, "out", out);
    uint8_t* where_data = where.mutable_data_ptr<uint8_t>();
    const A *scale_data = scale.const_data_ptr<A>(), *shift_data = shift.const_data_ptr<A>();
    const Size3& size = windows.out;
    at::parallel_for(0, x.size(0) * product(size), 1, [&](int64_t begin, int64_t end) {
      std::vector<A> best(channels);
      for (int64_t o = begin; o < end; ++o) {
        const int64_t image = o / product(size);
        bool first = true;
        for_taps(windows, o / (size[2] * size[1]) % size[0], o / size[2] % size[1], o % size[2],
                 [&](uint8_t tap, int64_t row) {
                   loops.bn_relu_max(channels, from.block.row(image * product(windows.in) + row), scale_data,
                                     shift_data, first, tap, best.data(), where_data + o * channels);
                   first = false;
                 });
        loops.store(1, channels, {best.data(), channels}, from_row(to, o));
      }
    });
  });
  return {out, where};
}

void max_pool_backward(const Tensor& grad, const Tensor& where, at::IntArrayRef kernel_size,
                       at::IntArrayRef stride, at::IntArrayRef padding, Tensor& grad_z) {
  constexpr const char* op = "max_pool_backward";
  const Windows windows = check_max_pool_backward(op, grad, where, kernel_size, stride, padding, grad_z);
  const int64_t channels = grad_z.size(1);
  EFFDENSE_DISPATCH(grad_z.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Readable<T> g(grad);
    const Readable<uint8_t> taps(where);
    const Block<T> to = writable<T>(op, "grad_z", grad_z);
    const Size3& in = windows.in;
    at::parallel_for(0, grad_z.size(0) * product(in), 1, [&](int64_t begin, int64_t end) {
      std::vector<A> d(channels);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / product(in);
        std::fill(d.begin(), d.end(), A(0));
        for_windows(windows, i / (in[2] * in[1]) % in[0], i / in[2] % in[1], i % in[2],
                    [&](uint8_t tap, int64_t row) {
                      const int64_t o = image * product(windows.out) + row;
                      loops.max_pool_gather(channels, g.block.row(o), taps.block.row(o), tap, d.data());
                    });
        loops.store(1, channels, {d.data(), channels}, from_row(to, i));
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(effdense, CPU, m) {
  EFFDENSE_IMPLEMENT(m, cpu_backend, bn_relu_avg_pool);
  EFFDENSE_IMPLEMENT_PUTTING(m, bn_relu_avg_pool_backward, SumsTo);
  m.impl("bn_relu_max_pool", bn_relu_max_pool);
  m.impl("max_pool_backward", max_pool_backward);
}

}  // namespace effdense
