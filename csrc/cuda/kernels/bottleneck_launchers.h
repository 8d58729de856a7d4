// The bottleneck's two GEMM kernels as functions over raw pointers and sizes, for the bindings. Conventions
// as in launchers.h. Size: the pixels and channels of x; weight is [out_channels, channels]. `tf32` permits
// rounding float operands to TF32, and means nothing to other types.
#pragma once

#include "kernels/launchers.h"

namespace effdense::kernels {

// How many multiprocessors launches are cut for; 0: those of the card. Of the calling thread: checks set it,
// for the tiles that only large maps would have.
inline thread_local int assumed_multiprocessors = 0;

// What may follow y = weight relu(...): + bias, then relu(scale * y + shift). Null: not wanted.
template <typename A>
struct Epilogue {
  const A *bias = nullptr, *scale = nullptr, *shift = nullptr;
};

// grad - a - b * (y - mean) is what stands for the gradient of y, and scale * (grad masked by relu(scale * y
// + shift)) for grad where scale is not null; with y.data null, grad itself.
template <typename T>
struct Correction {
  Matrix<const T> y{nullptr, 0};
  const acc_t<T>*mean = nullptr, *a = nullptr, *b = nullptr, *scale = nullptr, *shift = nullptr;
};

// ---- bottleneck.cu

// Elements of acc_t<T> that the scratch must have as partial sums; needed only with statistics.
template <typename T>
int64_t bottleneck_workspace_size(Size size, int64_t out_channels);

// y = weight relu(scale * x + shift), and what follows. With to.mean not null: the statistics of y, as it was
// stored; what they are folded into has y's channels and no others.
template <typename T>
void bottleneck(Size size, int64_t out_channels, Matrix<const T> x, Norm<acc_t<T>> norm,
                Matrix<const T> weight, Epilogue<acc_t<T>> epilogue, bool tf32, Matrix<T> y,
                StatisticsOut<acc_t<T>> to, Scratch<acc_t<T>> scratch, Stream stream);

// ---- bottleneck_backward.cu

template <typename T>
int64_t bottleneck_backward_workspace_size(Size size, int64_t out_channels);

// With d = weight^T grad_y where relu(scale * x + shift) lets it pass:
//   grad_x = scale * d, or += with accumulate; unless grad_x.data is null
//   sum d and sum d (x - mean) go where `to` says; unless to.sum_d is null, and then grad_x.data is too
//   grad_weight [out_channels, channels] = grad_y^T relu(scale * x + shift); unless it is null
template <typename T>
void bottleneck_backward(Size size, int64_t out_channels, Matrix<const T> x, Matrix<const T> grad_y,
                         Correction<T> correction, Norm<acc_t<T>> norm, Matrix<const T> weight, bool tf32,
                         Matrix<T> grad_x, bool accumulate, acc_t<T>* grad_weight, SumsOut<acc_t<T>> to,
                         acc_t<T>* workspace, Stream stream);

}  // namespace effdense::kernels
