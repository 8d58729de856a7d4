// Sums per channel that threads collect apart and merge in order.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "cpu/products.h"

namespace effdense {

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
