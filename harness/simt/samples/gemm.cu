// A tiled GEMM with a BN-ReLU prologue in plain float arithmetic: 64 x 64 results a block, 4 x 4 a thread.
#include "kernels/compat.cuh"
#include "samples.h"

namespace effdense::kernels {
namespace {

constexpr int kSide = 64, kSlice = 16, kPatch = 4, kGemmThreads = kSide / kPatch * (kSide / kPatch);

__global__ void __launch_bounds__(kGemmThreads)
    gemm_kernel(const float* x, const float* scale, const float* shift, const float* w, float* y, int rows,
                int columns, int depth) {
  __shared__ float z_tile[kSlice][kSide + 1];
  __shared__ float w_tile[kSlice][kSide + 1];
  const int first_row = blockIdx.x * kSide, first_column = blockIdx.y * kSide;
  const int row = threadIdx.x / (kSide / kPatch) * kPatch, column = threadIdx.x % (kSide / kPatch) * kPatch;
  float sums[kPatch][kPatch] = {};
  for (int first = 0; first < depth; first += kSlice) {
    for (int i = threadIdx.x; i < kSide * kSlice; i += kGemmThreads) {
      const int line = i / kSlice, k = i % kSlice;
      const bool inside = first + k < depth;
      float z = 0, weight = 0;
      if (inside && first_row + line < rows) {
        const float value = load(x + int64_t{first_row + line} * depth + first + k);
        z = fmaxf(load(scale + first + k) * value + load(shift + first + k), 0.0f);
      }
      if (inside && first_column + line < columns)
        weight = load(w + int64_t{first_column + line} * depth + first + k);
      z_tile[k][line] = z;
      w_tile[k][line] = weight;
    }
    __syncthreads();
    for (int k = 0; k < kSlice; ++k) {
      for (int i = 0; i < kPatch; ++i) {
        for (int j = 0; j < kPatch; ++j) sums[i][j] += z_tile[k][row + i] * w_tile[k][column + j];
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < kPatch; ++i) {
    for (int j = 0; j < kPatch; ++j) {
      const int r = first_row + row + i, c = first_column + column + j;
      if (r < rows && c < columns) store(y + int64_t{r} * columns + c, sums[i][j]);
    }
  }
}

}  // namespace

void gemm(const float* x, const float* scale, const float* shift, const float* w, float* y, int rows,
          int columns, int depth) {
  const dim3 grid((rows + kSide - 1) / kSide, (columns + kSide - 1) / kSide);
  launch(gemm_kernel, grid, kGemmThreads, 0, nullptr, x, scale, shift, w, y, rows, columns, depth);
}

}  // namespace effdense::kernels
