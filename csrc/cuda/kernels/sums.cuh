// Two sums over the rows of every channel, in two stages of fixed order: a thread adds its rows up with
// compensated sums, a block adds its threads up by halves; then the blocks are added up in double, by
// the block that comes last where they are few, else by a kernel of its own. The order depends on shape and
// alignment alone.
#pragma once

#include "kernels/norms.cuh"

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
template <int kValues, int kMost, typename A>
__device__ __forceinline__ void add_up(A (&values)[kValues], A (*shared)[kMost], int index, int count,
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
  static constexpr int kLines = 3;  // pivot, sum of x - pivot, sum of squares
  Size size;
  int64_t rows_per_block;
  StatisticsOut<A> to;

  __device__ double count(int64_t block) const {
    return static_cast<double>(min(rows_per_block, size.rows - block * rows_per_block));
  }
  __device__ double pivot(const A* first_part) const { return load(first_part); }
  __device__ void add(int64_t block, const A* part, double pivot, double (&sums)[2]) const {
    const double moved = load(part) - pivot;
    const double sum = load(part + size.channels), squares = load(part + 2 * size.channels);
    sums[0] += sum + count(block) * moved;
    sums[1] += squares + moved * (2 * sum + count(block) * moved);
  }
  __device__ void finish(int64_t c, double pivot, const double (&sums)[2]) const {
    const double count = static_cast<double>(size.rows), shift = sums[0] / count;
    const double variance = sums[1] / count - shift * shift;
    finish_statistics(to, c, static_cast<A>(pivot + shift), static_cast<A>(variance < 0 ? 0.0 : variance));
  }
  // By one block of the launch, whichever: what needs no part.
  __device__ void rest() const { fold_earlier(to, size.channels); }
};

// sum d and sum d (x - mean).
template <typename A>
struct Gradients {
  static constexpr int kLines = 2;
  Size size;
  SumsOut<A> to;

  __device__ double pivot(const A*) const { return 0; }
  __device__ void add(int64_t, const A* part, double, double (&sums)[2]) const {
    sums[0] += load(part);
    sums[1] += load(part + size.channels);
  }
  __device__ void finish(int64_t c, double, const double (&sums)[2]) const {
    finish_sums(to, c, static_cast<A>(sums[0]), static_cast<A>(sums[1]));
  }
  __device__ void rest() const {}
};

// Adds the blocks' parts of `count` channels from `first` on, with all threads of a block, one channel after
// the other across the threads and then as many lanes as there is room for; each takes every so many-th part.
template <int kMost, typename A, typename Result>
__device__ __forceinline__ void merge_parts(const Result& result, int64_t parts, const A* partial,
                                            int64_t first, int count, double (*shared)[kMost]) {
  const int me = static_cast<int>(threadIdx.x), lanes = static_cast<int>(blockDim.x) / count;
  const int lane = me / count;
  const int64_t c = first + me % count, channels = result.size.channels;
  double pivot = 0, sums[2] = {0, 0};
  if (lane < lanes) {
    pivot = result.pivot(partial + c);
#pragma unroll 4
    for (int64_t part = lane; part < parts; part += lanes)
      result.add(part, partial + part * Result::kLines * channels + c, pivot, sums);
  }
  add_up(sums, shared, lane, lanes, count);
  if (lane == 0) result.finish(c, pivot, sums);
}

// Whether the calling block is the last of `count` to come here; a counter serves the blocks of one tile.
// Its threads then see what every one of those blocks stored before. How that is certain: a block's stores
// come before its first thread's fence (the barrier), the fence before the atomic addition; whoever adds last
// has read what all others added, so that its own fence comes after theirs, and its threads' loads after that
// (the second barrier). Nobody touches the counter after the last block, which leaves 0 for the next launch.
__device__ __forceinline__ bool comes_last(int* counter, int count) {
  if (count == 1) {
    __syncthreads();
    return true;
  }
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    fence();
    last = count_up(counter) == count - 1;
    fence();
    if (last) store(counter, 0);
  }
  __syncthreads();
  return last;
}

// The most parts that a lane of the last block adds up, one after the other, while the card waits: what a
// launch costs.
constexpr int64_t kMostInTurn = 64;

__host__ __device__ constexpr bool last_block_merges(int64_t parts, int64_t tiles, int threads,
                                                     int channels) {
  return tiles <= kCounters && parts <= kMostInTurn * (threads / channels);
}

// A block has kMerged channels by kThreads / kMerged lanes.
constexpr int kMerged = 8;

template <typename A, typename Result>
__global__ void __launch_bounds__(kThreads, 4) merge_kernel(Result result, int64_t parts, const A* partial) {
  __shared__ double shared[2][kThreads];
  const int64_t first = int64_t{blockIdx.x} * kMerged;
  if (blockIdx.x == 0) result.rest();
  merge_parts(result, parts, partial, first,
              static_cast<int>(min(int64_t{kMerged}, result.size.channels - first)), shared);
}

template <typename A, typename Result>
void merge(const Result& result, int64_t parts, const A* partial, Stream stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(result.size.channels, kMerged)));
  launch(merge_kernel<A, Result>, grid, dim3(kThreads), 0, stream, result, parts, partial);
}

}  // namespace effdense::kernels
