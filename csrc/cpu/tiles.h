// Shared by the CPU operators: feature maps that are read where they lie, tiles of pixels small enough to
// stay in cache, and statistics that are merged tile by tile. Features that a user passes may also lie
// channel by channel; they are transposed tile by tile.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/products.h"
#include "maps.h"

namespace effdense {

template <typename scalar_t>
using storage_t = std::conditional_t<std::is_same_v<scalar_t, at::BFloat16>, bfloat16, scalar_t>;

// The types that the CPU operators are built for; T is the storage type, A the one for sums.
#define EFFDENSE_DISPATCH(type, name, ...)                        \
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, type, name, [&] { \
    using T = storage_t<scalar_t>;                                \
    using A = acc_t<T>;                                           \
    __VA_ARGS__();                                                \
  })

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

// Rows (pixels of all images) first..last.
struct Tile {
  int64_t first, last;
  int64_t rows() const { return last - first; }
};

// A tile of a matrix with so many columns, for a product to fetch; nothing of one that is null.
template <typename T>
Ahead ahead(Block<T> block, Tile tile, int64_t columns) {
  if (block.data == nullptr) return {};
  constexpr int64_t size = sizeof(T);
  return {block.row(tile.first), block.step * size, columns * size, tile.rows()};
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

// Pieces of work are cut into one slot per thread, always the same way: sums kept per slot and merged in
// order are bitwise repeatable for a given thread count.
inline int64_t count_slots(int64_t pieces) {
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), pieces));
}

// Runs body(slot, piece), a slot's pieces in order.
template <typename Body>
void for_each_piece(int64_t pieces, const Body& body) {
  const int64_t slots = count_slots(pieces);
  at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t i = pieces * slot / slots; i < pieces * (slot + 1) / slots; ++i) body(slot, i);
  });
}

// Cuts `rows` rows into tiles of at most `limit` rows, as many for each of `slots` threads as can be.
class Tiling {
 public:
  Tiling(int64_t rows, int64_t limit) : rows_(rows) {
    if (rows == 0) return;
    const int64_t threads = at::get_num_threads();
    const int64_t wanted = (rows + limit - 1) / limit;
    const int64_t even = (wanted + threads - 1) / threads * threads;
    step_ = (((rows + even - 1) / even) + 7) / 8 * 8;
    count_ = (rows + step_ - 1) / step_;
  }
  int64_t count() const { return count_; }
  int64_t step() const { return step_; }
  int64_t slots() const { return count_slots(count_); }
  // The tile behind one, without rows behind the last.
  Tile after(Tile tile) const { return {tile.last, std::min(tile.last + step_, rows_)}; }
  Tile operator[](int64_t i) const { return {i * step_, std::min((i + 1) * step_, rows_)}; }

  // Runs body(slot, tile).
  template <typename Body>
  void for_each(const Body& body) const {
    for_each_piece(count_, [&](int64_t slot, int64_t i) { body(slot, (*this)[i]); });
  }

 private:
  int64_t rows_, step_ = 0, count_ = 0;
};

// Rows for loops that only pass over memory: few enough to be in L1 or L2 for a second pass.
constexpr int64_t kRows = 256;

// Per slot and channel: mean and sum of squares about it, merged pair by pair (Chan, Golub, LeVeque 1983), in
// double.
class Moments {
 public:
  Moments(int64_t slots, int64_t channels) : channels_(channels), all_(slots) {
    for (Part& part : all_) part.resize(channels);
  }

  // Adds a tile's values of one slot. Narrow rows without gaps are taken as fewer rows of several pixels
  // each, whose moments are then merged.
  template <typename T>
  void add(const Rows<T>& loops, int64_t slot, int64_t rows, Block<const T> x) {
    Part& part = all_[slot];
    int64_t fold = 1;
    while (x.step == channels_ && 2 * fold * channels_ <= 64 && rows % (2 * fold) == 0) fold *= 2;
    part.tile_mean.resize(fold * channels_);
    part.tile_m2.resize(fold * channels_);
    loops.moments(rows / fold, fold * channels_, {x.data, fold * x.step}, part.tile_mean.data(),
                  part.tile_m2.data());
    for (int64_t i = 0; i < fold; ++i)
      part.merge(static_cast<double>(rows / fold), &part.tile_mean[i * channels_],
                 &part.tile_m2[i * channels_]);
  }

  // Writes mean and biased variance; 0 and 1 where there was no value.
  template <typename A>
  void write(A* mean, A* var) {
    Part total;
    total.resize(channels_);
    for (Part& part : all_) total.merge(part.count, part.mean.data(), part.m2.data());
    for (int64_t c = 0; c < channels_; ++c) {
      mean[c] = static_cast<A>(total.mean[c]);
      var[c] = static_cast<A>(total.count > 0 ? total.m2[c] / total.count : 1.0);
    }
  }

 private:
  struct Part {
    double count = 0;
    std::vector<double> mean, m2, tile_mean, tile_m2;
    void resize(int64_t channels) {
      mean.resize(channels);
      m2.resize(channels);
    }
    void merge(double other, const double* other_mean, const double* other_m2) {
      if (other == 0) return;
      const double total = count + other, weight = other / total, cross = count * weight;
      for (size_t c = 0; c < mean.size(); ++c) {
        const double delta = other_mean[c] - mean[c];
        mean[c] += delta * weight;
        m2[c] += other_m2[c] + delta * delta * cross;
      }
      count = total;
    }
  };
  int64_t channels_;
  std::vector<Part> all_;
};

// Per slot and channel: the two sums that batch normalisation's backward needs.
class Sums {
 public:
  Sums(int64_t slots, int64_t channels)
      : channels_(channels), all_(slots, std::vector<double>(2 * channels)) {}

  double* d(int64_t slot) { return all_[slot].data(); }
  double* dx(int64_t slot) { return all_[slot].data() + channels_; }

  // Merges the slots into the first, in order.
  void merge() {
    for (size_t slot = 1; slot < all_.size(); ++slot)
      for (int64_t i = 0; i < 2 * channels_; ++i) all_[0][i] += all_[slot][i];
  }
  template <typename A>
  void write(const Tensor& sum_d, const Tensor& sum_dx) {
    merge();
    A *to_d = sum_d.mutable_data_ptr<A>(), *to_dx = sum_dx.mutable_data_ptr<A>();
    for (int64_t c = 0; c < channels_; ++c) {
      to_d[c] = static_cast<A>(d(0)[c]);
      to_dx[c] = static_cast<A>(dx(0)[c]);
    }
  }

 private:
  int64_t channels_;
  std::vector<std::vector<double>> all_;
};

}  // namespace effdense
