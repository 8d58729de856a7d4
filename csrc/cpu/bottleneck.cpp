// bottleneck: y = W relu(scale * x + shift) + bias over a list of feature maps, and its backward.
//
// Forward, per tile of pixels: the prologue writes z [channels, columns] into a scratch that stays in L2, one
// GEMM makes y, the epilogue stores it and takes its statistics. Backward, per tile: z again, dz = W^T dy by
// one GEMM, dW += dy z^T by another, and one pass that masks, sums and writes the gradients. Neither z nor dz
// is ever stored.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/gemm.h"
#include "cpu/tiles.h"

namespace effdense {
namespace {

// Scratch of one thread, in bytes, that should stay in its L2 cache.
constexpr int64_t kTileBytes = 512 * 1024;

// Columns per tile so that `rows` rows of A fit; never so few that the GEMM starves.
template <typename A>
int64_t tile_columns(int64_t rows) {
  const int64_t columns = kTileBytes / static_cast<int64_t>(sizeof(A)) / std::max<int64_t>(rows, 1);
  return std::clamp<int64_t>(columns / 16 * 16, 64, 512);
}

// `rows` of images [rows, pixels] gathered into one matrix [rows, tile.columns()] of the accumulation type.
template <typename T, typename A>
void load_tile(const Rows<T>& loops, const Planes<T>& x, const Tile& tile, A* out) {
  const int64_t columns = tile.columns(), pixels = tile.pixels();
  for (int64_t c = 0; c < x.channels(); ++c)
    for (int64_t i = 0; i < tile.images(); ++i)
      loops.load(pixels, x[c].row(tile.first_image + i) + tile.first_pixel, out + c * columns + i * pixels);
}

// z = relu(scale * x + shift) of one tile, [channels, columns]
template <typename T, typename A>
void prologue(const Rows<T>& loops, const Planes<T>& x, const Tile& tile, const A* scale, const A* shift,
              A* z) {
  const int64_t columns = tile.columns(), pixels = tile.pixels();
  for (int64_t c = 0; c < x.channels(); ++c)
    for (int64_t i = 0; i < tile.images(); ++i)
      loops.bn_relu(pixels, x[c].row(tile.first_image + i) + tile.first_pixel, scale[c], shift[c],
                    z + c * columns + i * pixels);
}

// Stores one tile of y and merges each channel's moments, taken from the values as stored.
template <typename T, typename A>
void epilogue(const Rows<T>& loops, const A* tile_y, const A* bias, const Tile& tile, const Planes<T>& y,
              A* row, Moments* moments) {
  const int64_t columns = tile.columns(), pixels = tile.pixels();
  for (int64_t o = 0; o < y.channels(); ++o) {
    for (int64_t i = 0; i < tile.images(); ++i) {
      const A* from = tile_y + o * columns + i * pixels;
      if (bias != nullptr) {
        for (int64_t p = 0; p < pixels; ++p) row[p] = from[p] + bias[o];
        from = row;
      }
      T* to = y[o].row(tile.first_image + i) + tile.first_pixel;
      loops.store(pixels, from, to);
      if (moments == nullptr) continue;
      double mean, m2;
      loops.moments(pixels, to, &mean, &m2);
      moments[o].merge(static_cast<double>(pixels), mean, m2);
    }
  }
}

template <typename A>
void write_moments(const std::vector<Moments>& moments, int64_t slots, int64_t channels, A* mean, A* var) {
  for (int64_t c = 0; c < channels; ++c) {
    Moments total;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const Moments& part = moments[slot * channels + c];
      total.merge(part.count, part.mean, part.m2);
    }
    mean[c] = static_cast<A>(total.mean);
    var[c] = static_cast<A>(total.variance());
  }
}

std::tuple<Tensor, Tensor, Tensor> bottleneck(TensorList features, const Tensor& scale, const Tensor& shift,
                                              const Tensor& weight, const std::optional<Tensor>& bias,
                                              bool statistics) {
  constexpr const char* op = "bottleneck";
  check_features(op, features);
  const Tensor& first = features[0];
  const int64_t channels = count_channels(features);
  check_per_channel(op, "scale", scale, first, channels);
  check_per_channel(op, "shift", shift, first, channels);
  check_weight(op, weight, first, channels);
  const int64_t out_channels = weight.size(0);
  if (bias) check_per_channel(op, "bias", *bias, first, out_channels);

  std::vector<int64_t> sizes = first.sizes().vec();
  sizes[1] = out_channels;
  Tensor y = at::empty(sizes, first.options().memory_format(at::MemoryFormat::Contiguous));
  Tensor mean = at::zeros({statistics ? out_channels : 0}, scale.options());
  Tensor var = at::ones({statistics ? out_channels : 0}, scale.options());
  if (y.numel() == 0) return {y, mean, var};

  EFFDENSE_DISPATCH(first.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Planes<T> x = Planes<T>::readable(features);
    const Planes<T> out = Planes<T>::writable(op, "y", {y}, {y});
    const Tensor w = weight.to(scale.scalar_type());
    A* w_data = const_cast<A*>(w.const_data_ptr<A>());  // only read; a Matrix can be written
    const A* bias_data = bias ? bias->const_data_ptr<A>() : nullptr;
    const Tiling tiles(first.size(0), count_pixels(first), tile_columns<A>(channels + out_channels));
    const int64_t slots = count_slots(tiles.count()), width = tiles.columns();
    const Tensor scratch = at::empty({slots, channels + out_channels + 1, width}, scale.options());
    std::vector<Moments> moments(statistics ? slots * out_channels : 0);
    for_each_slot(slots, tiles.count(), [&](int64_t slot, int64_t begin, int64_t end) {
      A* z = scratch.mutable_data_ptr<A>() + slot * (channels + out_channels + 1) * width;
      A* tile_y = z + channels * width;
      A* row = tile_y + out_channels * width;
      for (int64_t t = begin; t < end; ++t) {
        const Tile tile = tiles[t];
        const int64_t columns = tile.columns();
        prologue(loops, x, tile, scale.const_data_ptr<A>(), shift.const_data_ptr<A>(), z);
        gemm<A>({w_data, out_channels, channels, channels}, {z, channels, columns, columns},
                {tile_y, out_channels, columns, columns}, false);
        epilogue(loops, tile_y, bias_data, tile, out, row,
                 statistics ? &moments[slot * out_channels] : nullptr);
      }
    });
    if (statistics)
      write_moments(moments, slots, out_channels, mean.mutable_data_ptr<A>(), var.mutable_data_ptr<A>());
  });
  return {y, mean, var};
}

// Masks dz, adds up the sums and writes the gradients of one tile.
template <typename T, typename A>
void mask_and_write(const Rows<T>& loops, const Planes<T>& x, const Planes<T>& grad, const Tile& tile,
                    const A* scale, const A* mean, const A* z, const A* dz, std::vector<double>& sums) {
  const int64_t columns = tile.columns(), pixels = tile.pixels();
  for (int64_t c = 0; c < x.channels(); ++c)
    for (int64_t i = 0; i < tile.images(); ++i) {
      const int64_t image = tile.first_image + i, offset = c * columns + i * pixels;
      T* to = grad[c].data == nullptr ? nullptr : grad[c].row(image) + tile.first_pixel;
      A row_sums[2];
      loops.bottleneck_backward(pixels, x[c].row(image) + tile.first_pixel, mean[c], z + offset, dz + offset,
                                scale[c], to, row_sums);
      sums[2 * c] += row_sums[0];
      sums[2 * c + 1] += row_sums[1];
    }
}

std::tuple<Tensor, Tensor, Tensor> bottleneck_backward(TensorList features, const Tensor& grad_y,
                                                       const Tensor& scale, const Tensor& shift,
                                                       const Tensor& mean, const Tensor& weight,
                                                       TensorList grad_features, bool need_features,
                                                       bool need_weight) {
  constexpr const char* op = "bottleneck_backward";
  check_features(op, features);
  const Tensor& first = features[0];
  const int64_t channels = count_channels(features);
  check_per_channel(op, "scale", scale, first, channels);
  check_per_channel(op, "shift", shift, first, channels);
  check_per_channel(op, "mean", mean, first, channels);
  check_weight(op, weight, first, channels);
  const int64_t out_channels = weight.size(0);
  check_same_images(op, "grad_y", grad_y, first);
  TORCH_CHECK_VALUE(grad_y.size(1) == out_channels, op, ": grad_y must have ", out_channels,
                    " channels (the weight's rows), got shape ", grad_y.sizes());
  check_grad_features(op, grad_features, features);

  Tensor grad_weight = at::zeros({need_weight ? out_channels : 0, channels}, scale.options());
  Tensor sum_d = at::zeros({channels}, scale.options()), sum_dx = at::zeros({channels}, scale.options());
  if (grad_y.numel() == 0) return {grad_weight, sum_d, sum_dx};

  EFFDENSE_DISPATCH(first.scalar_type(), op, [&] {
    const Rows<T>& loops = rows<T>();
    const Planes<T> x = Planes<T>::readable(features), dy = Planes<T>::readable(grad_y);
    const Planes<T> grad = Planes<T>::writable(op, "grad_features", grad_features, features);
    const Tensor w = weight.to(scale.scalar_type());
    A* w_data = const_cast<A*>(w.const_data_ptr<A>());
    const Tiling tiles(first.size(0), count_pixels(first), tile_columns<A>(2 * channels + out_channels));
    const int64_t slots = count_slots(tiles.count()), width = tiles.columns(),
                  rows_used = 2 * channels + out_channels;
    const Tensor scratch = at::empty({slots, rows_used, width}, scale.options());
    const Tensor partial = at::zeros({need_weight ? slots : 0, out_channels, channels}, scale.options());
    std::vector<std::vector<double>> sums(slots, std::vector<double>(2 * channels));
    for_each_slot(slots, tiles.count(), [&](int64_t slot, int64_t begin, int64_t end) {
      A* z = scratch.mutable_data_ptr<A>() + slot * rows_used * width;
      A* dz = z + channels * width;
      A* tile_dy = dz + channels * width;
      for (int64_t t = begin; t < end; ++t) {
        const Tile tile = tiles[t];
        const int64_t columns = tile.columns();
        const Matrix<A> z_matrix{z, channels, columns, columns},
            dy_matrix{tile_dy, out_channels, columns, columns};
        load_tile(loops, dy, tile, tile_dy);
        prologue(loops, x, tile, scale.const_data_ptr<A>(), shift.const_data_ptr<A>(), z);
        if (need_weight)
          gemm<A>(dy_matrix, z_matrix.t(),
                  {partial.mutable_data_ptr<A>() + slot * out_channels * channels, out_channels, channels,
                   channels},
                  true);
        if (!need_features) continue;
        gemm<A>(Matrix<A>{w_data, out_channels, channels, channels}.t(), dy_matrix,
                {dz, channels, columns, columns}, false);
        mask_and_write(loops, x, grad, tile, scale.const_data_ptr<A>(), mean.const_data_ptr<A>(), z, dz,
                       sums[slot]);
      }
    });
    for (int64_t slot = 0; need_weight && slot < slots; ++slot) grad_weight.add_(partial[slot]);
    A *sum_d_data = sum_d.mutable_data_ptr<A>(), *sum_dx_data = sum_dx.mutable_data_ptr<A>();
    for (int64_t c = 0; c < channels; ++c) {
      double d = 0, dx = 0;
      for (const std::vector<double>& part : sums) {
        d += part[2 * c];
        dx += part[2 * c + 1];
      }
      sum_d_data[c] = static_cast<A>(d);
      sum_dx_data[c] = static_cast<A>(dx);
    }
  });
  return {grad_weight, sum_d, sum_dx};
}

}  // namespace

TORCH_LIBRARY_IMPL(effdense, CPU, m) {
  m.impl("bottleneck", bottleneck);
  m.impl("bottleneck_backward", bottleneck_backward);
}

}  // namespace effdense
