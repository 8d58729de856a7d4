// GEMMs on tensor cores. In 16 bits: 64 x 64 results a block of 4 warps, tiles of 32 of depth that travel by
// cp.async in a pipeline of three stages, the BN-ReLU prologue applied to A's fragments. In TF32: 16 x 8
// results a warp.
#include "kernels/compat.cuh"
#include "samples.h"

namespace effdense::kernels {
namespace {

using namespace ampere;

constexpr int kTile = 64, kDepth = 32, kStages = 3, kThreads = 128;

template <typename T>
struct alignas(16) Stage {
  T x[kTile][kDepth + 8];  // 8 more: the rows that ldmatrix reads fall into different banks
  T w[kTile * (kDepth + 8)];
  float scale[kDepth], shift[kDepth];
};

// Starts the copy of a tile of `tile_rows` x kColumns; what lies beyond rows or columns becomes zero.
template <int kColumns, typename T>
__device__ void copy_tile(T* tile, int tile_stride, int tile_rows, const T* matrix, int stride, int first_row,
                          int first_column, int rows, int columns) {
  constexpr int kPiece = 16 / sizeof(T), kPieces = kColumns / kPiece;
  for (int i = threadIdx.x; i < tile_rows * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    const bool row_inside = first_row + row < rows;
    const int valid = row_inside ? min(max(columns - first_column - column, 0), kPiece) : 0;
    const T* from = valid > 0 ? matrix + int64_t{first_row + row} * stride + first_column + column : matrix;
    cp_async16(tile + row * tile_stride + column, from, valid * static_cast<int>(sizeof(T)));
  }
}

template <typename T>
__device__ uint32_t bn_relu_pair(uint32_t pair, const float* scale, const float* shift) {
  Vec<T, 2> values;
  memcpy(&values, &pair, sizeof pair);
  for (int i = 0; i < 2; ++i) {
    values[i] = static_cast<T>(fmaxf(scale[i] * static_cast<float>(values[i]) + shift[i], 0.0f));
  }
  memcpy(&pair, &values, sizeof pair);
  return pair;
}

// 32 x 32 results of one warp, from one stage.
template <typename T, bool kWeightByDepth>
__device__ void multiply(float (&sums)[2][4][4], const Stage<T>& stage, int warp_row, int warp_column) {
  const int lane = threadIdx.x % 32;
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[2][4], b[2][4];
    for (int i = 0; i < 2; ++i) {
      ldmatrix_x4(a[i], &stage.x[warp_row + 16 * i + lane % 16][k + lane / 16 * 8]);
      for (int r = 0; r < 4; ++r) {
        const int first = k + lane % 4 * 2 + r / 2 * 8;
        a[i][r] = bn_relu_pair<T>(a[i][r], stage.scale + first, stage.shift + first);
      }
    }
    for (int j = 0; j < 2; ++j) {  // b[j]: b0 and b1 of columns 16 j.., then of 16 j + 8..
      const int column = warp_column + 16 * j + lane / 16 * 8, depth = k + lane / 8 % 2 * 8;
      if constexpr (kWeightByDepth) {
        ldmatrix_x4_trans(b[j], stage.w + (depth + lane % 8) * (kTile + 8) + column);
      } else {
        ldmatrix_x4(b[j], stage.w + (column + lane % 8) * (kDepth + 8) + depth);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j)
        mma_16x8x16<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

template <typename T, bool kWeightByDepth, Plant kPlant>
__global__ void __launch_bounds__(kThreads)
    tensor_core_gemm_kernel(const T* x, const float* scale, const float* shift, const T* w, T* y, int rows,
                            int columns, int depth, int x_stride, int w_stride) {
  DYN_SHARED(Stage<T>, stages);
  const int first_row = blockIdx.x * kTile, first_column = blockIdx.y * kTile;
  const int tiles = (depth + kDepth - 1) / kDepth;
  const auto copy = [&](int tile) {
    if (tile < tiles) {
      Stage<T>& stage = stages[tile % kStages];
      const int first = tile * kDepth;
      copy_tile<kDepth>(&stage.x[0][0], kDepth + 8, kTile, x, x_stride, first_row, first, rows, depth);
      if constexpr (kWeightByDepth) {
        copy_tile<kTile>(stage.w, kTile + 8, kDepth, w, w_stride, first, first_column, depth, columns);
      } else {
        copy_tile<kDepth>(stage.w, kDepth + 8, kTile, w, w_stride, first_column, first, columns, depth);
      }
      copy_tile<kDepth>(stage.scale, kDepth, 1, scale, 0, 0, first, 1, depth);
      copy_tile<kDepth>(stage.shift, kDepth, 1, shift, 0, 0, first, 1, depth);
    }
    cp_async_commit();  // empty behind the end, so that the count of groups stays right
  };
  for (int tile = 0; tile < kStages - 1; ++tile) copy(tile);
  const int warp = threadIdx.x / 32, warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  float sums[2][4][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    if constexpr (kPlant != Plant::no_wait) cp_async_wait<kStages - 2>();
    if constexpr (kPlant == Plant::early_copy) copy(tile + kStages - 1);
    __syncthreads();  // the tile is here, and nobody reads the one before
    if constexpr (kPlant != Plant::early_copy) copy(tile + kStages - 1);
    multiply<T, kWeightByDepth>(sums, stages[tile % kStages], warp_row, warp_column);
  }
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + warp_row + 16 * i + lane / 4 + e / 2 * 8;
        const int column = first_column + warp_column + 8 * j + lane % 4 * 2 + e % 2;
        if (row < rows && column < columns)
          store(y + int64_t{row} * columns + column, static_cast<T>(sums[i][j][e]));
      }
    }
  }
}

__global__ void tf32_gemm_kernel(const float* x, const float* w, float* y, int depth) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const float* const rows = x + int64_t{blockIdx.x} * 16 * depth;
  float sums[4] = {};
  for (int k = 0; k < depth; k += 8) {
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = to_tf32(load(rows + (g + i % 2 * 8) * depth + k + t + i / 2 * 4));
    mma_16x8x8_tf32(sums, a, to_tf32(load(w + g * depth + k + t)), to_tf32(load(w + g * depth + k + t + 4)));
  }
  for (int half = 0; half < 2; ++half) {
    using Pair = Vec<float, 2>;
    store(reinterpret_cast<Pair*>(y + (int64_t{blockIdx.x} * 16 + g + 8 * half) * 8 + 2 * t),
          Pair{{sums[2 * half], sums[2 * half + 1]}});
  }
}

}  // namespace

template <typename T>
void tensor_core_gemm(const T* x, const float* scale, const float* shift, const T* w, T* y, int rows,
                      int columns, int depth, int x_stride, int w_stride, bool weight_by_depth, Plant plant) {
  const dim3 grid((rows + kTile - 1) / kTile, (columns + kTile - 1) / kTile);
  const auto kernel = weight_by_depth              ? tensor_core_gemm_kernel<T, true, Plant::nothing>
                      : plant == Plant::no_wait    ? tensor_core_gemm_kernel<T, false, Plant::no_wait>
                      : plant == Plant::early_copy ? tensor_core_gemm_kernel<T, false, Plant::early_copy>
                                                   : tensor_core_gemm_kernel<T, false, Plant::nothing>;
  launch(kernel, grid, kThreads, kStages * sizeof(Stage<T>), nullptr, x, scale, shift, w, y, rows, columns,
         depth, x_stride, w_stride);
}

template void tensor_core_gemm(const __half*, const float*, const float*, const __half*, __half*, int, int,
                               int, int, int, bool, Plant);
template void tensor_core_gemm(const __nv_bfloat16*, const float*, const float*, const __nv_bfloat16*,
                               __nv_bfloat16*, int, int, int, int, int, bool, Plant);

void tf32_gemm(const float* x, const float* w, float* y, int row_tiles, int depth) {
  launch(tf32_gemm_kernel, row_tiles, 32, 0, nullptr, x, w, y, depth);
}

}  // namespace effdense::kernels
