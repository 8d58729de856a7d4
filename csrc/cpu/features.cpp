// Operators on features: their statistics, taken once when they are produced (channel_statistics,
// append_features), and apply_correction, the part of batch normalisation's backward that needs the sums of
// the whole batch.
#include "cpu/features.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "cpu/moments.h"
#include "cpu/results.h"
#include "cpu/tiling.h"

namespace effdense {
namespace {

std::tuple<Tensor, Tensor> channel_statistics(TensorList features) {
  constexpr const char* op = "channel_statistics";
  check_features(op, features);
  const Tensor& first = features[0];
  const auto options = first.options().dtype(accumulate_type(first.scalar_type()));
  const int64_t channels = count_channels(features);
  Tensor mean = at::empty({channels}, options), var = at::empty({channels}, options);
  EFFDENSE_DISPATCH(first.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Features<T> x(features);
    const Tiling tiles(first.size(0) * count_pixels(first), kRows);
    const Tensor scratch = at::empty({tiles.slots(), tiles.step() * channels}, options);
    Moments moments(tiles.slots(), channels);
    tiles.for_each([&](int64_t slot, Tile tile) {
      A* tile_scratch = scratch.mutable_data_ptr<A>() + slot * tiles.step() * channels;
      moments.add(rows<A>(), slot, tile.rows(), x.template read<A>(loops, tile, tile_scratch));
    });
    moments.write(mean.mutable_data_ptr<A>(), var.mutable_data_ptr<A>());
  });
  return {mean, var};
}

std::tuple<Tensor, Tensor> append_features(const Tensor& new_features, Tensor& out) {
  constexpr const char* op = "append_features";
  check_append_features(op, new_features, out);
  const auto options = out.options().dtype(accumulate_type(out.scalar_type()));
  const int64_t channels = out.size(1);
  Tensor mean = at::empty({channels}, options), var = at::empty({channels}, options);
  EFFDENSE_DISPATCH(out.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Readable<T> x(new_features);
    const Block<T> to = writable<T>(op, "out", out);
    const Tiling tiles(out.size(0) * count_pixels(out), kRows);
    Moments moments(tiles.slots(), channels);
    tiles.for_each([&](int64_t slot, Tile tile) {
      loops.copy(tile.rows(), channels, from_row(x.block, tile.first), from_row(to, tile.first));
      moments.add(loops, slot, tile.rows(), from_row(x.block, tile.first));
    });
    moments.write(mean.mutable_data_ptr<A>(), var.mutable_data_ptr<A>());
  });
  return {mean, var};
}

void apply_correction(const Tensor& x, const Tensor& mean, const Tensor& a, const Tensor& b,
                      const Tensor& grad, Tensor& out) {
  constexpr const char* op = "apply_correction";
  check_apply_correction(op, x, mean, a, b, grad, out);
  const int64_t channels = x.size(1);
  EFFDENSE_DISPATCH(x.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Readable<T> from(x), g(grad);
    const Block<T> to = writable<T>(op, "out", out);
    Tiling(x.size(0) * count_pixels(x), kRows).for_each([&](int64_t, Tile tile) {
      loops.apply_correction(tile.rows(), channels, from_row(from.block, tile.first),
                             mean.const_data_ptr<A>(), a.const_data_ptr<A>(), b.const_data_ptr<A>(),
                             from_row(g.block, tile.first), from_row(to, tile.first));
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(effdense, CPU, m) {
  EFFDENSE_IMPLEMENT_PUTTING(m, channel_statistics, StatisticsTo);
  EFFDENSE_IMPLEMENT_PUTTING(m, append_features, StatisticsTo);
  EFFDENSE_IMPLEMENT(m, cpu_backend, apply_correction);
}

}  // namespace effdense
