// Batch normalisation: what is done with one number per channel (fold, defer), z = relu(scale * x + shift) of
// a map, and its backwards: bn_relu_with_sums takes sums only, bn_relu_backward finishes the gradient at
// once, bn_relu_accumulate adds the part that needs no sums of the batch to a block's gradient buffer.
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

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

template <typename A>
struct Fold {
  const A *mean, *var, *weight, *bias;
  A eps;
  A *rstd, *scale, *shift;

  __device__ void operator()(int64_t c) const {
    const A r = A(1) / root(load(var + c) + eps);
    const A s = weight == nullptr ? r : r * load(weight + c);
    store(rstd + c, r);
    store(scale + c, s);
    store(shift + c, (bias == nullptr ? A(0) : load(bias + c)) - load(mean + c) * s);
  }
};

template <typename A>
struct Defer {
  const A *sum_d, *sum_dx, *rstd, *scale;
  A share;
  A *a, *b;

  __device__ void operator()(int64_t c) const {
    const A over = share * load(scale + c), r = load(rstd + c);
    store(a + c, load(a + c) + over * load(sum_d + c));
    store(b + c, load(b + c) + over * r * r * load(sum_dx + c));
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
void fold(int64_t channels, const A* mean, const A* var, const A* weight, const A* bias, A eps, A* rstd,
          A* scale, A* shift, Stream stream) {
  for_channels(channels, Fold<A>{mean, var, weight, bias, eps, rstd, scale, shift}, stream);
}

template <typename A>
void defer(int64_t channels, const A* sum_d, const A* sum_dx, const A* rstd, const A* scale, int64_t count,
           A* a, A* b, Stream stream) {
  const A share = A(1) / static_cast<A>(std::max<int64_t>(count, 1));
  for_channels(channels, Defer<A>{sum_d, sum_dx, rstd, scale, share, a, b}, stream);
}

template <typename T>
void bn_relu(Size size, Matrix<const T> x, Norm<acc_t<T>> norm, Matrix<T> out, Stream stream) {
  if (size.rows == 0) return;
  for_rows<T>(size, BnRelu<acc_t<T>>{{norm.scale, norm.shift}}, {{x}, {out}}, nullptr, stream);
}

template <typename T>
void bn_relu_with_sums(Size size, Matrix<const T> grad, Matrix<const T> x, Norm<acc_t<T>> norm, Matrix<T> out,
                       acc_t<T>* sum_d, acc_t<T>* sum_dx, acc_t<T>* workspace, Stream stream) {
  using A = acc_t<T>;
  if (size.rows == 0) return;
  const Backward<A, Write::z> body{{norm.scale, norm.shift, norm.mean}};
  const Cut cut = for_rows<T>(size, body, {{x, grad}, {out}}, workspace, stream);
  merge(Gradients<A>{size, sum_d, sum_dx}, cut.row_blocks, workspace, stream);
}

// The batch's sums need every element before the first is finished: two passes. Without them one does it.
template <typename T>
void bn_relu_backward(Size size, Matrix<T> grad, Matrix<const T> x, Norm<acc_t<T>> norm,
                      bool batch_statistics, acc_t<T>* sum_d, acc_t<T>* sum_dx, acc_t<T>* workspace,
                      Stream stream) {
  using A = acc_t<T>;
  if (size.rows == 0) return;
  const Matrix<const T> dz{grad.data, grad.step};
  if (!batch_statistics) {
    const Backward<A, Write::replace> body{{norm.scale, norm.shift, norm.mean}};
    const Cut cut = for_rows<T>(size, body, {{x, dz}, {grad}}, workspace, stream);
    merge(Gradients<A>{size, sum_d, sum_dx}, cut.row_blocks, workspace, stream);
    return;
  }
  A *const a = workspace, *const b = a + size.channels, *const partial = b + size.channels;
  const Backward<A, Write::nothing> body{{norm.scale, norm.shift, norm.mean}};
  const Cut cut = for_rows<T>(size, body, {{x, dz}, {}}, partial, stream);
  merge(Gradients<A>{size, sum_d, sum_dx, norm, a, b}, cut.row_blocks, partial, stream);
  for_rows<T>(size, Finish<A>{{norm.scale, norm.shift, norm.mean, a, b}}, {{x, dz}, {grad}}, nullptr, stream);
}

template <typename T>
void bn_relu_accumulate(Size size, Matrix<const T> grad, Matrix<const T> x, Norm<acc_t<T>> norm,
                        Matrix<T> grad_x, acc_t<T>* sum_d, acc_t<T>* sum_dx, acc_t<T>* workspace,
                        Stream stream) {
  using A = acc_t<T>;
  if (size.rows == 0) return;
  const Backward<A, Write::add> body{{norm.scale, norm.shift, norm.mean}};
  const Matrix<const T> before{grad_x.data, grad_x.step};
  const Cut cut = for_rows<T>(size, body, {{x, grad, before}, {grad_x}}, workspace, stream);
  merge(Gradients<A>{size, sum_d, sum_dx}, cut.row_blocks, workspace, stream);
}

#define EFFDENSE_INSTANTIATE_VECTORS(A)                                                       \
  template void fold(int64_t, const A*, const A*, const A*, const A*, A, A*, A*, A*, Stream); \
  template void defer(int64_t, const A*, const A*, const A*, const A*, int64_t, A*, A*, Stream)
EFFDENSE_INSTANTIATE_VECTORS(float);
EFFDENSE_INSTANTIATE_VECTORS(double);
#undef EFFDENSE_INSTANTIATE_VECTORS

#define EFFDENSE_INSTANTIATE(T)                                                                       \
  template void bn_relu(Size, Matrix<const T>, Norm<acc_t<T>>, Matrix<T>, Stream);                    \
  template void bn_relu_with_sums(Size, Matrix<const T>, Matrix<const T>, Norm<acc_t<T>>, Matrix<T>,  \
                                  acc_t<T>*, acc_t<T>*, acc_t<T>*, Stream);                           \
  template void bn_relu_backward(Size, Matrix<T>, Matrix<const T>, Norm<acc_t<T>>, bool, acc_t<T>*,   \
                                 acc_t<T>*, acc_t<T>*, Stream);                                       \
  template void bn_relu_accumulate(Size, Matrix<const T>, Matrix<const T>, Norm<acc_t<T>>, Matrix<T>, \
                                   acc_t<T>*, acc_t<T>*, acc_t<T>*, Stream)
EFFDENSE_INSTANTIATE(float);
EFFDENSE_INSTANTIATE(double);
EFFDENSE_INSTANTIATE(__half);
EFFDENSE_INSTANTIATE(__nv_bfloat16);
#undef EFFDENSE_INSTANTIATE

}  // namespace effdense::kernels
