// Batch normalisation: fold and accumulate_correction for one number per channel, z = relu(scale * x + shift)
// of a map, and its backward in three forms. bn_relu_backward_sums makes z again and takes the sums,
// bn_relu_backward finishes the gradient at once, and bn_relu_backward_accumulate adds the part that needs no
// sums of the batch to a block's gradient buffer.
#include "kernels/rows.cuh"

namespace effdense::kernels {
namespace {

// ---- One number per channel

template <typename Body>
__global__ void __launch_bounds__(kThreads) channels_kernel(Body body, int64_t channels) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c < channels) body(c);
}

template <typename Body>
void for_channels(int64_t channels, const Body& body, Stream stream) {
  if (channels == 0) return;
  const dim3 grid(static_cast<unsigned>(divide_up(channels, kThreads)));
  launch(channels_kernel<Body>, grid, dim3(kThreads), 0, stream, body, channels);
}

// As many as fit what a launch may have as parameters.
constexpr int kFoldsAtOnce = 24;
template <typename A>
struct Folds {
  Fold<A> each[kFoldsAtOnce];
};
static_assert(sizeof(Folds<double>) <= 4000);

// A fold has the blocks of its line of the grid.
template <typename A>
__global__ void __launch_bounds__(kThreads) fold_kernel(const Folds<A> folds) {
  const Fold<A>& fold = folds.each[blockIdx.y];
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c < fold.channels) fold_channel(fold, c);
}

template <typename A>
struct AccumulateCorrection {
  const A *sum_d, *sum_dx, *rstd, *scale;
  A share;
  A *a, *b;

  __device__ void operator()(int64_t c) const {
    A now_a = load(a + c), now_b = load(b + c);
    accumulate_channel_correction(share, load(scale + c), load(rstd + c), load(sum_d + c), load(sum_dx + c),
                                  now_a, now_b);
    store(a + c, now_a);
    store(b + c, now_b);
  }
};

// ---- Maps

template <typename A>
struct BnRelu {
  static constexpr int kIn = 1, kOut = 1, kVectors = 2;
  static constexpr Reduce kReduce = Reduce::nothing;
  const A* const vectors[2];  // scale, shift

  __device__ void operator()(const A (&k)[2], const A (&in)[1], A (&out)[1], Sum<A>&, Sum<A>&) const {
    out[0] = relu(multiply_add(k[0], in[0], k[1]));
  }
};

// What is written once d is known.
enum class Write { nothing, z, replace, add };

// d = grad masked by relu, its two sums, and relu's output, or scale * d in place of the gradient or in
// addition to another.
template <typename A, Write kWrite>
struct Backward {
  static constexpr int kIn = kWrite == Write::add ? 3 : 2, kOut = kWrite != Write::nothing, kVectors = 3;
  static constexpr Reduce kReduce = Reduce::gradients;
  const A* const vectors[3];  // scale, shift, mean

  // in: x, grad, and grad_x that is added to
  __device__ void operator()(const A (&k)[3], const A (&in)[kIn], A (&out)[1], Sum<A>& sum_d,
                             Sum<A>& sum_dx) const {
    const A z = multiply_add(k[0], in[0], k[1]), d = masked(z, in[1]);
    sum_d.add(d);
    sum_dx.add_product(d, in[0] - k[2]);
    if constexpr (kWrite == Write::z) out[0] = relu(z);
    if constexpr (kWrite == Write::replace) out[0] = k[0] * d;
    if constexpr (kWrite == Write::add) out[0] = multiply_add(k[0], d, in[2]);
  }
};

// The sums' result, and with them a and b of `Finish`, in double.
template <typename A>
struct BatchGradients : Gradients<A> {
  Norm<A> norm;
  A *a, *b;

  __device__ void finish(int64_t c, double pivot, const double (&sums)[2]) const {
    Gradients<A>::finish(c, pivot, sums);
    const double over = static_cast<double>(load(norm.scale + c)) / static_cast<double>(this->size.rows);
    const double rstd = load(norm.rstd + c);
    store(a + c, static_cast<A>(over * sums[0]));
    store(b + c, static_cast<A>(over * rstd * rstd * sums[1]));
  }
};

// grad = scale * d - a - b * (x - mean), with the sums of the batch in a and b
template <typename A>
struct Finish {
  static constexpr int kIn = 2, kOut = 1, kVectors = 5;
  static constexpr Reduce kReduce = Reduce::nothing;
  const A* const vectors[5];  // scale, shift, mean, a, b

  __device__ void operator()(const A (&k)[5], const A (&in)[2], A (&out)[1], Sum<A>&, Sum<A>&) const {
    const A d = masked(multiply_add(k[0], in[0], k[1]), in[1]);
    out[0] = multiply_add(k[0], d, -correction(k[3], k[4], in[0], k[2]));
  }
};

}  // namespace

template <typename A>
void fold(const Fold<A>* folds, int64_t count, Stream stream) {
  for (int64_t first = 0; first < count; first += kFoldsAtOnce) {
    Folds<A> some{};
    const int64_t here = std::min<int64_t>(kFoldsAtOnce, count - first);
    int64_t most = 0;
    for (int64_t i = 0; i < here; ++i) {
      some.each[i] = folds[first + i];
      most = std::max(most, some.each[i].channels);
    }
    if (most == 0) continue;
    const dim3 grid(static_cast<unsigned>(divide_up(most, kThreads)), static_cast<unsigned>(here));
    launch(fold_kernel<A>, grid, dim3(kThreads), 0, stream, some);
  }
}

template <typename A>
void accumulate_correction(int64_t channels, const A* sum_d, const A* sum_dx, const A* rstd, const A* scale,
                           int64_t count, A* a, A* b, Stream stream) {
  for_channels(channels, AccumulateCorrection<A>{sum_d, sum_dx, rstd, scale, share_of<A>(count), a, b},
               stream);
}

template <typename T>
void bn_relu(Size size, Matrix<const T> x, Norm<acc_t<T>> norm, Matrix<T> out, Stream stream) {
  if (size.rows == 0) return;
  for_rows<T>(size, BnRelu<acc_t<T>>{{norm.scale, norm.shift}}, {{x}, {out}}, stream);
}

template <typename T>
void bn_relu_backward_sums(Size size, Matrix<const T> grad, Matrix<const T> x, Norm<acc_t<T>> norm,
                           Matrix<T> out, SumsOut<acc_t<T>> to, Scratch<acc_t<T>> scratch, Stream stream) {
  using A = acc_t<T>;
  if (size.rows == 0) return;
  const Backward<A, Write::z> body{{norm.scale, norm.shift, norm.mean}};
  for_rows<T>(size, body, {{x, grad}, {out}}, stream, Gradients<A>{size, to}, scratch);
}

// The batch's sums need every element before the first is finished: two passes. Without them one does it.
template <typename T>
void bn_relu_backward(Size size, Matrix<T> grad, Matrix<const T> x, Norm<acc_t<T>> norm,
                      bool batch_statistics, SumsOut<acc_t<T>> to, Scratch<acc_t<T>> scratch, Stream stream) {
  using A = acc_t<T>;
  if (size.rows == 0) return;
  const Matrix<const T> dz{grad.data, grad.step};
  if (!batch_statistics) {
    const Backward<A, Write::replace> body{{norm.scale, norm.shift, norm.mean}};
    for_rows<T>(size, body, {{x, dz}, {grad}}, stream, Gradients<A>{size, to}, scratch);
    return;
  }
  A *const a = scratch.partial, *const b = a + size.channels;
  scratch.partial = b + size.channels;
  const Backward<A, Write::nothing> body{{norm.scale, norm.shift, norm.mean}};
  for_rows<T>(size, body, {{x, dz}, {}}, stream, BatchGradients<A>{{size, to}, norm, a, b}, scratch);
  for_rows<T>(size, Finish<A>{{norm.scale, norm.shift, norm.mean, a, b}}, {{x, dz}, {grad}}, stream);
}

template <typename T>
void bn_relu_backward_accumulate(Size size, Matrix<const T> grad, Matrix<const T> x, Norm<acc_t<T>> norm,
                                 Matrix<T> grad_x, SumsOut<acc_t<T>> to, Scratch<acc_t<T>> scratch,
                                 Stream stream) {
  using A = acc_t<T>;
  if (size.rows == 0) return;
  const Backward<A, Write::add> body{{norm.scale, norm.shift, norm.mean}};
  const Matrix<const T> before{grad_x.data, grad_x.step};
  for_rows<T>(size, body, {{x, grad, before}, {grad_x}}, stream, Gradients<A>{size, to}, scratch);
}

#define EFFDENSE_INSTANTIATE_VECTORS(A)                                                                 \
  template void fold(const Fold<A>*, int64_t, Stream);                                                  \
  template void accumulate_correction(int64_t, const A*, const A*, const A*, const A*, int64_t, A*, A*, \
                                      Stream)
EFFDENSE_INSTANTIATE_VECTORS(float);
EFFDENSE_INSTANTIATE_VECTORS(double);
#undef EFFDENSE_INSTANTIATE_VECTORS

#define EFFDENSE_INSTANTIATE(T)                                                                             \
  template void bn_relu(Size, Matrix<const T>, Norm<acc_t<T>>, Matrix<T>, Stream);                          \
  template void bn_relu_backward_sums(Size, Matrix<const T>, Matrix<const T>, Norm<acc_t<T>>, Matrix<T>,    \
                                      SumsOut<acc_t<T>>, Scratch<acc_t<T>>, Stream);                        \
  template void bn_relu_backward(Size, Matrix<T>, Matrix<const T>, Norm<acc_t<T>>, bool, SumsOut<acc_t<T>>, \
                                 Scratch<acc_t<T>>, Stream);                                                \
  template void bn_relu_backward_accumulate(Size, Matrix<const T>, Matrix<const T>, Norm<acc_t<T>>,         \
                                            Matrix<T>, SumsOut<acc_t<T>>, Scratch<acc_t<T>>, Stream)
EFFDENSE_INSTANTIATE(float);
EFFDENSE_INSTANTIATE(double);
EFFDENSE_INSTANTIATE(__half);
EFFDENSE_INSTANTIATE(__nv_bfloat16);
#undef EFFDENSE_INSTANTIATE

}  // namespace effdense::kernels
