// Loops over one row of contiguous pixels of one channel: everything element-wise in the CPU operators.
// rows.inc holds their only source. It is compiled once per instruction set (rows_default.cpp, rows_avx2.cpp,
// rows_avx512.cpp) and `rows<T>()` picks at run time, by ATen's capability (ATEN_CPU_CAPABILITY narrows it).
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

template <typename T>
struct Rows {
  using A = acc_t<T>;
  // out = x, from and to the storage type
  void (*load)(int64_t n, const T* x, A* out);
  void (*store)(int64_t n, const A* x, T* out);
  // z = relu(scale * x + shift)
  void (*bn_relu)(int64_t n, const T* x, A scale, A shift, A* z);
  void (*bn_relu_store)(int64_t n, const T* x, A scale, A shift, T* z);
  // mean of the row, and the sum of squares about it; in double, since means may be far larger than
  // deviations
  void (*moments)(int64_t n, const T* x, double* mean, double* m2);
  // d = dz * [z > 0];  sums[0] = sum d;  sums[1] = sum d * (x - mean);  grad = scale * d, unless grad is null
  void (*bottleneck_backward)(int64_t n, const T* x, A mean, const A* z, const A* dz, A scale, T* grad,
                              A* sums);
  // the same sums, with z recomputed from x and dz in the storage type
  void (*bn_relu_backward_sums)(int64_t n, const T* x, A scale, A shift, A mean, const T* dz, A* sums);
  // dz <- scale * d - a - b * (x - mean)
  void (*bn_relu_backward)(int64_t n, const T* x, A scale, A shift, A mean, A a, A b, T* dz);
  // grad <- grad - a - b * (x - mean)
  void (*take_gradient)(int64_t n, const T* x, A mean, A a, A b, T* grad);
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
