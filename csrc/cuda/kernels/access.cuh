// Memory accesses of the memory-bound kernels: a thread has kVector channels side by side, as many as one
// access of at most 16 bytes can move. The last thread of a row has the rest.
#pragma once

#include <algorithm>

#include "kernels/compat.cuh"
#include "kernels/launchers.h"

namespace effdense::kernels {

// The first `count` elements at `from`, 0 behind them. Fewer than kVector are fetched by halves: everything
// stays aligned and in registers.
template <int kVector, typename T>
__device__ __forceinline__ Vec<T, kVector> load_some(const T* from, int count) {
  if (count >= kVector) return load(reinterpret_cast<const Vec<T, kVector>*>(from));
  Vec<T, kVector> all{};
  if constexpr (kVector > 1) {
    constexpr int kHalf = kVector / 2;
    if (count > 0) {
      const Vec<T, kHalf> low = load_some<kHalf>(from, count);
      const Vec<T, kHalf> high = load_some<kHalf>(from + kHalf, count - kHalf);
      for (int j = 0; j < kHalf; ++j) {
        all[j] = low[j];
        all[kHalf + j] = high[j];
      }
    }
  }
  return all;
}

template <int kVector, typename T>
__device__ __forceinline__ void store_some(T* to, const Vec<T, kVector>& all, int count) {
  if (count >= kVector) {
    store(reinterpret_cast<Vec<T, kVector>*>(to), all);
    return;
  }
  if constexpr (kVector > 1) {
    constexpr int kHalf = kVector / 2;
    if (count <= 0) return;
    Vec<T, kHalf> low, high;
    for (int j = 0; j < kHalf; ++j) {
      low[j] = all[j];
      high[j] = all[kHalf + j];
    }
    store_some<kHalf>(to, low, count);
    store_some<kHalf>(to + kHalf, high, count - kHalf);
  }
}

// The most elements, a power of two up to 16 bytes, at which every row of the matrix is aligned.
template <typename T>
int aligned_elements(Matrix<T> matrix) {
  const uint64_t places = reinterpret_cast<uintptr_t>(matrix.data) / sizeof(T) | matrix.step;
  int count = 16 / sizeof(T);
  while (places % count != 0) count /= 2;
  return count;
}

// Calls body with kVector as a constant: 16 or 8 bytes of T, or one element. An access that is wider than the
// channels left at the end of a row would be a loss, but where there are many it is rare.
template <typename T, typename Body>
void with_vector(int aligned, int64_t channels, const Body& body) {
  const auto fits = [&](int count) {
    return aligned >= count && (channels % count == 0 || channels >= 4 * count);
  };
  constexpr int kWide = 16 / sizeof(T), kNarrow = sizeof(T) < 8 ? 8 / sizeof(T) : 1;
  if (fits(kWide))
    body(std::integral_constant<int, kWide>{});
  else if (fits(kNarrow))
    body(std::integral_constant<int, kNarrow>{});
  else if constexpr (kNarrow > 1)
    body(std::integral_constant<int, 1>{});
}

// ---- How a matrix is cut

constexpr int kThreads = 256, kWarp = 32;
// Blocks that a multiprocessor is to hold at least: 128 registers a thread. Left to itself, the compiler
// spills for more.
constexpr int kResident = 2;
// Blocks over all channels and rows, enough to fill the largest device; so many partial sums are added up.
constexpr int64_t kBlocks = 1024;
// A block's partial sums and vectors are to be few beside what it reads.
constexpr int64_t kLeastRows = 128;

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A block is `width` threads along the channels by `height`; the grid row blocks by tiles of channels.
// No thread is idle but in the last tile.
struct Cut {
  int width, height;
  int64_t tiles, rows_per_block, row_blocks;

  Cut(int64_t channels, int vector) {
    const int64_t groups = divide_up(channels, vector);
    tiles = divide_up(groups, kWarp);
    width = static_cast<int>(divide_up(groups, tiles));
    height = kThreads / width;
  }
  void cut_rows(int64_t rows, int64_t at_least) {
    rows_per_block = std::max(at_least, divide_up(rows, most_row_blocks()));
    row_blocks = divide_up(rows, rows_per_block);
  }
  // However the rows are cut.
  int64_t most_row_blocks() const { return std::max<int64_t>(1, kBlocks / tiles); }
  dim3 grid() const { return dim3(static_cast<unsigned>(row_blocks), static_cast<unsigned>(tiles)); }
  dim3 block() const { return dim3(static_cast<unsigned>(width * height)); }
};

// Where a thread is: column x and line y of its block, `count` channels from `channel` on. Neighbours in a
// warp read neighbouring channels, then the next row.
template <int kVector>
struct Place {
  int x, y, count;
  int64_t channel;

  __device__ Place(const Cut& cut, int64_t channels) {
    x = static_cast<int>(threadIdx.x) % cut.width;
    y = static_cast<int>(threadIdx.x) / cut.width;
    channel = (int64_t{blockIdx.y} * cut.width + x) * kVector;
    count = static_cast<int>(min(channels - channel, int64_t{kVector}));
  }
};

// A vector's elements for the thread's channels; its alignment is whatever the caller's slice has.
template <int kVector, typename A>
__device__ __forceinline__ void load_channels(const A* from, int count, A (&to)[kVector]) {
  constexpr int kPiece = kVector * sizeof(A) < 16 ? kVector : 16 / sizeof(A);
  if (reinterpret_cast<uintptr_t>(from) % (kPiece * sizeof(A)) == 0) {
    for (int j = 0; j < kVector; j += kPiece) {
      const Vec<A, kPiece> piece = load_some<kPiece>(from + j, count - j);
      for (int i = 0; i < kPiece; ++i) to[j + i] = piece[i];
    }
  } else {
    for (int j = 0; j < kVector; ++j) to[j] = j < count ? load(from + j) : A(0);
  }
}

// The same of several vectors, once a block: its first line of threads fetches them for all. A barrier.
template <int kVectors, int kVector, typename A>
__device__ __forceinline__ void share_channels(const A* const (&vectors)[kVectors], const Place<kVector>& at,
                                               A (&to)[kVectors][kVector]) {
  __shared__ A shared[kVectors][kVector][kWarp];
  for (int v = 0; v < kVectors; ++v) {
    if (at.y > 0) break;
    load_channels<kVector>(vectors[v] + at.channel, at.count, to[v]);
    for (int j = 0; j < kVector; ++j) shared[v][j][at.x] = to[v][j];
  }
  __syncthreads();
  for (int v = 0; v < kVectors; ++v)
    for (int j = 0; j < kVector; ++j) to[v][j] = shared[v][j][at.x];
}

// ---- The formulas that forward and backward must agree upon to the bit

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// NaN stays NaN, as in torch.relu.
template <typename A>
__device__ __forceinline__ A relu(A z) {
  return z < A(0) ? A(0) : z;
}

// The gradient passes where relu's output is positive, or NaN, as in torch.
template <typename A>
__device__ __forceinline__ A masked(A z, A grad) {
  return z <= A(0) ? A(0) : grad;
}

// What the sums of the batch subtract. Without them (b = 0) an x that is infinite or NaN changes nothing.
template <typename A>
__device__ __forceinline__ A correction(A a, A b, A x, A mean) {
  return b == A(0) ? a : multiply_add(b, x - mean, a);
}

}  // namespace effdense::kernels
