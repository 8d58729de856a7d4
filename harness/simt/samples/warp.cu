// Small kernels that use the barriers, shuffles, votes and shared memory as they should be used.
#include "kernels/compat.cuh"
#include "samples.h"

namespace effdense::kernels {
namespace {

__global__ void warp_primitives_kernel(const int* x, int* results) {
  const int lane = threadIdx.x, value = load(x + lane);
  int mine[kWarpResults];
  mine[0] = __shfl_sync(kFullMask, value, lane + 5);
  mine[1] = __shfl_sync(kFullMask, value, 3, 8);
  mine[2] = __shfl_xor_sync(kFullMask, value, 9);
  mine[3] = __shfl_xor_sync(kFullMask, value, 4, 4);
  mine[4] = __shfl_up_sync(kFullMask, value, 3, 16);
  mine[5] = __shfl_down_sync(kFullMask, value, 3, 16);
  mine[6] = static_cast<int>(__ballot_sync(kFullMask, value % 3 == 0));
  const unsigned halves = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  mine[7] = __any_sync(halves, value == 7);
  mine[8] = __all_sync(halves, value < 20);
  // Neighbours swap through shared memory, ordered by __syncwarp of their half alone.
  __shared__ int exchange[32];
  exchange[lane] = value;
  __syncwarp(halves);
  mine[9] = exchange[lane ^ 1];
  for (int i = 0; i < kWarpResults; ++i) store(results + 32 * i + lane, mine[i]);
}

__global__ void row_sums_kernel(const double* x, double* sums, int rows, int columns) {
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;  // whole warps
  double sum = 0;
  for (int i = lane; i < columns; i += 32) sum += load(x + int64_t{row} * columns + i);
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kFullMask, sum, lanes);
  if (lane == 0) store(sums + row, sum);
}

__device__ void reverse_through(float* tile, const float* x, float* y, int count) {
  if (static_cast<int>(threadIdx.x) >= count) return;
  const float* const from = x + blockIdx.x * count;
  tile[threadIdx.x] = load(from + threadIdx.x);
  __syncthreads();
  store(y + blockIdx.x * count + threadIdx.x, tile[count - 1 - threadIdx.x]);
}

__global__ void reverse_kernel(const float* x, float* y, int count) {
  DYN_SHARED(float, tile);
  reverse_through(tile, x, y, count);
}

template <int kSize>
__global__ void reverse_static_kernel(const float* x, float* y, int count) {
  __shared__ float tile[kSize];
  reverse_through(tile, x, y, count);
}

}  // namespace

void warp_primitives(const int* x, int* results) {
  launch(warp_primitives_kernel, 1, 32, 0, nullptr, x, results);
}

void row_sums(const double* x, double* sums, int rows, int columns) {
  constexpr int kWarps = 4;
  launch(row_sums_kernel, (rows + kWarps - 1) / kWarps, 32 * kWarps, 0, nullptr, x, sums, rows, columns);
}

void reverse(const float* x, float* y, int threads, int count) {
  launch<Exit::early>(reverse_kernel, 2, threads, sizeof(float) * count, nullptr, x, y, count);
}

void reverse_static(const float* x, float* y, int threads, int count) {
  launch<Exit::early>(reverse_static_kernel<64>, 2, threads, 0, nullptr, x, y, count);
}

}  // namespace effdense::kernels
