// Feature maps and vectors in memory of their own that ends where they end. What lies between a map's rows
// belongs to somebody else: AddressSanitizer is told so, and at the end it must be as it was.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/accumulate.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace effdense::sanitizers {

using Sizes = std::vector<int64_t>;

// A block of bytes with numbers of a type in it: small ones, of both signs, or all of them positive.
class Memory {
 public:
  Memory(int64_t count, at::ScalarType type, bool positive = false)
      : type_(type), size_(count * static_cast<int64_t>(c10::elementSize(type))), bytes_(new uint8_t[size_]) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t number = (i * 37 + 11) % 29;
      put(i, positive ? 0.25 + static_cast<double>(number) / 16 : static_cast<double>(number - 14) / 8);
    }
  }
  uint8_t* at(int64_t i) const { return bytes_.get() + i * static_cast<int64_t>(c10::elementSize(type_)); }
  int64_t size() const { return size_; }
  at::ScalarType type() const { return type_; }

 private:
  void put(int64_t i, double value) {
    const auto as = [&](auto number) { std::memcpy(at(i), &number, sizeof number); };
    if (type_ == at::kDouble) as(value);
    if (type_ == at::kFloat) as(static_cast<float>(value));
    if (type_ == at::kBFloat16) as(at::BFloat16(static_cast<float>(value)));
    if (type_ == at::kByte) as(static_cast<uint8_t>(i % 4));
  }
  at::ScalarType type_;
  int64_t size_;
  std::unique_ptr<uint8_t[]> bytes_;
};

// How a map lies in memory.
struct Lie {
  enum class Order {
    pixels,
    channels,
    reversed
  } order = Order::pixels;  // reversed: pixels, the last axis first
  int64_t before = 0,
          behind = 0;  // others' elements before and behind every row; `before` is what moves the beginning
};

// [N, C, *spatial].
class Map {
 public:
  Map(const Sizes& sizes, at::ScalarType type, Lie lie = {})
      : memory_(count(sizes, lie), type), lie_(lie), sizes_(sizes), before_(copy()) {
    Sizes strides(sizes.size());
    int64_t step = lie.order == Lie::Order::channels ? 1 : row();
    const auto axes = static_cast<int64_t>(sizes.size());
    for (int64_t i = 2; i < axes; ++i) {
      const int64_t axis = lie.order == Lie::Order::reversed ? i : axes + 1 - i;
      strides[axis] = step;
      step *= sizes[axis];
    }
    strides[1] = lie.order == Lie::Order::channels ? step : 1;
    strides[0] = lie.order == Lie::Order::channels ? step * sizes[1] : step;
    tensor_ = at::from_blob(memory_.at(lie.before), sizes, strides, at::dtype(type));
    others([](uint8_t* from, int64_t size) { ASAN_POISON_MEMORY_REGION(from, size); });
  }
  Map(const Map&) = delete;
  ~Map() { ASAN_UNPOISON_MEMORY_REGION(memory_.at(0), memory_.size()); }
  operator at::Tensor&() { return tensor_; }
  at::Tensor& tensor() { return tensor_; }

  // Whether what others own is as it was.
  void check(const char* op) {
    ASAN_UNPOISON_MEMORY_REGION(memory_.at(0), memory_.size());
    others([&](const uint8_t* from, int64_t size) {
      TORCH_CHECK(std::memcmp(from, before_.data() + (from - memory_.at(0)), size) == 0, op,
                  " has written between the rows of a map of shape ", tensor_.sizes());
    });
    others([](uint8_t* from, int64_t size) { ASAN_POISON_MEMORY_REGION(from, size); });
  }

 private:
  int64_t row() const { return lie_.before + sizes_[1] + lie_.behind; }
  static int64_t rows(const Sizes& sizes) { return c10::multiply_integers(sizes) / sizes[1]; }
  // The last row ends with its last channel.
  static int64_t count(const Sizes& sizes, const Lie& lie) {
    if (lie.order == Lie::Order::channels) return lie.before + c10::multiply_integers(sizes);
    return rows(sizes) * (lie.before + sizes[1] + lie.behind) - (rows(sizes) > 0 ? lie.behind : 0);
  }
  std::vector<uint8_t> copy() const { return {memory_.at(0), memory_.at(0) + memory_.size()}; }
  template <typename Body>
  void others(const Body& body) {
    const auto width = static_cast<int64_t>(c10::elementSize(memory_.type()));
    if (lie_.order == Lie::Order::channels) {
      if (lie_.before > 0) body(memory_.at(0), lie_.before * width);
      return;
    }
    for (int64_t r = 0; r < rows(sizes_); ++r) {
      if (lie_.before > 0) body(memory_.at(r * row()), lie_.before * width);
      if (lie_.behind > 0 && r + 1 < rows(sizes_))
        body(memory_.at((r + 1) * row() - lie_.behind), lie_.behind * width);
    }
  }

  Memory memory_;
  Lie lie_;
  Sizes sizes_;
  std::vector<uint8_t> before_;
  at::Tensor tensor_;
};

// A contiguous tensor, `first` elements behind the beginning of its memory.
class Flat {
 public:
  Flat(const Sizes& sizes, at::ScalarType type, bool positive = false, int64_t first = 0)
      : memory_(first + c10::multiply_integers(sizes), type, positive),
        tensor_(at::from_blob(memory_.at(first), sizes, at::dtype(type))) {}
  operator at::Tensor&() { return tensor_; }
  at::Tensor& tensor() { return tensor_; }

 private:
  Memory memory_;
  at::Tensor tensor_;
};

}  // namespace effdense::sanitizers
