// The bottleneck's backward in one kernel: d = W^T grad_y where relu lets it pass, grad_x, its sums, and
// grad_weight = grad_y^T z with z = relu(scale * x + shift).
//
// A block owns some channels (64 of 16 bits, else 32) and walks over a stretch of pixels, 32 at a time: the
// channels' part of W stays in shared memory, the block's part of grad_weight in registers, and tiles of
// grad_y, x and grad_x arrive by cp.async in two stages. So x and grad_x move once for both products, where
// two kernels would read x twice, and neither z nor d exists outside of the tile; grad_y is read once for
// every tile of channels, by blocks that run side by side. Per tile of pixels:
//   1. grad_y gets its correction, where there is one, by the thread that copied the piece: no barrier needed
//   2. dz = grad_y W, [pixels, channels]; masked and summed in the accumulators; z takes the place of x, the
//      finished gradient that of grad_x
//   3. grad_weight += grad_y^T z, and the tile of grad_x is stored
// More out channels than fit the tile are walked by several launches, each of which adds its share: what
// follows the mask is linear in grad_y.
#pragma once

#include "kernels/gemm_multiply.cuh"
#include "kernels/norms.cuh"

namespace effdense::kernels {

// The most out channels of one launch: what registers and shared memory have room for.
template <typename T>
constexpr int most_out(Architecture on) {
  const bool small = on == Architecture::turing;
  return sizeof(T) == 2 ? (small ? 128 : 192) : sizeof(T) == 4 ? (small ? 64 : 128) : 64;
}

// kOut: at most so many out channels.
template <typename Math, int kOut, Architecture kOn = kArchitecture>
struct BackwardTile {
  using E = typename Math::Element;
  using Sum = typename Math::Sum;
  static constexpr int kPixels = sizeof(E) == 8 ? 16 : 32, kColumns = sizeof(E) == 2 ? 64 : 32;
  static constexpr int kWarps = sizeof(E) == 8 ? 4 : 8, kThreads = 32 * kWarps;
  static constexpr int kOutStep = kTileStep<E, kOut>, kStep = kTileStep<E, kColumns>;
  static constexpr bool kIsLaunched = kOut <= most_out<E>(kOn);
  // dz: the warps along the pixels, 16 of them each, then along the channels.
  static constexpr int kPixelWarps = kPixels / 16;
  static constexpr int kDzColumns = kColumns * kPixelWarps / kWarps;
  // grad_weight: four warps along the out channels, the others along the channels.
  static constexpr int kOutRows = kOut / 4, kWeightColumns = kColumns * 4 / kWarps;

  struct alignas(16) Stage {
    E grad_y[kPixels * kOutStep], x[kPixels * kStep], grad_x[kPixels * kStep];
  };
  struct alignas(16) Shared {
    Stage stages[2];
    E weight[kOut * kStep];
    Sum scale[kColumns], shift[kColumns], mean[kColumns];
    Sum y_mean[kOut], a[kOut], b[kOut], y_scale[kOut], y_shift[kOut];
    Sum sums[2][kPixelWarps][kColumns];
    E y[kPixels * kOutStep];  // only with a correction, and where kBuffersY
  };
  // A copy of y that is not asynchronous would come no earlier than one when it is needed.
  static constexpr bool kBuffersY = kOn != Architecture::turing;
  static constexpr int kBytesUncorrected = sizeof(Shared) - sizeof(Shared::y),
                       kBytes = kBuffersY ? sizeof(Shared) : kBytesUncorrected;
};

template <typename E, typename Sum>
struct BackwardArguments {
  Operand<const E> x, grad_y, y, weight;  // y.data null: no correction
  const Sum *scale, *shift, *mean, *y_mean, *a, *b;
  const Sum *y_scale, *y_shift;  // null: everything passes as it is
  Operand<E> grad_x;             // data null: not wanted
  bool accumulate;
  int64_t tiles_per_block;  // of pixels
  // What the blocks make, null where it is not wanted: [out channels][width], and the two sums of a channel,
  // each so many steps after those of the block before it along the pixels. Partial results, unless there is
  // one such block: its are the results.
  Sum *grad_weight, *sum_d, *sum_dx;
  int64_t width, weight_step, sums_step;
  SumsOut<Sum> to;  // of one such block
};

// scale * d - a - b * (y - mean) in place, d = grad_y where scale * y + shift lets it pass, of the calling
// thread's own pieces of tile. from: y, of which the tile's rows begin at first_row.
template <typename Tile, int kOut, typename E, typename Shared>
__device__ __forceinline__ void correct_tile(E* grad_y, const Shared& shared, const Operand<const E>& from,
                                             int64_t first_row) {
  with_piece<E>(from.piece, [&](auto piece) {
    constexpr int kPiece = decltype(piece)::value;
    for_pieces<Tile::kPixels, kOut, Tile::kThreads, kPiece, 1>(
        static_cast<int>(threadIdx.x), from.rows - first_row, from.columns,
        [&](int row, int column, int valid) {
          if (valid == 0) return;
          const int at = row * kTileStep<E, kOut> + column;
          Vec<E, kPiece> loaded;
          if constexpr (!Tile::kBuffersY)
            loaded = load_some<kPiece>(from.data + (first_row + row) * from.step + column, valid);
          // In whole vectors: element by element, shared memory would be what this kernel waits for.
          using Sum = acc_t<E>;
          constexpr int kAtOnce = kPiece * sizeof(Sum) < 16 ? kPiece : 16 / sizeof(Sum);
          using Some = Vec<E, kAtOnce>;
#pragma unroll(kOut > 128 ? 1 : kPiece / kAtOnce)
          for (int first = 0; first < kPiece; first += kAtOnce) {
            const auto some = [&](const Sum* vector) {
              return *reinterpret_cast<const Vec<Sum, kAtOnce>*>(vector + column + first);
            };
            const auto scale = some(shared.y_scale), shift = some(shared.y_shift), a = some(shared.a),
                       b = some(shared.b), mean = some(shared.y_mean);
            auto* const place = reinterpret_cast<Some*>(grad_y + at + first);
            Some grad = *place;
            Some y;
            if constexpr (Tile::kBuffersY)
              y = *reinterpret_cast<const Some*>(shared.y + at + first);
            else
              for (int i = 0; i < kAtOnce; ++i) y[i] = loaded[first + i];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
              const Sum value = static_cast<Sum>(y[i]);
              const Sum d = masked(multiply_add(scale[i], value, shift[i]), static_cast<Sum>(grad[i]));
              grad[i] = static_cast<E>(multiply_add(scale[i], d, -correction(a[i], b[i], value, mean[i])));
            }
            *place = grad;
          }
        });
  });
}

// What a lane does with its results of dz, [16 pixels, 8 kTiles channels]. row, column: where they begin in
// the tile, of which `pixels` rows exist.
template <typename Tile, int kTiles, typename Shared, typename Stage>
__device__ __forceinline__ void finish_dz(const typename Tile::Sum (&dz)[1][kTiles][4], const Shared& shared,
                                          Stage& stage, int row, int column, int pixels, bool accumulate,
                                          typename Tile::Sum (&sums)[2][2 * kTiles]) {
  using E = typename Tile::E;
  using Sum = typename Tile::Sum;
  using Pair = Vec<E, 2>;
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int c = column + 8 * j + 2 * t, at = (row + g + 8 * r) * Tile::kStep + c;
      const bool inside = row + g + 8 * r < pixels;
      Pair x = *reinterpret_cast<Pair*>(stage.x + at), grad_x = *reinterpret_cast<Pair*>(stage.grad_x + at);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Sum value = static_cast<Sum>(x[h]);
        const Sum z = multiply_add(shared.scale[c + h], value, shared.shift[c + h]);
        const Sum d = inside ? masked(z, dz[0][j][2 * r + h]) : Sum(0);
        sums[0][2 * j + h] += d;
        sums[1][2 * j + h] = multiply_add(d, value - shared.mean[c + h], sums[1][2 * j + h]);
        const Sum before = accumulate ? static_cast<Sum>(grad_x[h]) : Sum(0);
        grad_x[h] = static_cast<E>(multiply_add(shared.scale[c + h], d, before));
        x[h] = static_cast<E>(inside ? relu(z) : Sum(0));
      }
      *reinterpret_cast<Pair*>(stage.x + at) = x;
      *reinterpret_cast<Pair*>(stage.grad_x + at) = grad_x;
    }
  }
}

template <typename Asked, int kOut>
__global__ void __launch_bounds__(BackwardTile<Asked, kOut>::kThreads, 2) bottleneck_backward_kernel(
    const BackwardArguments<typename Asked::Element, typename Asked::Sum> arguments) {
  using Math = Available<Asked>;
  using Tile = BackwardTile<Asked, kOut>;
  if (!Tile::kIsLaunched) return;  // and so has no code
  using Sum = typename Math::Sum;
  using Shared = typename Tile::Shared;
  constexpr int kPixels = Tile::kPixels, kColumns = Tile::kColumns, kThreads = Tile::kThreads;
  constexpr int kDzTiles = Tile::kDzColumns / 8, kOutTiles = Tile::kOutRows / 16,
                kWeightTiles = Tile::kWeightColumns / 8;
  DYN_SHARED(Shared, memory);
  Shared& shared = *memory;
  const int first_column = static_cast<int>(blockIdx.x) * kColumns, out = arguments.grad_y.columns;
  const int64_t pixels = arguments.x.rows, first_tile = int64_t{blockIdx.y} * arguments.tiles_per_block;
  const int tiles =
      static_cast<int>(min(arguments.tiles_per_block, (pixels + kPixels - 1) / kPixels - first_tile));
  const bool corrected = arguments.y.data != nullptr, accumulate = arguments.accumulate;
  const bool need_sums = arguments.sum_d != nullptr, need_weight = arguments.grad_weight != nullptr;

  const auto copy = [&](int tile) {
    if (tile < tiles) {
      auto& stage = shared.stages[tile % 2];
      const int64_t first = (first_tile + tile) * kPixels;
      copy_tile<kPixels, kOut, kThreads>(stage.grad_y, arguments.grad_y, first, 0);
      copy_tile<kPixels, kColumns, kThreads>(stage.x, arguments.x, first, first_column);
      if (accumulate)
        copy_tile<kPixels, kColumns, kThreads>(stage.grad_x, read_only(arguments.grad_x), first,
                                               first_column);
      // One buffer is enough: the pieces of the tile before have been used up, by this very thread.
      if (Tile::kBuffersY && corrected) copy_tile<kPixels, kOut, kThreads>(shared.y, arguments.y, first, 0);
    }
    cp_async_commit();
  };
  copy_tile<kOut, kColumns, kThreads>(shared.weight, arguments.weight, 0, first_column);
  read_vector<kColumns, kThreads>(shared.scale, arguments.scale, first_column, arguments.x.columns);
  read_vector<kColumns, kThreads>(shared.shift, arguments.shift, first_column, arguments.x.columns);
  if (need_sums)
    read_vector<kColumns, kThreads>(shared.mean, arguments.mean, first_column, arguments.x.columns);
  if (corrected) {
    read_vector<kOut, kThreads>(shared.y_mean, arguments.y_mean, 0, out);
    read_vector<kOut, kThreads>(shared.a, arguments.a, 0, out);
    read_vector<kOut, kThreads>(shared.b, arguments.b, 0, out);
    if (arguments.y_scale != nullptr) {
      read_vector<kOut, kThreads>(shared.y_scale, arguments.y_scale, 0, out);
      read_vector<kOut, kThreads>(shared.y_shift, arguments.y_shift, 0, out);
    } else {
      for (int i = static_cast<int>(threadIdx.x); i < kOut; i += kThreads) {
        shared.y_scale[i] = Sum(1);
        shared.y_shift[i] = Sum(INFINITY);
      }
    }
  }

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int dz_row = warp % Tile::kPixelWarps * 16, dz_column = warp / Tile::kPixelWarps * Tile::kDzColumns;
  const int out_row = warp % 4 * Tile::kOutRows, column = warp / 4 * Tile::kWeightColumns;
  const int depth = (out + Math::kDepth - 1) / Math::kDepth * Math::kDepth;  // W is zero behind out
  Sum sums[2][2 * kDzTiles] = {}, grad_weight[kOutTiles][kWeightTiles][4] = {};
#pragma unroll 1
  for (int tile = -1; tile < tiles; ++tile) {  // the first round only starts the first copy
    auto& stage = shared.stages[tile & 1];
    const int64_t first = (first_tile + tile) * kPixels, rows = pixels - first;
    if (tile >= 0) {
      cp_async_wait<0>();
      if (corrected) correct_tile<Tile, kOut>(stage.grad_y, shared, arguments.y, first);
    }
    __syncthreads();  // the tile is here, and nobody reads the one before
    copy(tile + 1);
    if (tile < 0) continue;
    Sum dz[1][kDzTiles][4] = {};
    if (need_sums) {
      multiply<Math, Along::depth, Along::side>(dz, stage.grad_y, Tile::kOutStep, dz_row, shared.weight,
                                                Tile::kStep, dz_column, depth, AsIs{});
    }
    finish_dz<Tile>(dz, shared, stage, dz_row, dz_column, static_cast<int>(min(rows, int64_t{kPixels})),
                    accumulate, sums);
    __syncthreads();
    if (need_weight && out_row < out) {
      multiply<Math, Along::side, Along::side>(grad_weight, stage.grad_y, Tile::kOutStep, out_row, stage.x,
                                               Tile::kStep, column, kPixels, AsIs{});
    }
    if (arguments.grad_x.data != nullptr) {
      store_tile<kPixels, kColumns, kThreads>(stage.grad_x, arguments.grad_x, first, first_column,
                                              static_cast<int>(threadIdx.x));
    }
  }

  const int g = lane_id() / 4, t = lane_id() % 4;
  const int channels = arguments.x.columns - first_column;  // of the block, and those behind it
  if (need_weight) {
    using Pair = Vec<Sum, 2>;
    Sum* const to = arguments.grad_weight + int64_t{blockIdx.y} * arguments.weight_step + first_column;
#pragma unroll
    for (int i = 0; i < 2 * kOutTiles; ++i) {
      const int row = out_row + g + 8 * i;
#pragma unroll
      for (int j = 0; j < kWeightTiles; ++j) {
        const Sum(&from)[4] = grad_weight[i / 2][j];
        const int c = column + 8 * j + 2 * t;
        if (row >= out || c >= channels) continue;
        Sum* const pair = to + row * arguments.width + c;
        if (arguments.width % 2 == 0) {  // then there is room for both, and they are aligned
          store(reinterpret_cast<Pair*>(pair), Pair{{from[i % 2 * 2], from[i % 2 * 2 + 1]}});
        } else {
          store(pair, from[i % 2 * 2]);
          if (c + 1 < channels) store(pair + 1, from[i % 2 * 2 + 1]);
        }
      }
    }
  }
  if (!need_sums) return;
#pragma unroll
  for (int i = 0; i < 4 * kDzTiles; ++i) {
    const int which = i / (2 * kDzTiles), j = i % (2 * kDzTiles);
    const Sum sum = sum_over_rows(sums[which][j]);
    if (g == 0) shared.sums[which][dz_row / 16][dz_column + j / 2 * 8 + 2 * t + j % 2] = sum;
  }
  __syncthreads();
  if (const int c = static_cast<int>(threadIdx.x); c < min(kColumns, channels)) {
    Sum totals[2];
    for (int which = 0; which < 2; ++which) {
      totals[which] = shared.sums[which][0][c];
      for (int w = 1; w < Tile::kPixelWarps; ++w) totals[which] += shared.sums[which][w][c];
    }
    if (arguments.sums_step == 0) {
      finish_sums(arguments.to, first_column + c, totals[0], totals[1]);
    } else {
      const int64_t at = int64_t{blockIdx.y} * arguments.sums_step + first_column + c;
      store(arguments.sum_d + at, totals[0]);
      store(arguments.sum_dx + at, totals[1]);
    }
  }
}

// The blocks' partial results, added up in a fixed order: line by line of grad_weight, then sum_d and sum_dx
// together. 32 columns a block of the grid's x, 8 lanes each, of which every one adds its own parts four at a
// time.
template <typename Sum>
struct AddPartsArguments {
  const Sum *weight_parts, *sum_parts;
  int64_t lines, width, channels;  // lines: of grad_weight, 0 if it is not wanted
  int weight_count, sum_count;     // of parts
  Sum* grad_weight;
  SumsOut<Sum> to;
};

constexpr int kPartLanes = 8, kPartColumns = 32, kPartThreads = kPartLanes * kPartColumns;

// The sum of `count` parts that are `step` elements apart, in lane 0.
template <typename Sum>
__device__ __forceinline__ Sum add_parts(const Sum* from, int count, int64_t step, bool inside, int lane,
                                         int side, Sum (&shared)[kPartLanes][kPartColumns]) {
  Sum sums[4] = {};
  if (inside) {
    for (int part = lane; part < count; part += 4 * kPartLanes) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (const int mine = part + i * kPartLanes; mine < count) sums[i] += load(from + mine * step);
      }
    }
  }
  shared[lane][side] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int half = kPartLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) shared[lane][side] += shared[lane + half][side];
  }
  return shared[lane][side];
}

template <typename Sum>
__global__ void __launch_bounds__(kPartThreads) add_parts_kernel(const AddPartsArguments<Sum> arguments) {
  __shared__ Sum shared[2][kPartLanes][kPartColumns];
  const int lane = static_cast<int>(threadIdx.x) / kPartColumns,
            side = static_cast<int>(threadIdx.x) % kPartColumns;
  const int64_t column = int64_t{blockIdx.x} * kPartColumns + side, line = blockIdx.y,
                width = arguments.width;
  const bool inside = column < arguments.channels;
  if (line < arguments.lines) {
    const Sum sum = add_parts(arguments.weight_parts + line * width + column, arguments.weight_count,
                              arguments.lines * width, inside, lane, side, shared[0]);
    if (lane == 0 && inside) store(arguments.grad_weight + line * arguments.channels + column, sum);
    return;
  }
  // Not in a loop: indexed by its counter they would lie in local memory.
  const Sum sum_d =
      add_parts(arguments.sum_parts + column, arguments.sum_count, 2 * width, inside, lane, side, shared[0]);
  const Sum sum_dx = add_parts(arguments.sum_parts + width + column, arguments.sum_count, 2 * width, inside,
                               lane, side, shared[1]);
  if (lane == 0 && inside) finish_sums(arguments.to, column, sum_d, sum_dx);
}

}  // namespace effdense::kernels
