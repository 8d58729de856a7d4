// bottleneck: y = W relu(scale * x + shift) + bias over a list of feature maps, and its backward.
//
// Forward, per tile of pixels: the prologue writes z [pixels, channels] into a scratch that stays in L2, one
// GEMM makes y, and y's statistics are taken while it is in cache. Backward, per tile: z again, dz = dy W by
// one GEMM, dW += dy^T z by another, and one pass that masks, sums and writes the gradients. Neither z nor dz
// is ever stored, nor is dy where the correction of a norm behind y is still to be applied.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/features.h"
#include "cpu/gemm.h"
#include "cpu/moments.h"
#include "cpu/results.h"
#include "cpu/tiling.h"

namespace effdense {
namespace {

// Scratch of one thread, in bytes, that should stay in its L2 cache.
constexpr int64_t kTileBytes = 256 * 1024;

// Rows per tile so that `columns` columns of A fit; never so few that the GEMM starves.
template <typename A>
int64_t tile_rows(int64_t columns) {
  return std::clamp<int64_t>(kTileBytes / static_cast<int64_t>(sizeof(A)) / columns / 16 * 16, 64, 256);
}

// Where results are computed: in place if they have the type for it, else in scratch.
template <typename T, typename A>
Block<A> same_or(Block<T> out, Block<A> scratch) {
  if constexpr (std::is_same_v<T, A>)
    return out;
  else
    return scratch;
}

template <typename A>
const A* data_or_null(const std::optional<Tensor>& vector) {
  return vector ? vector->const_data_ptr<A>() : nullptr;
}

std::tuple<Tensor, Tensor> bottleneck(TensorList features, const Tensor& scale, const Tensor& shift,
                                      const Tensor& weight, const std::optional<Tensor>& bias,
                                      const std::optional<Tensor>& out_scale,
                                      const std::optional<Tensor>& out_shift, bool statistics, Tensor& y) {
  constexpr const char* op = "bottleneck";
  check_bottleneck(op, features, scale, shift, weight, bias, out_scale, out_shift, y);
  const Tensor& first = features[0];
  const int64_t channels = scale.numel(), out_channels = weight.size(0);
  const int64_t wanted = statistics ? out_channels : 0;
  if (y.numel() == 0) return {at::zeros({wanted}, scale.options()), at::ones({wanted}, scale.options())};
  Tensor mean = at::empty({wanted}, scale.options()), var = at::empty({wanted}, scale.options());

  EFFDENSE_DISPATCH(first.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Rows<A>& wide = rows<A>();
    const Features<T> x(features);
    const Block<T> out = writable<T>(op, "y", y);
    const Tensor wide_w = wide_weight(weight, scale);
    const int64_t pixels = first.size(0) * count_pixels(first);
    Factor<A> w(channels, out_channels, scale.options(), pixels);
    w.from_transposed(wide_w.const_data_ptr<A>());
    const A *bias_data = data_or_null<A>(bias), *out_scale_data = data_or_null<A>(out_scale),
            *out_shift_data = data_or_null<A>(out_shift);
    const Tiling tiles(pixels, tile_rows<A>(channels + out_channels));
    const int64_t per_slot = tiles.step() * (channels + out_channels);
    const Tensor scratch = at::empty({tiles.slots(), per_slot}, scale.options());
    Moments moments(tiles.slots(), statistics ? out_channels : 0);
    tiles.for_each([&](int64_t slot, Tile tile) {
      A* tile_scratch = scratch.mutable_data_ptr<A>() + slot * per_slot;
      const Block<A> z{tile_scratch, channels};
      const Block<A> y_scratch{tile_scratch + tiles.step() * channels, out_channels};
      const Block<T> tile_out = from_row(out, tile.first);
      const Block<A> tile_y = same_or(tile_out, y_scratch);
      wide.bn_relu(tile.rows(), channels, x.template read<A>(loops, tile, tile_scratch),
                   scale.const_data_ptr<A>(), shift.const_data_ptr<A>(), z);
      w.multiply(tile.rows(), constant(z), tile_y, 0, x.ahead(tiles.after(tile)));
      if (bias_data != nullptr) wide.add_bias(tile.rows(), out_channels, bias_data, tile_y);
      if (out_scale_data != nullptr)
        wide.bn_relu(tile.rows(), out_channels, constant(tile_y), out_scale_data, out_shift_data, tile_y);
      if (!std::is_same_v<T, A>) loops.store(tile.rows(), out_channels, constant(tile_y), tile_out);
      if (statistics) moments.add(loops, slot, tile.rows(), constant(tile_out));
    });
    if (statistics) moments.write(mean.mutable_data_ptr<A>(), var.mutable_data_ptr<A>());
  });
  return {mean, var};
}

std::tuple<Tensor, Tensor, Tensor> bottleneck_backward(TensorList features, const Tensor& grad_y,
                                                       const Tensor& scale, const Tensor& shift,
                                                       const Tensor& mean, const Tensor& weight,
                                                       TensorList grad_features, bool accumulate,
                                                       bool need_features, bool need_weight,
                                                       TensorList correction) {
  constexpr const char* op = "bottleneck_backward";
  check_bottleneck_backward(op, features, grad_y, scale, shift, mean, weight, grad_features, correction);
  const Correction missing = Correction::of(correction);
  const Tensor& first = features[0];
  const int64_t channels = scale.numel(), out_channels = weight.size(0);

  const bool nothing = grad_y.numel() == 0;
  const auto result = [&](at::IntArrayRef sizes, bool is_written) {
    return is_written && !nothing ? at::empty(sizes, scale.options()) : at::zeros(sizes, scale.options());
  };
  Tensor grad_weight = result({need_weight ? out_channels : 0, channels}, true);
  Tensor sum_d = result({channels}, true), sum_dx = result({channels}, true);
  if (nothing) return {grad_weight, sum_d, sum_dx};

  EFFDENSE_DISPATCH(first.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Rows<A>& wide = rows<A>();
    const Features<T> x(features), dy(grad_y);
    const std::optional<Features<T>> y = missing.any() ? std::optional<Features<T>>(missing.y) : std::nullopt;
    std::vector<Block<T>> grads;
    for (size_t i = 0; i < grad_features.size(); ++i) {
      const std::string name = "grad_features[" + std::to_string(i) + "]";
      const bool wanted = grad_features[i].numel() > 0;
      grads.push_back(wanted ? writable<T>(op, name.c_str(), grad_features[i]) : Block<T>{nullptr, 0});
    }
    const Tensor wide_w = wide_weight(weight, scale);
    const int64_t pixels = first.size(0) * count_pixels(first);
    Factor<A> w(out_channels, channels, scale.options(), pixels);
    w.from(wide_w.const_data_ptr<A>());
    const Tiling tiles(pixels, tile_rows<A>(2 * channels + out_channels));
    const int64_t step = tiles.step();
    const int64_t z_step = row_step<A>(channels);
    const int64_t per_slot = step * (2 * z_step + channels + 3 * out_channels) + kPanel;
    const Tensor scratch = at::empty({tiles.slots(), per_slot}, scale.options());
    // The first slot's sums are made in the result.
    const Tensor partial =
        at::empty({need_weight ? tiles.slots() - 1 : 0, out_channels, channels}, scale.options());
    const auto sum_of = [&](int64_t slot) {
      return slot == 0 ? grad_weight.mutable_data_ptr<A>()
                       : partial.mutable_data_ptr<A>() + (slot - 1) * out_channels * channels;
    };
    std::vector<char> started(tiles.slots());
    Sums sums(tiles.slots(), channels);
    tiles.for_each([&](int64_t slot, Tile tile) {
      A* x_scratch = scratch.mutable_data_ptr<A>() + slot * per_slot;
      const Block<A> z{x_scratch + step * channels, z_step}, dz{z.data + step * z_step, z_step};
      A* dy_scratch = dz.data + step * z_step;
      const Block<A> transposed{dy_scratch + step * out_channels, step};
      const Block<const A> tile_x = x.template read<A>(loops, tile, x_scratch);
      Block<const A> tile_dy = dy.template read<A>(loops, tile, dy_scratch);
      if (y) {
        const Block<A> corrected{dy_scratch, out_channels};
        const Block<const A> tile_y = y->template read<A>(loops, tile, dy_scratch + 2 * step * out_channels);
        const A *y_mean = missing.mean.const_data_ptr<A>(), *a = missing.a.const_data_ptr<A>(),
                *b = missing.b.const_data_ptr<A>();
        if (missing.masks()) {  // relu's backward too
          if (tile_dy.data != corrected.data) wide.copy(tile.rows(), out_channels, tile_dy, corrected);
          wide.bn_relu_backward(tile.rows(), out_channels, tile_y, missing.scale.const_data_ptr<A>(),
                                missing.shift.const_data_ptr<A>(), y_mean, a, b, corrected);
        } else {
          wide.apply_correction(tile.rows(), out_channels, tile_y, y_mean, a, b, tile_dy, corrected);
        }
        tile_dy = constant(corrected);
      }
      wide.bn_relu(tile.rows(), channels, tile_x, scale.const_data_ptr<A>(), shift.const_data_ptr<A>(), z);
      if (need_weight) {
        const Block<A> to{sum_of(slot), channels};
        add_transposed(tile.rows(), out_channels, channels, tile_dy, constant(z), to, started[slot],
                       transposed, grads.size() == 1 ? ahead(grads[0], tile, channels) : Ahead{});
        started[slot] = true;
      }
      if (!need_features) return;
      const auto grad_of = [&](size_t i) {
        return grads[i].data == nullptr ? grads[i] : from_row(grads[i], tile.first);
      };
      if (grads.size() == 1) {
        w.multiply_backward(loops, tile.rows(), tile_dy, dz,
                            {tile_x, constant(z), mean.const_data_ptr<A>(), scale.const_data_ptr<A>(),
                             grad_of(0), accumulate, sums.d(slot), sums.dx(slot)},
                            x.ahead(tiles.after(tile)));
        return;
      }
      w.multiply(tile.rows(), tile_dy, dz);
      int64_t c = 0;
      for (size_t i = 0; i < grads.size(); ++i) {
        const int64_t count = features[i].size(1);
        loops.bottleneck_backward(tile.rows(), count, from_column(tile_x, c), mean.const_data_ptr<A>() + c,
                                  constant(from_column(z, c)), constant(from_column(dz, c)),
                                  scale.const_data_ptr<A>() + c, grad_of(i), accumulate, sums.d(slot) + c,
                                  sums.dx(slot) + c);
        c += count;
      }
    });
    for (int64_t slot = 1; need_weight && slot < tiles.slots(); ++slot) grad_weight.add_(partial[slot - 1]);
    sums.template write<A>(sum_d, sum_dx);
  });
  return {grad_weight, sum_d, sum_dx};
}

}  // namespace

TORCH_LIBRARY_IMPL(effdense, CPU, m) {
  EFFDENSE_IMPLEMENT_PUTTING(m, bottleneck, StatisticsTo);
  EFFDENSE_IMPLEMENT_PUTTING(m, bottleneck_backward, SumsTo);
}

}  // namespace effdense
