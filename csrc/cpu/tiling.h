// Work cut into tiles of pixels small enough to stay in cache, and into one slot per thread.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/products.h"

namespace effdense {

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

}  // namespace effdense
