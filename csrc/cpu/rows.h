// The CPU's element-wise loops over a matrix of pixels (rows) by channels (columns), channels side by side in
// memory. Their source is rows.inc. It is compiled once per instruction set (rows_default.cpp, rows_avx2.cpp,
// rows_avx512.cpp), and `rows<T>()` picks at run time, by ATen's capability (ATEN_CPU_CAPABILITY narrows it).
#pragma once

#include <cstdint>
#include <type_traits>

namespace effdense {

// Storage of a bfloat16. Not c10's class: its inline functions would be compiled for several instruction
// sets, and the linker keeps whichever copy it likes.
struct bfloat16 {
  uint16_t bits;
};

// The type in which T is computed and accumulated.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A matrix in somebody else's memory: `step` elements from row to row.
template <typename T>
struct Block {
  T* data;
  int64_t step;
  T* row(int64_t r) const { return data + r * step; }
};

// Loops over fewer columns than this may read and write up to it, where they say so.
constexpr int64_t kVector = 16;

// n columns (channels); scale, shift, mean, a, b, sum_d, sum_dx have n elements. sum_d grows by the sum of d,
// sum_dx by that of d * (x - mean): in double, since plain PyTorch sums so.
template <typename T>
struct Rows {
  using A = acc_t<T>;
  void (*copy)(int64_t rows, int64_t n, Block<const T> x, Block<T> out);
  // out = x, from and to the storage type
  void (*load)(int64_t rows, int64_t n, Block<const T> x, Block<A> out);
  void (*store)(int64_t rows, int64_t n, Block<const A> x, Block<T> out);
  // out[r][c] = x[c * step + r]: a piece of a map whose pixels lie side by side
  void (*load_transposed)(int64_t rows, int64_t n, Block<const T> x, Block<A> out);
  // out[c][r] = x[r][c]
  void (*transpose)(int64_t rows, int64_t n, Block<const A> x, Block<A> out);
  // z = relu(scale * x + shift); z may be x
  void (*bn_relu)(int64_t rows, int64_t n, Block<const T> x, const A* scale, const A* shift, Block<A> z);
  void (*bn_relu_store)(int64_t rows, int64_t n, Block<const T> x, const A* scale, const A* shift,
                        Block<T> z);
  // y += bias
  void (*add_bias)(int64_t rows, int64_t n, const A* bias, Block<A> y);
  // mean[c], and m2[c], the sum of squares about it
  void (*moments)(int64_t rows, int64_t n, Block<const T> x, double* mean, double* m2);
  // d = dz * [z > 0];  grad = scale * d, or grad += scale * d, unless grad is null
  void (*bottleneck_backward)(int64_t rows, int64_t n, Block<const A> x, const A* mean, Block<const A> z,
                              Block<const A> dz, const A* scale, Block<T> grad, bool accumulate,
                              double* sum_d, double* sum_dx);
  // the same with z recomputed from x, and dz in the storage type
  void (*bn_relu_backward_sums)(int64_t rows, int64_t n, Block<const T> x, const A* scale, const A* shift,
                                const A* mean, Block<const T> dz, double* sum_d, double* sum_dx);
  void (*bn_relu_backward_accumulate)(int64_t rows, int64_t n, Block<const T> x, const A* scale,
                                      const A* shift, const A* mean, Block<const T> dz, Block<T> grad,
                                      double* sum_d, double* sum_dx);
  // dz <- scale * d - a - b * (x - mean)
  void (*bn_relu_backward)(int64_t rows, int64_t n, Block<const T> x, const A* scale, const A* shift,
                           const A* mean, const A* a, const A* b, Block<T> dz);
  // out = grad - a - b * (x - mean); out may be grad
  void (*apply_correction)(int64_t rows, int64_t n, Block<const T> x, const A* mean, const A* a, const A* b,
                           Block<const T> grad, Block<T> out);
  // sum[c] += relu(scale * x + shift), over all rows
  void (*bn_relu_sum)(int64_t rows, int64_t n, Block<const T> x, const A* scale, const A* shift, A* sum);
  // grad = scale * d with d = share * g[r / width][c] * [scale * x + shift > 0]
  void (*bn_relu_avg_pool_backward)(int64_t rows, int64_t n, Block<const T> x, const A* scale, const A* shift,
                                    const A* mean, Block<const T> g, int64_t width, A share, Block<T> grad,
                                    double* sum_d, double* sum_dx);
  // out[x][c] = bias[c] + sum over the neighbours (i, j) of x of lines[i][x + j - across / 2][j][c]: so many
  // lines of width pixels, null outside of the image, and pixels across. Reads and writes up to kVector
  // elements more than there are.
  void (*sum_taps)(int64_t width, int64_t n, int64_t across, int64_t count, const A* const* lines,
                   int64_t step, const A* bias, A* out);
  // out[x][i][j][c] = lines[i][x + j][c]: the neighbours (i, j) of each pixel side by side; so many lines of
  // width + across - 1 pixels. Writes up to kVector elements more.
  void (*spread_taps)(int64_t width, int64_t n, int64_t across, int64_t count, const A* const* lines,
                      Block<A> out);
  // Where relu(scale * x + shift) > best[c] (or nothing is there yet, or it is NaN): best[c] and where[c] =
  // tap
  void (*bn_relu_max)(int64_t n, const T* x, const A* scale, const A* shift, bool first, uint8_t tap, A* best,
                      uint8_t* where);
  // d[c] += g[c] where where[c] is tap
  void (*max_pool_gather)(int64_t n, const T* g, const uint8_t* where, uint8_t tap, A* d);
};

template <typename T>
const Rows<T>& rows();

// One table per instruction set; defined by rows.inc, used by rows.cpp alone.
#define EFFDENSE_DECLARE_ROWS(isa)           \
  namespace isa {                            \
  extern const Rows<float> rows_float;       \
  extern const Rows<double> rows_double;     \
  extern const Rows<bfloat16> rows_bfloat16; \
  }
EFFDENSE_DECLARE_ROWS(baseline)
EFFDENSE_DECLARE_ROWS(avx2)
EFFDENSE_DECLARE_ROWS(avx512)
#undef EFFDENSE_DECLARE_ROWS

}  // namespace effdense
