// What the CPU operators share: feature maps as lists of planes, and tiles of pixels small enough to stay in
// cache.
//
// A list of features [N, C_i, *spatial] is read where it lies: every image of every feature is a dense matrix
// of C_i rows (channels) by `pixels` columns; only the step from image to image is free. So a list, a slice
// of a larger buffer, and the prefix of a block's feature buffer are all the same thing here.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu/rows.h"

namespace effdense {

inline int64_t count_pixels(const Tensor& x) {
  int64_t pixels = 1;
  for (int64_t i = 2; i < x.dim(); ++i) pixels *= x.size(i);
  return pixels;
}

// True where every image of x is a dense [C, *spatial] block.
inline bool images_are_dense(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t i = x.dim() - 1; i >= 1; --i) {
    if (x.size(i) != 1 && x.stride(i) != expected) return false;
    expected *= x.size(i);
  }
  return true;
}

template <typename T>
struct Plane {
  T* data;               // the channel's row in image 0
  int64_t image_stride;  // elements from image to image
  T* row(int64_t image) const { return data + image * image_stride; }
};

// One Plane per channel of a list of features. Keeps dense copies of features that are not dense alive.
template <typename T>
class Planes {
 public:
  static Planes readable(TensorList features) {
    Planes planes;
    for (const Tensor& feature : features) {
      const Tensor dense = images_are_dense(feature) ? feature : feature.contiguous();
      planes.dense_.push_back(dense);
      planes.append(dense, const_cast<T*>(static_cast<const T*>(dense.const_data_ptr())));
    }
    return planes;
  }

  // For writing: the tensors must be dense; an empty one gives rows that are null.
  static Planes writable(const char* op, const char* name, TensorList tensors, TensorList like) {
    Planes planes;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const bool wanted = tensors[i].numel() > 0;
      TORCH_CHECK_VALUE(!wanted || images_are_dense(tensors[i]), op, ": ", name,
                        " must be dense in every image (written in place), got strides ",
                        tensors[i].strides());
      planes.append(wanted ? tensors[i] : like[i],
                    wanted ? static_cast<T*>(tensors[i].mutable_data_ptr()) : nullptr);
    }
    return planes;
  }

  const Plane<T>& operator[](int64_t channel) const { return planes_[channel]; }
  int64_t channels() const { return static_cast<int64_t>(planes_.size()); }

 private:
  Planes() = default;
  void append(const Tensor& x, T* data) {
    const int64_t pixels = count_pixels(x);
    for (int64_t c = 0; c < x.size(1); ++c)
      planes_.push_back(data == nullptr ? Plane<T>{nullptr, 0} : Plane<T>{data + c * pixels, x.stride(0)});
  }

  std::vector<Tensor> dense_;
  std::vector<Plane<T>> planes_;
};

// Whole images first_image..last_image, or a piece of one: pixels first_pixel..last_pixel of each.
struct Tile {
  int64_t first_image, last_image, first_pixel, last_pixel;
  int64_t images() const { return last_image - first_image; }
  int64_t pixels() const { return last_pixel - first_pixel; }
  int64_t columns() const { return images() * pixels(); }
};

// Cuts N images of `pixels` pixels into tiles of at most `columns` columns (or one image, where that is
// smaller).
class Tiling {
 public:
  Tiling(int64_t images, int64_t pixels, int64_t columns) : images_(images), pixels_(pixels) {
    if (images == 0 || pixels == 0) return;
    pieces_ = (pixels + columns - 1) / columns;
    step_ = (pixels + pieces_ - 1) / pieces_;
    if (pieces_ > 1) step_ = (step_ + 15) / 16 * 16;
    pieces_ = (pixels + step_ - 1) / step_;
    group_ = pieces_ > 1 ? 1 : std::max<int64_t>(1, columns / pixels);
    count_ = (images + group_ - 1) / group_ * pieces_;
  }
  int64_t count() const { return count_; }
  int64_t columns() const { return group_ * step_; }
  Tile operator[](int64_t i) const {
    const int64_t image = i / pieces_ * group_, pixel = i % pieces_ * step_;
    return {image, std::min(image + group_, images_), pixel, std::min(pixel + step_, pixels_)};
  }

 private:
  int64_t images_, pixels_, pieces_ = 1, step_ = 0, group_ = 1, count_ = 0;
};

// Runs body(slot, begin, end) over a fixed cut of `count` items, one slot per thread: sums kept per slot and
// merged in order are bitwise repeatable for a given thread count.
inline int64_t count_slots(int64_t count) {
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), count));
}

template <typename Body>
void for_each_slot(int64_t slots, int64_t count, const Body& body) {
  at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot)
      body(slot, count * slot / slots, count * (slot + 1) / slots);
  });
}

// Mean and sum of squares about it, merged pair by pair (Chan, Golub, LeVeque 1983), in double.
struct Moments {
  double count = 0, mean = 0, m2 = 0;
  void merge(double other_count, double other_mean, double other_m2) {
    if (other_count == 0) return;
    const double total = count + other_count, delta = other_mean - mean;
    mean += delta * other_count / total;
    m2 += other_m2 + delta * delta * count * other_count / total;
    count = total;
  }
  // Biased; 1 where there is no value.
  double variance() const { return count > 0 ? m2 / count : 1.0; }
};

template <typename scalar_t>
using storage_t = std::conditional_t<std::is_same_v<scalar_t, at::BFloat16>, bfloat16, scalar_t>;

// The types that the CPU operators are built for; T is the storage type, A the one for sums.
#define EFFDENSE_DISPATCH(type, name, ...)                        \
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, type, name, [&] { \
    using T = storage_t<scalar_t>;                                \
    using A = acc_t<T>;                                           \
    __VA_ARGS__();                                                \
  })

}  // namespace effdense
