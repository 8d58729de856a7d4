// y = W relu(scale * x + shift) as a GEMM of [pixels, channels] by [channels, out channels].
//
// A block makes kPixels by kOut results. x and W travel through shared memory in tiles, by cp.async in a ring
// of stages, with the two vectors of the prologue, which is applied to the fragments: x as it was and z never
// exist but in registers. The statistics of y are taken from the accumulators.
//
// Where pixels suffice, kPixels is 128 and kOut 64, 128 or 192, so that up to 192 out channels x is read
// once. With fewer pixels there are smaller tiles, for more blocks than multiprocessors: 64 x 64, 32 x 64, 16
// x 32 (bottleneck.cu chooses). The smaller, the deeper a stage is, since a block has fewer of them on their
// way.
#pragma once

#include "kernels/gemm_multiply.cuh"
#include "kernels/sums.cuh"

namespace effdense::kernels {

template <typename Math, int kOut, int kRows, Architecture kOn = kArchitecture>
struct BottleneckTile {
  using E = typename Math::Element;
  using Sum = typename Math::Sum;
  static constexpr int kColumns = kOut, kPixels = kRows;
  static constexpr int kDepth = (kPixels >= 64 ? 64 : 4096 / kPixels) / sizeof(E);
  // Copies that are not asynchronous gain nothing by a third.
  static constexpr int kStages = kOn == Architecture::turing ? 2 : kPixels == 64 ? 4 : 3;
  static constexpr int kWarpRows = kPixels >= 64 ? 32 : 16;
  static constexpr int kWarpColumns = kPixels >= 128 ? 64 : kPixels >= 32 ? 32 : 16;
  static constexpr int kRowWarps = kPixels / kWarpRows;
  static constexpr int kWarps = kRowWarps * kOut / kWarpColumns, kThreads = 32 * kWarps;
  // On a multiprocessor: what shared memory has room for on most architectures.
  static constexpr int kBlocks = kPixels < 128                                        ? 4
                                 : sizeof(Sum) == 8                                   ? 2
                                 : kOut == 64                                         ? 3
                                 : kOut == 128 && !std::is_same_v<Math, Plain<float>> ? 2
                                                                                      : 1;
  static constexpr int kStep = kTileStep<E, kDepth>, kOutStep = kTileStep<E, kWarpColumns>;

  struct alignas(16) Stage {
    E x[kPixels * kStep], weight[kOut * kStep];
    Sum scale[kDepth], shift[kDepth];
  };
  struct alignas(16) Out {  // takes the stages' place
    E y[kWarps][16 * kOutStep];
    Sum pivot[kOut], mean[kRowWarps][kOut], m2[kRowWarps][kOut];
  };
  static constexpr int kBytes = kStages * sizeof(Stage) > sizeof(Out) ? kStages * sizeof(Stage) : sizeof(Out);
};

// mean and biased variance of what block_statistics leaves. All are moved to the first block's mean, in
// double, to be added.
template <typename A>
struct BlockMoments {
  static constexpr int kLines = 3;  // pivot, mean of y - pivot, sum of squares about the mean
  Size size;                        // of y
  int pixels_per_block;
  StatisticsOut<A> to;

  __device__ double mean(const A* part) const {
    return static_cast<double>(load(part)) + static_cast<double>(load(part + size.channels));
  }
  __device__ double pivot(const A* first_part) const { return mean(first_part); }
  __device__ void add(int64_t block, const A* part, double pivot, double (&sums)[2]) const {
    const double count =
        static_cast<double>(min(int64_t{pixels_per_block}, size.rows - block * pixels_per_block));
    const double moved = mean(part) - pivot;
    sums[0] += count * moved;
    sums[1] += static_cast<double>(load(part + 2 * size.channels)) + count * moved * moved;
  }
  __device__ void finish(int64_t c, double pivot, const double (&sums)[2]) const {
    const double count = static_cast<double>(size.rows), shift = sums[0] / count;
    const double variance = sums[1] / count - shift * shift;
    finish_statistics(to, c, static_cast<A>(pivot + shift), static_cast<A>(variance < 0 ? 0.0 : variance));
  }
  __device__ void rest() const {}  // what is folded has y's channels
};

template <typename E, typename Sum>
struct BottleneckArguments {
  Operand<const E> x, weight;
  const Sum *scale, *shift, *bias, *out_scale, *out_shift;
  Operand<E> y;
  Sum* statistics;  // block_statistics, or null
  int* counters;    // null: a kernel of its own merges them
  BlockMoments<Sum> moments;
};

// The epilogue's arithmetic, on a lane's results; they become what is stored.
template <typename Math, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void finish_y(
    typename Math::Sum (&y)[kRowTiles][kColumnTiles][4],
    const BottleneckArguments<typename Math::Element, typename Math::Sum>& arguments, int first_column) {
  using Sum = typename Math::Sum;
#pragma unroll
  for (int j = 0; j < 2 * kColumnTiles; ++j) {
    const int column = first_column + j / 2 * 8 + lane_id() % 4 * 2 + j % 2;
    const bool inside = column < arguments.y.columns;
    const Sum bias = inside && arguments.bias != nullptr ? load(arguments.bias + column) : Sum(0);
    const bool norm = inside && arguments.out_scale != nullptr;
    const Sum scale = norm ? load(arguments.out_scale + column) : Sum(0);
    const Sum shift = norm ? load(arguments.out_shift + column) : Sum(0);
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      Sum& value = y[i / 2][j / 2][i % 2 * 2 + j % 2];
      value += bias;
      if (norm) value = bn_relu_value(value, scale, shift);
      value = static_cast<Sum>(narrow<typename Math::Element>(value));
    }
  }
}

// The mean of y - pivot over the first `rows` of the warp's, 1 / rows being `share`, of a lane's column.
template <typename Sum, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ Sum warp_mean(const Sum (&y)[kRowTiles][kColumnTiles][4], int column, int rows,
                                         Sum share, Sum pivot) {
  Sum sum = 0;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    if (lane_id() / 4 + 8 * i < rows) sum += y[i / 2][column / 2][i % 2 * 2 + column % 2] - pivot;
  }
  return sum_over_rows(sum) * share;
}

// With u = y - pivot: mean of u, and sum of squares about that mean, of every column's first `rows` of the
// warp's rows.
template <typename Sum, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void warp_statistics(const Sum (&y)[kRowTiles][kColumnTiles][4], int rows,
                                                const Sum* pivots, Sum* means, Sum* m2s) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const Sum share = rows > 0 ? Sum(1) / static_cast<Sum>(rows) : Sum(0);
#pragma unroll
  for (int j = 0; j < 2 * kColumnTiles; ++j) {
    const int column = j / 2 * 8 + 2 * t + j % 2;
    const Sum pivot = pivots[column];
    const Sum mean = warp_mean(y, j, rows, share, pivot);
    Sum m2 = 0;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const Sum deviation = y[i / 2][j / 2][i % 2 * 2 + j % 2] - pivot - mean;
      if (g + 8 * i < rows) m2 += deviation * deviation;
    }
    m2 = sum_over_rows(m2);
    if (g == 0) {
      means[column] = mean;
      m2s[column] = m2;
    }
  }
}

// The block's statistics, into [block][3][out channels]: pivot, mean of u, M2. With n = sum n_w over the
// warps, mean = sum n_w mean_w / n and M2 = sum M2_w + n_w (mean_w - mean)^2 (Chan, Golub and LeVeque). The
// pivot, about the mean of the block's first warp of rows, keeps a mean far larger than the deviation from
// costing digits; a single row could be far larger than the mean, and cost digits of that.
template <typename Tile, typename Sum, typename Out>
__device__ __forceinline__ void block_statistics(
    const Sum (&y)[Tile::kWarpRows / 16][Tile::kWarpColumns / 8][4], Out& out, int row_warp, int column,
    int rows, int first_out, int columns, Sum* statistics) {
  const int lane = lane_id(), mine = static_cast<int>(threadIdx.x);
  const auto count = [&](int warp) { return min(max(rows - Tile::kWarpRows * warp, 0), Tile::kWarpRows); };
  if (row_warp == 0) {
    const Sum share = Sum(1) / static_cast<Sum>(count(0));
#pragma unroll
    for (int j = 0; j < Tile::kWarpColumns / 4; ++j) {
      const Sum pivot = warp_mean(y, j, count(0), share, Sum(0));
      if (lane < 4) out.pivot[column + j / 2 * 8 + 2 * lane + j % 2] = pivot;
    }
  }
  __syncthreads();
  warp_statistics(y, count(row_warp), out.pivot + column, out.mean[row_warp] + column,
                  out.m2[row_warp] + column);
  __syncthreads();
  if (mine >= Tile::kColumns || first_out + mine >= columns) return;
  Sum mean = 0, m2 = 0;
  for (int w = 0; w < Tile::kRowWarps; ++w) mean += static_cast<Sum>(count(w)) * out.mean[w][mine];
  mean /= static_cast<Sum>(rows);
  for (int w = 0; w < Tile::kRowWarps; ++w) {
    const Sum deviation = out.mean[w][mine] - mean;
    if (count(w) > 0) m2 += out.m2[w][mine] + static_cast<Sum>(count(w)) * deviation * deviation;
  }
  Sum* const to = statistics + int64_t{blockIdx.x} * 3 * columns + first_out + mine;
  store(to, out.pivot[mine]);
  store(to + columns, mean);
  store(to + 2 * columns, m2);
}

template <typename Asked, int kOut, int kPixels>
__global__ void __launch_bounds__(BottleneckTile<Asked, kOut, kPixels>::kThreads,
                                  BottleneckTile<Asked, kOut, kPixels>::kBlocks)
    bottleneck_kernel(const BottleneckArguments<typename Asked::Element, typename Asked::Sum> arguments) {
  using Math = Available<Asked>;
  using Tile = BottleneckTile<Asked, kOut, kPixels>;
  using Sum = typename Math::Sum;
  using Stage = typename Tile::Stage;
  constexpr int kDepth = Tile::kDepth, kRowTiles = Tile::kWarpRows / 16,
                kColumnTiles = Tile::kWarpColumns / 8;
  DYN_SHARED(Stage, stages);
  const int64_t first_pixel = int64_t{blockIdx.x} * Tile::kPixels;
  const int first_out = static_cast<int>(blockIdx.y) * kOut, channels = arguments.x.columns;
  const int tiles = (channels + kDepth - 1) / kDepth;
  const auto copy = [&](int tile) {
    if (tile < tiles) {
      Stage& stage = stages[tile % Tile::kStages];
      const int first = tile * kDepth;
      copy_tile<Tile::kPixels, kDepth, Tile::kThreads>(stage.x, arguments.x, first_pixel, first);
      copy_tile<kOut, kDepth, Tile::kThreads>(stage.weight, arguments.weight, first_out, first);
      for (int k = static_cast<int>(threadIdx.x); k < kDepth; k += Tile::kThreads) {
        const int valid = first + k < channels ? static_cast<int>(sizeof(Sum)) : 0;
        const int from = valid > 0 ? first + k : 0;
        cp_async<sizeof(Sum)>(stage.scale + k, arguments.scale + from, valid);
        cp_async<sizeof(Sum)>(stage.shift + k, arguments.shift + from, valid);
      }
    }
    cp_async_commit();  // empty behind the end, so that the count of groups stays right
  };
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int row = warp % Tile::kRowWarps * Tile::kWarpRows,
            column = warp / Tile::kRowWarps * Tile::kWarpColumns;
  Sum y[kRowTiles][kColumnTiles][4] = {};
#pragma unroll 1
  for (int tile = 1 - Tile::kStages; tile < tiles; ++tile) {  // the first rounds only start copies
    if (tile >= 0) {
      cp_async_wait<Tile::kStages - 2>();
      __syncthreads();  // the tile is here, and nobody reads the one before
    }
    copy(tile + Tile::kStages - 1);
    if (tile < 0) continue;
    const Stage& stage = stages[tile % Tile::kStages];
    multiply<Math, Along::depth, Along::depth>(y, stage.x, Tile::kStep, row, stage.weight, Tile::kStep,
                                               column, kDepth, BnRelu<Sum>{stage.scale, stage.shift});
  }

  finish_y<Math>(y, arguments, first_out + column);
  __syncthreads();  // nobody reads the stages
  auto& out = *reinterpret_cast<typename Tile::Out*>(stages);
  if (arguments.statistics != nullptr) {
    const int rows = static_cast<int>(min(arguments.y.rows - first_pixel, int64_t{Tile::kPixels}));
    block_statistics<Tile>(y, out, warp % Tile::kRowWarps, column, rows, first_out, arguments.y.columns,
                           arguments.statistics);
  }
  // 16 rows of the warp at a time, so that they leave in whole pieces.
  using Pair = Vec<typename Math::Element, 2>;
  const int g = lane_id() / 4, t = lane_id() % 4;
  auto& part = out.y[warp];
  static_assert(kRowTiles <= 2);
#pragma unroll 1
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * kColumnTiles; ++j) {
      const int e = j % 2 * 2;
      constexpr int kLast = kRowTiles - 1;
      const auto low = narrow<typename Math::Element>(i == 0 ? y[0][j / 2][e] : y[kLast][j / 2][e]);
      const auto high = narrow<typename Math::Element>(i == 0 ? y[0][j / 2][e + 1] : y[kLast][j / 2][e + 1]);
      *reinterpret_cast<Pair*>(part + (g + j % 2 * 8) * Tile::kOutStep + j / 2 * 8 + 2 * t) =
          Pair{{low, high}};
    }
    __syncwarp();
    store_tile<16, Tile::kWarpColumns, 32>(part, arguments.y, first_pixel + row + 16 * i, first_out + column,
                                           lane_id());
    __syncwarp();
  }

  if (arguments.statistics == nullptr || arguments.counters == nullptr) return;
  if (!comes_last(arguments.counters + blockIdx.y, static_cast<int>(gridDim.x))) return;
  static_assert(Tile::kBytes >= sizeof(double[2][Tile::kThreads]));
  merge_parts(arguments.moments, gridDim.x, arguments.statistics, first_out,
              min(arguments.y.columns - first_out, kOut),
              reinterpret_cast<double (*)[Tile::kThreads]>(stages));
}

}  // namespace effdense::kernels
