// The launchers of the sample kernels. Matrices are row-major.
#pragma once

#include <cstdint>

namespace effdense::kernels {

constexpr unsigned kFullMask = 0xFFFFFFFF;

// gemm.cu: y [rows, columns] = relu(scale * x + shift) [rows, depth] w^T, w [columns, depth].
void gemm(const float* x, const float* scale, const float* shift, const float* w, float* y, int rows,
          int columns, int depth);

// What is wrong with a tensor-core GEMM's pipeline.
enum class Plant { nothing, no_wait, early_copy };

// tensor_core_gemm.cu: the same for __half and __nv_bfloat16. `stride` is that of x's rows and w's rows;
// pointers and strides are multiples of 16 bytes. With weight_by_depth, w is [depth, columns].
template <typename T>
void tensor_core_gemm(const T* x, const float* scale, const float* shift, const T* w, T* y, int rows,
                      int columns, int depth, int x_stride, int w_stride, bool weight_by_depth, Plant plant);

// y [16 * row_tiles, 8] = x [16 * row_tiles, depth] w^T in TF32, w [8, depth], depth a multiple of 8.
void tf32_gemm(const float* x, const float* w, float* y, int row_tiles, int depth);

// warp.cu: every warp primitive once; 32 results for each, of one warp.
constexpr int kWarpResults = 10;
void warp_primitives(const int* x, int* results);
// The sum of each row of x [rows, columns], one warp a row.
void row_sums(const double* x, double* sums, int rows, int columns);
// x backwards within its blocks of `threads`, of which only the first `count` take part: the others return
// early.
void reverse(const float* x, float* y, int threads, int count);
void reverse_static(const float* x, float* y, int threads, int count);

// bugs.cu: one planted bug each, by name; 64 threads, x and y of 64. False if there is no such bug.
bool launch_bug(const char* name, const float* x, float* y);

}  // namespace effdense::kernels
