// The 3x3 convolution of conv3x3.cpp for maps of few pixels, as products that read the weight where it lies.
// Each pixel's neighbours are laid side by side, in the weight's order. To lay the weight out for bands of
// many pixels would cost more than all products with it.
#pragma once

#include "cpu/gemm.h"

namespace effdense {

constexpr int64_t kFewPixels = 20;

// Its parts, for maps as lines of pixels (conv3x3.cpp's Grid) of so many channels.
template <typename Grid>
class FewPixels {
 public:
  FewPixels(const Products& products, const Grid& grid, int64_t channels)
      : products_(products),
        grid_(grid),
        channels_(channels),
        pixels_(grid.lines * grid.width),
        columns_(channels * grid.taps()) {}

  int64_t pixels() const { return pixels_; }
  // Of a matrix with what each pixel reads.
  int64_t columns() const { return columns_; }

  // around [pixels, columns] of z [pixels, channels]: zero outside of the images.
  void gather(const float* z, float* around) const {
    each_part(channels_, 1, [&](int64_t c0, int64_t c1) {
      for (int64_t p = 0; p < pixels_; ++p)
        std::fill(around + p * columns_ + c0 * grid_.taps(), around + p * columns_ + c1 * grid_.taps(), 0.0f);
      for_each_tap([&](int64_t p, int64_t q, int64_t tap) {
        float* to = around + p * columns_ + tap;
        const float* from = z + q * channels_;
        for (int64_t c = c0; c < c1; ++c) to[c * grid_.taps()] = from[c];
      });
    });
  }
  // The other way round: every pixel's sum of what was made for it among what others read.
  void scatter(const float* around, float* dz) const {
    each_part(channels_, 1, [&](int64_t c0, int64_t c1) {
      for (int64_t p = 0; p < pixels_; ++p) std::fill(dz + p * channels_ + c0, dz + p * channels_ + c1, 0.0f);
      for_each_tap([&](int64_t p, int64_t q, int64_t tap) {
        const float* from = around + p * columns_ + tap;
        float* to = dz + q * channels_;
        for (int64_t c = c0; c < c1; ++c) to[c] += from[c * grid_.taps()];
      });
    });
  }

  // out [pixels, k] = around w^T, w [k, columns].
  void convolve(int64_t k, const float* around, const float* w, float* out) const {
    each_part(k, 1, [&](int64_t o0, int64_t o1) {
      products_.multiply_by_transposed(pixels_, o1 - o0, columns_, {around, columns_},
                                       {w + o0 * columns_, columns_}, {out + o0, k});
    });
  }
  // grad_w [k, columns] = g^T around, g [pixels, k].
  void weight_gradient(int64_t k, const float* g, const float* around, float* grad_w) const {
    each_part(k, 1, [&](int64_t o0, int64_t o1) {
      products_.add_transposed(pixels_, o1 - o0, columns_, {g + o0, k}, {around, columns_},
                               {grad_w + o0 * columns_, columns_}, false, Ahead{});
    });
  }
  // grad_around [pixels, columns] = g w.
  void input_gradient(int64_t k, const float* g, const float* w, float* grad_around) const {
    each_part(columns_, kPanel, [&](int64_t c0, int64_t c1) {
      products_.multiply(pixels_, c1 - c0, k, {g, k}, Panels{w + c0, kPanel, columns_},
                         {grad_around + c0, columns_}, Ahead{});
    });
  }

 private:
  // Runs body(from, to) for a part of `count` per thread, in multiples of `unit`.
  template <typename Body>
  static void each_part(int64_t count, int64_t unit, const Body& body) {
    const int64_t units = count / unit, slots = count_slots(units);
    at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
      body(units * begin / slots * unit, units * end / slots * unit);
    });
  }

  // Calls body(pixel, the one that it reads, through which tap).
  template <typename Body>
  void for_each_tap(const Body& body) const {
    for (int64_t line = 0; line < grid_.lines; ++line)
      grid_.for_each_read(line, [&](int64_t part, int64_t row, int64_t read) {
        if (read < 0) return;
        for (int64_t x = 0; x < grid_.width; ++x)
          for (int64_t i = 0; i < grid_.across; ++i) {
            const int64_t at = x + i - grid_.across / 2;
            if (0 <= at && at < grid_.width)
              body(line * grid_.width + x, read * grid_.width + at, (part * 3 + row) * grid_.across + i);
          }
      });
  }

  const Products& products_;
  const Grid& grid_;
  int64_t channels_, pixels_, columns_;
};

// Whether a convolution of maps of such a grid, with sums in A, is one of few pixels.
template <typename A, typename Grid>
bool has_few_pixels(const Grid& grid, int64_t channels) {
  // Whole panels of the weight are read.
  return own_products<A>() != nullptr && grid.lines * grid.width <= kFewPixels &&
         channels * grid.taps() % kPanel == 0;
}

}  // namespace effdense
