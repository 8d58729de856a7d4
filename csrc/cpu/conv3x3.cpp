// bn_relu_conv3x3: a padded convolution, 3 wide in every direction (3, 3x3 or 3x3x3), of relu(scale * x +
// shift), and its backward, as GEMMs over bands of lines. A layer's convolution has few output channels (k =
// 12 to 48), which leaves much of a direct convolution's vectors empty; taken together the taps are 9 k
// columns in a plane.
//
// Forward, per band: z of its lines and one more on either side, one GEMM for the products of all taps in a
// plane (in 3D for each of the three planes that a pixel reads), and one pass that adds up the neighbours of
// each pixel. Backward, per band: the neighbours' gradients side by side, [pixels, taps * k]; one GEMM makes
// dz, another dW += z^T of it, and one pass masks, sums and writes. Neither z nor dz is ever stored.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/features.h"
#include "cpu/few_pixels.h"
#include "cpu/gemm.h"
#include "cpu/moments.h"
#include "cpu/results.h"
#include "cpu/tiling.h"

namespace effdense {
namespace {

// So many elements that whole vectors lie in whole cache lines.
constexpr int64_t aligned(int64_t n) { return (n + kVector - 1) / kVector * kVector; }

// Scratch of one thread, in bytes, that should stay in its L2 cache.
constexpr int64_t kBandBytes = 1024 * 1024;

// Maps as lines of pixels, and the taps of a convolution that is 3 wide in every direction: the lines that a
// pixel reads, and how many pixels of each. Those of 3D maps are in 3 planes; a 1D map is a column of lines
// of one pixel.
struct Grid {
  explicit Grid(const Tensor& x)
      : deep(x.dim() == 5 ? 3 : 1),
        across(x.dim() == 3 ? 1 : 3),
        depth(x.dim() == 5 ? x.size(2) : 1),
        height(x.dim() == 3 ? x.size(2) : x.size(-2)),
        width(x.dim() == 3 ? 1 : x.size(-1)),
        lines(x.size(0) * depth * height) {}
  int64_t taps() const { return deep * in_plane(); }
  int64_t in_plane() const { return 3 * across; }
  // Whether a pixel in this line reads the plane `part`, of 0 to deep - 1.
  bool reads(int64_t line, int64_t part) const {
    const int64_t plane = line / height % depth + part - deep / 2;
    return 0 <= plane && plane < depth;
  }
  // How far behind this line the one lies that is read through a tap.
  int64_t offset(int64_t part, int64_t row) const { return (part - deep / 2) * height + row - 1; }

  // Calls body(part, row, line) for all lines that a pixel reads; -1 for one outside of the image.
  template <typename Body>
  void for_each_read(int64_t line, const Body& body) const {
    for (int64_t part = 0; part < deep; ++part)
      for (int64_t row = 0; row < 3; ++row) {
        const int64_t y = line % height + row - 1;
        const bool inside = reads(line, part) && 0 <= y && y < height;
        body(part, row, inside ? line + offset(part, row) : -1);
      }
  }
  int64_t deep, across, depth, height, width, lines;
};
constexpr int64_t kMostLines = 9;

// The lines of all images, cut into bands of equal height: as many for each thread as can be.
struct Bands {
  Bands(const Grid& grid, int64_t bytes_per_pixel, int64_t halo) : lines(grid.lines) {
    const int64_t most = std::max<int64_t>(1, kBandBytes / (bytes_per_pixel * grid.width) - halo);
    const int64_t threads = at::get_num_threads(), wanted = (lines + most - 1) / most;
    count = std::min(lines, (wanted + threads - 1) / threads * threads);
    step = (lines + count - 1) / count;
    count = (lines + step - 1) / step;
  }
  int64_t slots() const { return count_slots(count); }
  int64_t lines, step, count;

  // Runs body(slot, first line, last line), a slot's bands in order.
  template <typename Body>
  void for_each(const Body& body) const {
    for_each_piece(count,
                   [&](int64_t slot, int64_t i) { body(slot, i * step, std::min((i + 1) * step, lines)); });
  }
};

// What was stored as T: the dense copy it was made from, where nothing was rounded.
template <typename T, typename A>
Block<const T> dense_or(Block<const A> dense, Block<const T> stored) {
  if constexpr (std::is_same_v<T, A>)
    return dense;
  else
    return stored;
}

// Writes n elements from column j of row p on.
template <typename A>
void write_row(Factor<A>& factor, int64_t p, int64_t j, const A* from, int64_t n) {
  for (int64_t end = j + n; j < end;) {
    const int64_t count = std::min(end - j, factor.step - j % factor.step);
    std::copy_n(from, count, factor.place(p, j));
    from += count;
    j += count;
  }
}

// The factors [channels, taps in a plane * k] of a weight [k, channels, taps], one for each plane: its taps
// side by side.
template <typename A>
std::vector<Factor<A>> taps_side_by_side(const Tensor& weight, const Grid& grid) {
  const int64_t k = weight.size(0), channels = weight.size(1), taps = grid.in_plane();
  std::vector<Factor<A>> factors;
  for (int64_t part = 0; part < grid.deep; ++part) factors.emplace_back(channels, taps * k, weight.options());
  // A few channels at a time, so that they stay in cache.
  constexpr int64_t kChannels = 16;
  const int64_t step = channels * grid.taps();
  std::vector<A> turned(kChannels * grid.taps() * k);
  for (int64_t c0 = 0; c0 < channels; c0 += kChannels) {
    const int64_t count = std::min(kChannels, channels - c0);
    const Block<const A> from{weight.const_data_ptr<A>() + c0 * grid.taps(), step};
    effdense::rows<A>().transpose(k, count * grid.taps(), from, {turned.data(), k});
    const A* row = turned.data();
    for (int64_t c = c0; c < c0 + count; ++c)
      for (Factor<A>& factor : factors)
        for (int64_t tap = 0; tap < taps; ++tap, row += k) write_row(factor, c, tap * k, row, k);
  }
  return factors;
}

// The factor [taps * k, channels]: what a pixel gets from its neighbour on one side came through the tap on
// the other.
template <typename A>
Factor<A> around_a_pixel(const Tensor& weight, const Grid& grid) {
  const int64_t k = weight.size(0), channels = weight.size(1), taps = grid.taps();
  Factor<A> factor(taps * k, channels, weight.options());
  std::vector<A> turned(taps * channels);
  for (int64_t o = 0; o < k; ++o) {
    const Block<const A> from{weight.const_data_ptr<A>() + o * channels * taps, taps};
    effdense::rows<A>().transpose(channels, taps, from, {turned.data(), channels});
    for (int64_t tap = 0; tap < taps; ++tap)
      write_row(factor, (taps - 1 - tap) * k + o, 0, turned.data() + tap * channels, channels);
  }
  return factor;
}

// Of the slots' sums [channels, taps * k], in the order of a pixel's neighbours: the gradient [k, channels,
// taps] of the weight. The first slot's are overwritten.
template <typename A>
void write_grad_weight(const Tensor& partial, int64_t k, int64_t taps, const Tensor& grad_weight) {
  const int64_t slots = partial.size(0), channels = partial.size(1), size = channels * taps * k;
  A* sum = partial.mutable_data_ptr<A>();
  for (int64_t slot = 1; slot < slots; ++slot)
    for (int64_t i = 0; i < size; ++i) sum[i] += sum[slot * size + i];
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t tap = 0; tap < taps / 2; ++tap) {
      A* row = sum + c * taps * k;
      std::swap_ranges(row + tap * k, row + (tap + 1) * k, row + (taps - 1 - tap) * k);
    }
  const int64_t rows = channels * taps;
  effdense::rows<A>().transpose(rows, k, {sum, k}, {grad_weight.mutable_data_ptr<A>(), rows});
}

void check_input(const char* op, const Tensor& x, const Tensor& scale, const Tensor& shift,
                 const Tensor& weight) {
  check_map(op, "x", x);
  check_per_channel(op, "scale", scale, x, x.size(1));
  check_per_channel(op, "shift", shift, x, x.size(1));
  check_conv3x3(op, weight, x);
}

// The forward of few pixels: writes `to` and its statistics.
template <typename T>
void convolve_few(const Grid& grid, Block<const T> x, int64_t channels, const Tensor& scale,
                  const Tensor& shift, const Tensor& weight, const std::optional<Tensor>& bias, Block<T> to,
                  Moments& moments) {
  const FewPixels<Grid> few(*products(), grid, channels);
  const int64_t pixels = few.pixels(), k = weight.size(0);
  const Tensor scratch = at::empty({pixels * (channels + few.columns() + k)}, scale.options());
  float *z = scratch.mutable_data_ptr<float>(), *around = z + pixels * channels,
        *sum = around + pixels * few.columns();
  const Rows<T>& loops = rows<T>();
  loops.bn_relu(pixels, channels, x, scale.const_data_ptr<float>(), shift.const_data_ptr<float>(),
                {z, channels});
  few.gather(z, around);
  few.convolve(k, around, weight.const_data_ptr<float>(), sum);
  if (bias) rows<float>().add_bias(pixels, k, bias->const_data_ptr<float>(), {sum, k});
  loops.store(pixels, k, {sum, k}, to);
  moments.add(loops, 0, pixels, dense_or<T, float>({sum, k}, constant(to)));
}

// The backward; `to` is null where x's gradient is not wanted, grad_weight empty where that is not.
template <typename T>
void convolve_few_backward(const Grid& grid, Block<const T> grad, const Features<T>& x, int64_t channels,
                           const Tensor& scale, const Tensor& shift, const Tensor& mean, const Tensor& weight,
                           Block<T> to, bool accumulate, const Tensor& grad_weight, Sums& sums) {
  const FewPixels<Grid> few(*products(), grid, channels);
  const int64_t pixels = few.pixels(), k = weight.size(0);
  const Tensor scratch = at::empty({pixels * (3 * channels + few.columns() + k)}, scale.options());
  float *z = scratch.mutable_data_ptr<float>(), *dz = z + pixels * channels, *copy = dz + pixels * channels,
        *g = copy + pixels * channels, *around = g + pixels * k;
  const Rows<T>& loops = rows<T>();
  loops.load(pixels, k, grad, {g, k});
  const Block<const float> tile_x = x.template read<float>(loops, {0, pixels}, copy);
  rows<float>().bn_relu(pixels, channels, tile_x, scale.const_data_ptr<float>(),
                        shift.const_data_ptr<float>(), {z, channels});
  if (grad_weight.numel() > 0) {
    few.gather(z, around);
    few.weight_gradient(k, g, around, grad_weight.mutable_data_ptr<float>());
  }
  if (to.data == nullptr) return;
  few.input_gradient(k, g, weight.const_data_ptr<float>(), around);
  few.scatter(around, dz);
  loops.bottleneck_backward(pixels, channels, tile_x, mean.const_data_ptr<float>(), {z, channels},
                            {dz, channels}, scale.const_data_ptr<float>(), to, accumulate, sums.d(0),
                            sums.dx(0));
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
    const Grid grid(x);
    const Tensor wide_w = wide_weight(weight, scale).contiguous();
    if constexpr (std::is_same_v<A, float>)
      if (has_few_pixels<A>(grid, channels)) {
        Moments moments(1, k);
        convolve_few<T>(grid, from.block, channels, scale, shift, wide_w, bias, to, moments);
        return moments.write(mean.mutable_data_ptr<A>(), var.mutable_data_ptr<A>());
      }
    const int64_t part_step = aligned(grid.in_plane() * k), taps_step = grid.deep * part_step;
    const std::vector<Factor<A>> w = taps_side_by_side<A>(wide_w, grid);
    const Bands bands(grid, sizeof(A) * (channels + taps_step), 2);
    const int64_t width = grid.width, ring = bands.step + 2;
    const int64_t z_size = aligned(ring * width * channels), taps_size = ring * width * taps_step + kVector;
    const int64_t per_slot = z_size + taps_size + aligned(bands.step * width * k) + kVector;
    const Tensor scratch = at::empty({bands.slots(), per_slot}, scale.options());
    const A* bias_data = bias ? bias->const_data_ptr<A>() : nullptr;
    std::vector<int64_t> made(bands.slots());
    Moments moments(bands.slots(), k);
    bands.for_each([&](int64_t slot, int64_t first, int64_t last) {
      A* z = scratch.mutable_data_ptr<A>() + slot * per_slot;
      A *taps = z + z_size, *sum = taps + taps_size;
      const auto products = [&](int64_t line, int64_t part) {
        return taps + line % ring * width * taps_step + part * part_step;
      };
      // What is read through the taps of a plane, for lines that all read it.
      const auto multiply = [&](int64_t line, int64_t end, int64_t part) {
        const int64_t row = (line + grid.offset(part, 1)) * width, rows = (end - line) * width;
        loops.bn_relu(rows, channels, from_row(from.block, row), scale.const_data_ptr<A>(),
                      shift.const_data_ptr<A>(), {z, channels});
        const Tile next{row + rows, std::min(row + 2 * rows, grid.lines * width)};
        w[part].multiply(rows, {z, channels}, {products(line, part), taps_step}, part_step,
                         ahead(from.block, next, channels));
      };
      // The products of a line stay until the band below has used them.
      const int64_t above = std::max(made[slot], std::max<int64_t>(first - 1, 0));
      const int64_t below = made[slot] = std::min(last + 1, grid.lines);
      for (int64_t part = 0; part < grid.deep; ++part)
        for (int64_t line = above; line < below;) {
          const int64_t room = std::min(below, line + ring - line % ring);
          const bool reads = grid.reads(line, part);
          int64_t end = line;
          do end = std::min(room, (end / grid.height + 1) * grid.height);
          while (end < room && grid.reads(end, part) == reads);
          if (reads) multiply(line, end, part);
          line = end;
        }
      for (int64_t line = first; line < last; ++line) {
        const A* lines[kMostLines];
        grid.for_each_read(line, [&](int64_t part, int64_t row, int64_t read) {
          const A* of_line = products(line + row - 1, part) + row * grid.across * k;
          lines[part * 3 + row] = read < 0 ? nullptr : of_line;
        });
        wide.sum_taps(width, k, grid.across, 3 * grid.deep, lines, taps_step, bias_data,
                      sum + (line - first) * width * k);
      }
      const Block<T> tile_out = from_row(to, first * width);
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
  std::vector<int64_t> weight_sizes = weight.sizes().vec();
  if (!need_weight) weight_sizes[0] = 0;
  Tensor grad_weight = result(weight_sizes), sum_d = result({channels}), sum_dx = result({channels});
  if (nothing) return {grad_weight, sum_d, sum_dx};
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Rows<A>& wide = rows<A>();
    const Features<T> from(x);
    const Readable<T> g(grad);
    const Block<T> to = need_x ? writable<T>(op, "grad_x", grad_x) : Block<T>{nullptr, 0};
    const Grid grid(x);
    const Tensor wide_w = wide_weight(weight, scale).contiguous();
    if constexpr (std::is_same_v<A, float>)
      if (has_few_pixels<A>(grid, channels)) {
        Sums sums(1, channels);
        convolve_few_backward<T>(grid, g.block, from, channels, scale, shift, mean, wide_w, to, accumulate,
                                 grad_weight, sums);
        return sums.template write<A>(sum_d, sum_dx);
      }
    const int64_t columns = grid.taps() * k, around_step = aligned(columns);
    const Factor<A> w = around_a_pixel<A>(wide_w, grid);
    const Bands bands(grid, sizeof(A) * (4 * channels + around_step + k), 0);
    const int64_t width = grid.width, most = aligned(bands.step * width), margin = grid.across / 2;
    const int64_t line_size = (width + 2 * margin) * k, part_lines = bands.step + 2;
    const int64_t padded = aligned((grid.deep * part_lines + 1) * line_size) + kVector;
    const int64_t per_slot = most * (4 * channels + around_step) + padded + kVector;
    const Tensor scratch = at::empty({bands.slots(), per_slot}, scale.options());
    const Tensor partial = at::empty({need_weight ? bands.slots() : 0, channels, columns}, scale.options());
    std::vector<char> started(bands.slots());
    Sums sums(bands.slots(), channels);
    bands.for_each([&](int64_t slot, int64_t first, int64_t last) {
      A* x_scratch = scratch.mutable_data_ptr<A>() + slot * per_slot;
      const Block<A> z{x_scratch + most * channels, channels}, dz{z.data + most * channels, channels};
      const Block<A> transposed{dz.data + most * channels, most};
      const Block<A> around{transposed.data + most * channels, around_step};
      // Padded lines of gradients: one of zeros, then those of every plane that the band's pixels read.
      A* nothing = around.data + most * around_step + kVector;
      std::fill_n(nothing, line_size, A(0));
      const auto padded_line = [&](int64_t part, int64_t i) {
        return nothing + (1 + part * part_lines + i) * line_size;
      };
      const int64_t row = first * width, count = (last - first) * width;
      for (int64_t part = 0; part < grid.deep; ++part)
        for (int64_t i = 0; i < last - first + 2; ++i) {
          const int64_t line = first + i + grid.offset(part, 0);
          if (line < 0 || line >= grid.lines) continue;
          A* to_line = padded_line(part, i);
          std::fill_n(to_line, margin * k, A(0));
          std::fill_n(to_line + (margin + width) * k, margin * k, A(0));
          loops.load(width, k, from_row(g.block, line * width), {to_line + margin * k, k});
        }
      for (int64_t line = first; line < last; ++line) {
        const A* lines[kMostLines];
        grid.for_each_read(line, [&](int64_t part, int64_t i, int64_t read) {
          lines[part * 3 + i] = read < 0 ? nothing : padded_line(part, line - first + i);
        });
        wide.spread_taps(width, k, grid.across, 3 * grid.deep, lines,
                         from_row(around, (line - first) * width));
      }
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
                          from.ahead({row + count, std::min(row + 2 * count, grid.lines * width)}));
    });
    if (need_weight) write_grad_weight<A>(partial, k, grid.taps(), grad_weight);
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
