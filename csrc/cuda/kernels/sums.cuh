// Two sums over the rows of every channel, in two stages of fixed order: a thread adds its rows up and makes
// good what rounding loses, a block adds its threads up by halves; `merge` adds the blocks up in double. The
// order depends on shape and alignment alone.
#pragma once

#include "kernels/access.cuh"

namespace effdense::kernels {

// A sum, and what the roundings on the way to it have added too much (Kahan 1965).
template <typename A>
struct Sum {
  A total, excess;
  __device__ void add(A term) { add_exact(term - excess); }
  __device__ void add_product(A a, A b) { add_exact(multiply_add(a, b, -excess)); }

 private:
  __device__ void add_exact(A term) {
    const A next = total + term;
    excess = (next - total) - term;
    total = next;
  }
};

// Adds up, value by value, what `count` threads hold that are `apart` threads apart; the one with index 0
// gets it, and leaves it in shared[value][threadIdx.x]. Whoever wants `shared` again needs a barrier first.
template <int kValues, typename A>
__device__ __forceinline__ void add_up(A (&values)[kValues], A (*shared)[kThreads], int index, int count,
                                       int apart) {
  const int me = static_cast<int>(threadIdx.x);
  for (int v = 0; v < kValues; ++v) shared[v][me] = values[v];
  while (count > 1) {
    const int half = (count + 1) / 2;
    __syncthreads();
    if (index + half < count) {
      for (int v = 0; v < kValues; ++v) shared[v][me] = values[v] += shared[v][me + half * apart];
    }
    count = half;
  }
}

// The block's sums of its channels into the workspace, [row block][kLines][channels]: the last two lines.
template <int kLines, int kVector, typename A>
__device__ __forceinline__ void store_sums(const Sum<A> (&sums)[2][kVector],
                                           A (&shared)[2 * kVector][kThreads], const Place<kVector>& at,
                                           const Cut& cut, int64_t channels, A* workspace) {
  A totals[2 * kVector];
  for (int v = 0; v < 2 * kVector; ++v) totals[v] = sums[v / kVector][v % kVector].total;
  add_up(totals, shared, at.y, cut.height, cut.width);
  if (at.y > 0) return;
  A* const to = workspace + (int64_t{blockIdx.x} * kLines + kLines - 2) * channels + at.channel;
  for (int j = 0; j < kVector; ++j) {
    if (j >= at.count) break;
    store(to + j, totals[j]);
    store(to + channels + j, totals[kVector + j]);
  }
}

// ---- The second stage. A result says what a row block's part is, and what to make of the whole.

// mean and biased variance of sums of x - p and (x - p)^2, where a block's pivot p is about the mean of its
// rows: a mean far larger than the deviation costs nothing. All are moved to the first block's pivot, in
// double, to be added.
template <typename A>
struct Moments {
  static constexpr bool kPivots = true;
  static constexpr int kLines = 3;  // pivot, sum of x - pivot, sum of squares
  Size size;
  int64_t rows_per_block;
  A *mean, *var;

  __device__ void add(int64_t block, const A* part, double pivot, double (&sums)[2]) const {
    const double count = static_cast<double>(min(rows_per_block, size.rows - block * rows_per_block));
    const double moved = load(part) - pivot;
    const double sum = load(part + size.channels), squares = load(part + 2 * size.channels);
    sums[0] += sum + count * moved;
    sums[1] += squares + moved * (2 * sum + count * moved);
  }
  __device__ void finish(int64_t c, double pivot, const double (&sums)[2]) const {
    const double count = static_cast<double>(size.rows), shift = sums[0] / count;
    const double variance = sums[1] / count - shift * shift;
    store(mean + c, static_cast<A>(pivot + shift));
    store(var + c, static_cast<A>(variance < 0 ? 0.0 : variance));
  }
};

// sum d and sum d (x - mean). With a and b, also what the statistics' own gradient subtracts, a + b * (x -
// mean): a = scale * sum d / M, b = scale * rstd^2 * sum d (x - mean) / M.
template <typename A>
struct Gradients {
  static constexpr bool kPivots = false;
  static constexpr int kLines = 2;
  Size size;
  A *sum_d, *sum_dx;
  Norm<A> norm{};
  A *a = nullptr, *b = nullptr;

  __device__ void add(int64_t, const A* part, double, double (&sums)[2]) const {
    sums[0] += load(part);
    sums[1] += load(part + size.channels);
  }
  __device__ void finish(int64_t c, double, const double (&sums)[2]) const {
    store(sum_d + c, static_cast<A>(sums[0]));
    store(sum_dx + c, static_cast<A>(sums[1]));
    if (a == nullptr) return;
    const double over = static_cast<double>(load(norm.scale + c)) / static_cast<double>(size.rows);
    const double rstd = load(norm.rstd + c);
    store(a + c, static_cast<A>(over * sums[0]));
    store(b + c, static_cast<A>(over * rstd * rstd * sums[1]));
  }
};

// A block has kMerged channels by kThreads / kMerged lanes, each of which takes every so many-th row block.
constexpr int kMerged = 8;

template <typename A, typename Result>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(Result result, int64_t row_blocks, const A* workspace) {
  constexpr int kLanes = kThreads / kMerged;
  __shared__ double shared[2][kThreads];
  const int lane = static_cast<int>(threadIdx.x) / kMerged;
  const int64_t c = int64_t{blockIdx.x} * kMerged + threadIdx.x % kMerged, channels = result.size.channels;
  const double pivot = Result::kPivots && c < channels ? static_cast<double>(load(workspace + c)) : 0;
  double sums[2] = {0, 0};
  if (c < channels) {
    for (int64_t block = lane; block < row_blocks; block += kLanes)
      result.add(block, workspace + block * Result::kLines * channels + c, pivot, sums);
  }
  add_up(sums, shared, lane, kLanes, kMerged);
  if (lane == 0 && c < channels) result.finish(c, pivot, sums);
}

template <typename A, typename Result>
void merge(const Result& result, int64_t row_blocks, const A* workspace, Stream stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(result.size.channels, kMerged)));
  launch(merge_kernel<A, Result>, grid, dim3(kThreads), 0, stream, result, row_blocks, workspace);
}

}  // namespace effdense::kernels
