// bn_relu_conv3x3: a padded 3x3 convolution of relu(scale * x + shift), 2D, and its backward, as GEMMs over
// bands of lines. A layer's convolution has few output channels (k = 12 to 48), which leaves much of a direct
// convolution's vectors empty; taken together the nine taps are 9 k columns.
//
// Forward, per band: z of its lines and one more on either side, one GEMM for the products of all nine taps,
// and one pass that adds up nine neighbours for each pixel. Backward, per band: the nine neighbours'
// gradients side by side, [pixels, 9 k]; one GEMM makes dz, another dW += z^T of it, and one pass masks, sums
// and writes. Neither z nor dz is ever stored.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/gemm.h"
#include "cpu/results.h"
#include "cpu/tiles.h"

namespace effdense {
namespace {

constexpr int64_t kTaps = 9;

// So many elements that whole vectors lie in whole cache lines.
constexpr int64_t aligned(int64_t n) { return (n + kVector - 1) / kVector * kVector; }

// Scratch of one thread, in bytes, that should stay in its L2 cache.
constexpr int64_t kBandBytes = 1024 * 1024;

// The lines of all images, cut into bands of equal height within each image.
struct Bands {
  Bands(const Tensor& x, int64_t bytes_per_pixel, int64_t halo) : height(x.size(2)), width(x.size(3)) {
    const int64_t lines = std::max<int64_t>(1, kBandBytes / (bytes_per_pixel * width) - halo);
    per_image = (height + lines - 1) / lines;
    const int64_t enough = (at::get_num_threads() + x.size(0) - 1) / x.size(0);
    per_image = std::min(height, std::max(per_image, enough));
    step = (height + per_image - 1) / per_image;
    per_image = (height + step - 1) / step;
    count = x.size(0) * per_image;
    pixels = x.size(0) * height * width;
  }
  int64_t slots() const { return count_slots(count); }
  int64_t height, width, per_image, step, count, pixels;

  // Runs body(slot, image, first line, last line), a slot's bands in order.
  template <typename Body>
  void for_each(const Body& body) const {
    for_each_piece(count, [&](int64_t slot, int64_t i) {
      const int64_t first = i % per_image * step;
      body(slot, i / per_image, first, std::min(first + step, height));
    });
  }
};

// The lines of an image whose products are in a slot's ring end here.
struct Made {
  int64_t image = -1, end = 0;
};

// What was stored as T: the dense copy it was made from, where nothing was rounded.
template <typename T, typename A>
Block<const T> dense_or(Block<const A> dense, Block<const T> stored) {
  if constexpr (std::is_same_v<T, A>)
    return dense;
  else
    return stored;
}

// The factor [channels, 9 k] of a weight [k, channels, 3, 3]: the taps side by side.
template <typename A>
Factor<A> taps_side_by_side(const Tensor& weight) {
  const int64_t k = weight.size(0), channels = weight.size(1);
  Factor<A> factor(channels, kTaps * k, weight.options());
  const A* from = weight.const_data_ptr<A>();
  for (int64_t o = 0; o < k; ++o) {
    A* to[kTaps];
    for (int64_t tap = 0; tap < kTaps; ++tap) to[tap] = factor.place(0, tap * k + o);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t tap = 0; tap < kTaps; ++tap) to[tap][c * factor.step] = *from++;
  }
  return factor;
}

// The factor [9 k, channels]: what a pixel gets from its neighbour on one side came through the tap on the
// other.
template <typename A>
Factor<A> around_a_pixel(const Tensor& weight) {
  const int64_t k = weight.size(0), channels = weight.size(1);
  Factor<A> factor(kTaps * k, channels, weight.options());
  const A* from = weight.const_data_ptr<A>();
  for (int64_t o = 0; o < k; ++o)
    for (int64_t c = 0; c < channels; ++c) {
      A* to = factor.place(o, c);
      const int64_t next = k * factor.step;
      for (int64_t tap = kTaps - 1; tap >= 0; --tap) to[tap * next] = *from++;
    }
  return factor;
}

void check_input(const char* op, const Tensor& x, const Tensor& scale, const Tensor& shift,
                 const Tensor& weight) {
  check_map(op, "x", x);
  check_per_channel(op, "scale", scale, x, x.size(1));
  check_per_channel(op, "shift", shift, x, x.size(1));
  check_conv3x3(op, weight, x);
}

std::tuple<Tensor, Tensor> bn_relu_conv3x3(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                           const Tensor& weight, const std::optional<Tensor>& bias,
                                           Tensor& out) {
  constexpr const char* op = "bn_relu_conv3x3";
  check_input(op, x, scale, shift, weight);
  const int64_t channels = x.size(1), k = weight.size(0);
  if (bias) check_per_channel(op, "bias", *bias, x, k);
  check_same_images(op, "out", out, x);
  check_channels(op, "out", out, k, "the weight's output channels");
  if (x.numel() == 0) return {at::zeros({k}, scale.options()), at::ones({k}, scale.options())};
  Tensor mean = at::empty({k}, scale.options()), var = at::empty({k}, scale.options());
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Rows<A>& wide = rows<A>();
    const Readable<T> from(x);
    const Block<T> to = writable<T>(op, "out", out);
    const int64_t columns = kTaps * k, taps_step = aligned(columns);
    const Factor<A> w = taps_side_by_side<A>(wide_weight(weight, scale).contiguous());
    const Bands bands(x, sizeof(A) * (channels + taps_step), 2);
    const int64_t width = bands.width, pixels = bands.height * width, ring = bands.step + 2;
    const int64_t z_size = aligned(ring * width * channels), taps_size = ring * width * taps_step + kVector;
    const int64_t per_slot = z_size + taps_size + aligned(bands.step * width * k) + kVector;
    const Tensor scratch = at::empty({bands.slots(), per_slot}, scale.options());
    const A* bias_data = bias ? bias->const_data_ptr<A>() : nullptr;
    std::vector<Made> made(bands.slots());
    Moments moments(bands.slots(), k);
    bands.for_each([&](int64_t slot, int64_t image, int64_t first, int64_t last) {
      A* z = scratch.mutable_data_ptr<A>() + slot * per_slot;
      A *taps = z + z_size, *sum = taps + taps_size;
      const auto line_of = [&](int64_t y) { return taps + y % ring * width * taps_step; };
      // The products of a line stay until the band below has used them.
      const int64_t above = made[slot].image == image ? made[slot].end : std::max<int64_t>(first - 1, 0);
      const int64_t below = std::min(last + 1, bands.height);
      made[slot] = {image, below};
      loops.bn_relu((below - above) * width, channels, from_row(from.block, image * pixels + above * width),
                    scale.const_data_ptr<A>(), shift.const_data_ptr<A>(), {z, channels});
      for (int64_t y = above; y < below;) {
        const int64_t lines = std::min(below - y, ring - y % ring);
        // Where the band below takes its lines from.
        const int64_t end = image * pixels + (y + lines) * width;
        w.multiply(lines * width, {z + (y - above) * width * channels, channels}, {line_of(y), taps_step},
                   taps_step,
                   ahead(from.block, {end, std::min(end + lines * width, bands.pixels)}, channels));
        y += lines;
      }
      for (int64_t y = first; y < last; ++y) {
        const A* lines[3];
        for (int64_t i = 0; i < 3; ++i) {
          const bool outside = y + i < 1 || y + i > bands.height;
          lines[i] = outside ? nullptr : line_of(y + i - 1);
        }
        wide.sum_taps(width, k, lines, taps_step, bias_data, sum + (y - first) * width * k);
      }
      const Block<T> tile_out = from_row(to, image * pixels + first * width);
      const int64_t rows = (last - first) * width;
      loops.store(rows, k, {sum, k}, tile_out);
      moments.add(loops, slot, rows, dense_or<T, A>({sum, k}, constant(tile_out)));
    });
    moments.write(mean.mutable_data_ptr<A>(), var.mutable_data_ptr<A>());
  });
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> bn_relu_conv3x3_backward(const Tensor& grad, const Tensor& x,
                                                            const Tensor& scale, const Tensor& shift,
                                                            const Tensor& mean, const Tensor& weight,
                                                            Tensor& grad_x, bool accumulate, bool need_x,
                                                            bool need_weight) {
  constexpr const char* op = "bn_relu_conv3x3_backward";
  check_input(op, x, scale, shift, weight);
  const int64_t channels = x.size(1), k = weight.size(0);
  check_same_images(op, "grad", grad, x);
  check_channels(op, "grad", grad, k, "the weight's output channels");
  check_per_channel(op, "mean", mean, x, channels);
  if (need_x) check_same_shape(op, "grad_x", grad_x, x);
  const bool nothing = x.numel() == 0;
  const auto result = [&](at::IntArrayRef sizes) {
    return nothing ? at::zeros(sizes, scale.options()) : at::empty(sizes, scale.options());
  };
  const Tensor grad_taps = result({channels, 3, 3, need_weight ? k : 0});
  Tensor grad_weight = grad_taps.permute({3, 0, 1, 2}), sum_d = result({channels}),
         sum_dx = result({channels});
  if (nothing) return {grad_weight, sum_d, sum_dx};
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Rows<A>& wide = rows<A>();
    const Features<T> from(x);
    const Readable<T> g(grad);
    const Block<T> to = need_x ? writable<T>(op, "grad_x", grad_x) : Block<T>{nullptr, 0};
    const int64_t columns = kTaps * k, around_step = aligned(columns);
    const Factor<A> w = around_a_pixel<A>(wide_weight(weight, scale).contiguous());
    const Bands bands(x, sizeof(A) * (4 * channels + around_step + k), 0);
    const int64_t width = bands.width, pixels = bands.height * width, most = aligned(bands.step * width);
    const int64_t line = (width + 2) * k, padded = aligned((bands.step + 2) * line) + kVector;
    const int64_t per_slot = most * (4 * channels + around_step) + padded + kVector;
    const Tensor scratch = at::empty({bands.slots(), per_slot}, scale.options());
    const Tensor partial = at::empty({need_weight ? bands.slots() : 0, channels, columns}, scale.options());
    std::vector<char> started(bands.slots());
    Sums sums(bands.slots(), channels);
    bands.for_each([&](int64_t slot, int64_t image, int64_t first, int64_t last) {
      A* x_scratch = scratch.mutable_data_ptr<A>() + slot * per_slot;
      const Block<A> z{x_scratch + most * channels, channels}, dz{z.data + most * channels, channels};
      const Block<A> transposed{dz.data + most * channels, most};
      const Block<A> around{transposed.data + most * channels, around_step};
      A* lines = around.data + most * around_step + kVector;
      const int64_t row = image * pixels + first * width, count = (last - first) * width;
      for (int64_t y = first - 1; y <= last; ++y) {
        A* to_line = lines + (y - first + 1) * line + k;
        std::fill_n(to_line - k, k, A(0));
        std::fill_n(to_line + width * k, k, A(0));
        if (y < 0 || y >= bands.height)
          std::fill_n(to_line, width * k, A(0));
        else
          loops.load(width, k, from_row(g.block, image * pixels + y * width), {to_line, k});
      }
      for (int64_t y = 0; y < last - first; ++y)
        wide.spread_taps(width, k, lines + y * line, line, from_row(around, y * width));
      const Block<const A> tile_x = from.template read<A>(loops, {row, row + count}, x_scratch);
      wide.bn_relu(count, channels, tile_x, scale.const_data_ptr<A>(), shift.const_data_ptr<A>(), z);
      if (need_weight) {
        const Block<A> sum{partial.mutable_data_ptr<A>() + slot * channels * columns, columns};
        add_transposed(count, channels, columns, constant(z), constant(around), sum, started[slot],
                       transposed, ahead(to, {row, row + count}, channels));
        started[slot] = true;
      }
      if (!need_x) return;
      w.multiply_backward(loops, count, constant(around), dz,
                          {tile_x, constant(z), mean.const_data_ptr<A>(), scale.const_data_ptr<A>(),
                           from_row(to, row), accumulate, sums.d(slot), sums.dx(slot)},
                          from.ahead({row + count, std::min(row + 2 * count, bands.pixels)}));
    });
    if (need_weight) {
      const A* from = partial.const_data_ptr<A>();
      A* to_taps = grad_taps.mutable_data_ptr<A>();
      const int64_t slots = bands.slots(), size = channels * columns;
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t tap = 0; tap < kTaps; ++tap) {
          const A* sum = from + c * columns + tap * k;
          A* to_tap = to_taps + c * columns + (kTaps - 1 - tap) * k;
          std::copy_n(sum, k, to_tap);
          for (int64_t slot = 1; slot < slots; ++slot)
            for (int64_t o = 0; o < k; ++o) to_tap[o] += sum[slot * size + o];
        }
    }
    sums.template write<A>(sum_d, sum_dx);
  });
  return {grad_weight, sum_d, sum_dx};
}

}  // namespace

TORCH_LIBRARY_IMPL(effdense, CPU, m) {
  EFFDENSE_IMPLEMENT_PUTTING(m, bn_relu_conv3x3, StatisticsTo);
  EFFDENSE_IMPLEMENT_PUTTING(m, bn_relu_conv3x3_backward, SumsTo);
}

}  // namespace effdense
