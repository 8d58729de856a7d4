// The CUDA kernels as functions over raw pointers and sizes, for the bindings. There is no ATen here, and no
// CUDA header. T is float, double, __half or __nv_bfloat16. An empty call launches nothing; a launch that
// fails throws.
#pragma once

#include <cstdint>
#include <type_traits>

struct __half;
struct __nv_bfloat16;
struct CUstream_st;

namespace effdense::kernels {

using Stream = CUstream_st*;  // cudaStream_t

// The type in which T is computed and accumulated, that of all vectors.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A map as a matrix of pixels by channels, channels side by side: `step` elements from row to row, more than
// channels where it is a slice of a wider buffer.
template <typename T>
struct Matrix {
  T* data;
  int64_t step;
};

// Of all matrices of a call.
struct Size {
  int64_t rows, channels;
};

// Batch normalisation folded into relu(scale * x + shift); mean and rstd where the backward needs them.
template <typename A>
struct Norm {
  const A *scale, *shift, *mean = nullptr, *rstd = nullptr;
};

// A norm's weight or bias, of any floating type.
enum class Element { float32, float64, float16, bfloat16 };
struct Parameter {
  const void* data = nullptr;
  Element type = Element::float32;
};

// rstd = 1 / sqrt(var + eps), scale = weight * rstd, shift = bias - mean * scale, of so many channels; weight
// and bias may be null: 1 and 0. Where the running ones are not null, mean and var become those first.
template <typename A>
struct Fold {
  int64_t channels = 0;
  A *mean = nullptr, *var = nullptr;
  Parameter weight, bias;
  A eps = 0;
  A *rstd = nullptr, *scale = nullptr, *shift = nullptr;
  Parameter running_mean, running_var;
};

// Where mean and biased variance of a call's channels go. `then`: a norm to be folded as soon as they are
// there, of as many channels or more, of which these are the ones from `first` on; without channels, none.
template <typename A>
struct StatisticsOut {
  A *mean, *var;
  Fold<A> then{};
  int64_t first = 0;
};

// Where a backward's two sums go: sum d, the gradient of the norm's bias, and sum d (x - mean), times rstd,
// where that is not null, the gradient of its weight. Where a is not null, also what the batch's statistics
// subtract, a = scale * sum d / M and b = scale * rstd^2 * sum d (x - mean) / M, added to what is there
// (`adds`) or in its place.
template <typename A>
struct SumsOut {
  A *sum_d, *sum_dx;
  const A *rstd = nullptr, *scale = nullptr;
  A *a = nullptr, *b = nullptr;
  bool adds = false;
  A share = 0;  // 1 / M, the number of pixels
};

template <typename A>
A share_of(int64_t count) {
  return A(1) / static_cast<A>(count > 1 ? count : 1);
}

// What a call uses and leaves behind: `partial`, blocks' partial sums, of a size that the launcher tells;
// `counters`, kCounters zeros, which are zeros again when the call's kernels are done: calls of one stream
// may share them.
constexpr int kCounters = 128;
template <typename A>
struct Scratch {
  A* partial;
  int* counters;
};

// Elements of acc_t<T> that a launcher's scratch must have as partial sums.
template <typename T>
int64_t workspace_size(Size size);

// ---- features.cu

// mean and biased variance of every channel.
template <typename T>
void channel_statistics(Size size, Matrix<const T> x, StatisticsOut<acc_t<T>> to, Scratch<acc_t<T>> scratch,
                        Stream stream);

// out = x, with its statistics.
template <typename T>
void append_features(Size size, Matrix<const T> x, Matrix<T> out, StatisticsOut<acc_t<T>> to,
                     Scratch<acc_t<T>> scratch, Stream stream);

// out = grad - a - b * (x - mean)
template <typename T>
void apply_correction(Size size, Matrix<const T> x, const acc_t<T>* mean, const acc_t<T>* a,
                      const acc_t<T>* b, Matrix<const T> grad, Matrix<T> out, Stream stream);

// ---- batch_norm.cu. A is float or double.

// All of them, in as few launches as can be.
template <typename A>
void fold(const Fold<A>* folds, int64_t count, Stream stream);

// a += scale * sum_d / count, b += scale * rstd^2 * sum_dx / count
template <typename A>
void accumulate_correction(int64_t channels, const A* sum_d, const A* sum_dx, const A* rstd, const A* scale,
                           int64_t count, A* a, A* b, Stream stream);

// out = relu(scale * x + shift)
template <typename T>
void bn_relu(Size size, Matrix<const T> x, Norm<acc_t<T>> norm, Matrix<T> out, Stream stream);

// out = relu(scale * x + shift); with d = grad masked by relu: sum d, sum d (x - mean).
template <typename T>
void bn_relu_backward_sums(Size size, Matrix<const T> grad, Matrix<const T> x, Norm<acc_t<T>> norm,
                           Matrix<T> out, SumsOut<acc_t<T>> to, Scratch<acc_t<T>> scratch, Stream stream);

// grad, the gradient of relu(bn(x)), becomes that of x; with d = grad masked by relu: sum d, sum d (x -
// mean).
template <typename T>
void bn_relu_backward(Size size, Matrix<T> grad, Matrix<const T> x, Norm<acc_t<T>> norm,
                      bool batch_statistics, SumsOut<acc_t<T>> to, Scratch<acc_t<T>> scratch, Stream stream);

// grad_x += scale * d, with the same sums
template <typename T>
void bn_relu_backward_accumulate(Size size, Matrix<const T> grad, Matrix<const T> x, Norm<acc_t<T>> norm,
                                 Matrix<T> grad_x, SumsOut<acc_t<T>> to, Scratch<acc_t<T>> scratch,
                                 Stream stream);

// ---- pool.cu

// Windows over images of up to three dimensions, the missing ones in front: 1 pixel, windows of 1. An image
// has fewer than 2^31 pixels, padding included.
struct Windows {
  int64_t images, channels;
  int in[3], kernel[3], stride[3], padding[3], out[3];
};

// The average of relu(scale * x + shift) over windows side by side (stride = kernel, no padding).
template <typename T>
void bn_relu_avg_pool(const Windows& windows, Matrix<const T> x, Norm<acc_t<T>> norm, Matrix<T> out,
                      Stream stream);

template <typename T>
int64_t avg_pool_workspace_size(const Windows& windows);

// grad_x = scale * d, 0 where no window reaches, with sum d and sum d (x - mean).
template <typename T>
void bn_relu_avg_pool_backward(const Windows& windows, Matrix<const T> grad, Matrix<const T> x,
                               Norm<acc_t<T>> norm, Matrix<T> grad_x, SumsOut<acc_t<T>> to,
                               Scratch<acc_t<T>> scratch, Stream stream);

// The maximum of relu(scale * x + shift), and which tap of the window it was.
template <typename T>
void bn_relu_max_pool(const Windows& windows, Matrix<const T> x, Norm<acc_t<T>> norm, Matrix<T> out,
                      Matrix<uint8_t> where, Stream stream);

// grad_z: the gradient of what the maximum was taken of.
template <typename T>
void max_pool_backward(const Windows& windows, Matrix<const T> grad, Matrix<const uint8_t> where,
                       Matrix<T> grad_z, Stream stream);

}  // namespace effdense::kernels
