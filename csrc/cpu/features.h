// Feature maps that are read where they lie, as matrices. Features that a user passes may also lie channel by
// channel; they are transposed tile by tile.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/products.h"
#include "cpu/tiling.h"
#include "maps.h"

namespace effdense {

// A map that is read as a matrix, and the copy that this may have taken.
template <typename T>
struct Readable {
  explicit Readable(const Tensor& x)
      : dense(matrix_step(x) ? x : channels_last_copy(x)),
        block{static_cast<const T*>(dense.const_data_ptr()), *matrix_step(dense)} {}
  Tensor dense;
  Block<const T> block;
};

// A map that is written in place as a matrix: no copy can stand in for it.
template <typename T>
Block<T> writable(const char* op, const char* name, const Tensor& x) {
  const int64_t step = writable_step(op, name, x);
  return {static_cast<T*>(x.mutable_data_ptr()), step};
}

template <typename T>
Block<T> from_row(Block<T> block, int64_t row) {
  return {block.data + row * block.step, block.step};
}
template <typename T>
Block<T> from_column(Block<T> block, int64_t column) {
  return {block.data + column, block.step};
}
template <typename A>
Block<const A> constant(Block<A> block) {
  return {block.data, block.step};
}

// A list of features [N, C_i, *spatial] read where it lies: each either pixel by pixel or channel by channel.
template <typename T>
class Features {
 public:
  explicit Features(TensorList features) : pixels_(count_pixels(features[0])) {
    for (const Tensor& feature : features) {
      const std::optional<int64_t> step = matrix_step(feature);
      const bool planes = !step && pixel_step(feature) == 1;
      const Tensor x = step || planes ? feature : channels_last_copy(feature);
      const Block<const T> block{static_cast<const T*>(x.const_data_ptr()),
                                 planes ? x.stride(1) : *matrix_step(x)};
      maps_.push_back({x, block, x.size(1), planes ? x.stride(0) : 0, planes});
      channels_ += x.size(1);
    }
  }

  // One tile of all features as a matrix [tile.rows(), channels]: where it lies, else in `scratch`.
  template <typename A>
  Block<const A> read(const Rows<T>& loops, Tile tile, A* scratch) const {
    if constexpr (std::is_same_v<T, A>)
      if (maps_.size() == 1 && !maps_[0].planes) return from_row(maps_[0].block, tile.first);
    Block<A> out{scratch, channels_};
    for (const Map& map : maps_) {
      if (map.planes)
        read_planes(loops, map, tile, out);
      else
        loops.load(tile.rows(), map.channels, from_row(map.block, tile.first), out);
      out = from_column(out, map.channels);
    }
    return {scratch, channels_};
  }

  // A tile for a product to fetch: of one map that lies pixel by pixel.
  Ahead ahead(Tile tile) const {
    const bool one = maps_.size() == 1 && !maps_[0].planes;
    return one ? effdense::ahead(maps_[0].block, tile, maps_[0].channels) : Ahead{};
  }

 private:
  struct Map {
    Tensor keep;
    Block<const T> block;  // step: from pixel to pixel; with `planes` from channel to channel
    int64_t channels, image_stride;
    bool planes;  // channel by channel
  };

  template <typename A>
  void read_planes(const Rows<T>& loops, const Map& map, Tile tile, Block<A> out) const {
    for (int64_t row = tile.first; row < tile.last;) {
      const int64_t image = row / pixels_, pixel = row % pixels_;
      const int64_t count = std::min(pixels_ - pixel, tile.last - row);
      const Block<const T> from{map.block.data + image * map.image_stride + pixel, map.block.step};
      loops.load_transposed(count, map.channels, from, from_row(out, row - tile.first));
      row += count;
    }
  }

  int64_t pixels_, channels_ = 0;
  std::vector<Map> maps_;
};

}  // namespace effdense
