// Operators on features: their statistics, taken once when they are produced, and apply_correction, the part
// of batch normalisation's backward that needs the sums of the whole batch.
#include "kernels/rows.cuh"

namespace effdense::kernels {
namespace {

// Sums of x - pivot and its square, and with kCopy out = x.
template <typename A, bool kCopy>
struct Statistics {
  static constexpr int kIn = 1, kOut = kCopy, kVectors = 1;
  static constexpr Reduce kReduce = Reduce::moments;
  const A* vectors[1] = {nullptr};

  __device__ void operator()(const A (&k)[1], const A (&in)[1], A (&out)[1], Sum<A>& sum,
                             Sum<A>& squares) const {
    const A deviation = in[0] - k[0];
    sum.add(deviation);
    squares.add_product(deviation, deviation);
    if constexpr (kCopy) out[0] = in[0];
  }
};

template <typename A>
struct ApplyCorrection {
  static constexpr int kIn = 2, kOut = 1, kVectors = 3;
  static constexpr Reduce kReduce = Reduce::nothing;
  const A* const vectors[3];  // mean, a, b

  __device__ void operator()(const A (&k)[3], const A (&in)[2], A (&out)[1], Sum<A>&, Sum<A>&) const {
    out[0] = in[1] - correction(k[1], k[2], in[0], k[0]);
  }
};

}  // namespace

template <typename T>
int64_t workspace_size(Size size) {
  const Cut cut(size.channels, 16 / sizeof(T));
  const int64_t row_blocks = std::min(cut.most_row_blocks(), divide_up(size.rows, kLeastRows));
  return (row_blocks * Moments<acc_t<T>>::kLines + 2) * size.channels;  // two: bn_relu_backward's a and b
}

template <typename T>
void channel_statistics(Size size, Matrix<const T> x, StatisticsOut<acc_t<T>> to, Scratch<acc_t<T>> scratch,
                        Stream stream) {
  if (size.rows == 0) return;
  for_rows<T>(size, Statistics<acc_t<T>, false>{}, {{x}, {}}, stream, Moments<acc_t<T>>{size, 0, to},
              scratch);
}

template <typename T>
void append_features(Size size, Matrix<const T> x, Matrix<T> out, StatisticsOut<acc_t<T>> to,
                     Scratch<acc_t<T>> scratch, Stream stream) {
  if (size.rows == 0) return;
  for_rows<T>(size, Statistics<acc_t<T>, true>{}, {{x}, {out}}, stream, Moments<acc_t<T>>{size, 0, to},
              scratch);
}

template <typename T>
void apply_correction(Size size, Matrix<const T> x, const acc_t<T>* mean, const acc_t<T>* a,
                      const acc_t<T>* b, Matrix<const T> grad, Matrix<T> out, Stream stream) {
  if (size.rows == 0) return;
  for_rows<T>(size, ApplyCorrection<acc_t<T>>{{mean, a, b}}, {{x, grad}, {out}}, stream);
}

#define EFFDENSE_INSTANTIATE(T)                                                                            \
  template int64_t workspace_size<T>(Size);                                                                \
  template void channel_statistics(Size, Matrix<const T>, StatisticsOut<acc_t<T>>, Scratch<acc_t<T>>,      \
                                   Stream);                                                                \
  template void append_features(Size, Matrix<const T>, Matrix<T>, StatisticsOut<acc_t<T>>,                 \
                                Scratch<acc_t<T>>, Stream);                                                \
  template void apply_correction(Size, Matrix<const T>, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, \
                                 Matrix<const T>, Matrix<T>, Stream)
EFFDENSE_INSTANTIATE(float);
EFFDENSE_INSTANTIATE(double);
EFFDENSE_INSTANTIATE(__half);
EFFDENSE_INSTANTIATE(__nv_bfloat16);
#undef EFFDENSE_INSTANTIATE

}  // namespace effdense::kernels
