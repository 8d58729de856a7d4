// GEMM on small dense matrices from inside a parallel region, and the choice of who multiplies. float:
// effdense's own products on AVX2 (products.h), elsewhere oneDNN's micro-kernel, which ATen exports (and
// which falls back to the BLAS where oneDNN has none). double: ATen's mm on the BLAS.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include "cpu/features.h"
#include "cpu/products.h"

namespace effdense {

// c [m, n] = a [m, k] b [k, n], or c += a b; every matrix row-major.
inline void gemm(int64_t m, int64_t n, int64_t k, Block<const float> a, Block<const float> b, Block<float> c,
                 bool accumulate) {
  at::native::cpublas::brgemm(m, n, k, a.step, b.step, c.step, accumulate, a.data, b.data, c.data);
}

// Calls the CPU kernel directly: the dispatcher's cost would show on tiles this small.
inline void gemm(int64_t m, int64_t n, int64_t k, Block<const double> a, Block<const double> b,
                 Block<double> c, bool accumulate) {
  const auto matrix = [](double* data, int64_t rows, int64_t columns, int64_t step) {
    return at::from_blob(data, {rows, columns}, {step, 1}, at::kDouble);
  };
  at::Tensor out = matrix(c.data, m, n, c.step);
  const at::Tensor left = matrix(const_cast<double*>(a.data), m, k, a.step);
  const at::Tensor right = matrix(const_cast<double*>(b.data), k, n, b.step);
  if (accumulate)
    at::cpu::addmm_out(out, out, left, right);
  else
    at::cpu::mm_out(out, left, right);
}

// The products that take A, or null.
template <typename A>
const Products* own_products() {
  return std::is_same_v<A, float> ? products() : nullptr;
}

// Panels of n columns.
inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// Elements from row to row of a scratch matrix of n columns. Ours read columns of it: with an odd number of
// cache lines to a row they are spread over the whole cache. Whole vectors are read, so kPanel more are
// needed at the end.
template <typename A>
int64_t row_step(int64_t n) {
  if (own_products<A>() == nullptr) return n;
  return (panels(n) | 1) * kPanel;
}

// A convolution's weight in the type that sums are kept in, which is that of the vector `like`.
inline Tensor wide_weight(const Tensor& weight, const Tensor& like) {
  return weight.scalar_type() == like.scalar_type() ? weight : weight.to(like.scalar_type());
}

// The right factor [k, n] of products with many tiles, laid out once a call as who multiplies reads it: in
// panels of columns, or row by row. For left factors of few rows it may stay where it is.
template <typename A>
class Factor {
 public:
  // `rows`: of all left factors together.
  Factor(int64_t k, int64_t n, const at::TensorOptions& options, int64_t rows = kFewRows + 1)
      : step(own_products<A>() == nullptr ? n : kPanel),
        k_(k),
        n_(n),
        few_(own_products<A>() != nullptr && rows <= kFewRows),
        options_(options) {
    if (!few_) make_room();
  }

  // Where element (p, j) is; (p + 1, j) is `step` further.
  A* place(int64_t p, int64_t j) { return data_ + j / step * (k_ * step) + p * step + j % step; }
  const int64_t step;

  // From the matrix [k, n], row by row. It must live as long as this.
  Factor& from(const A* matrix) {
    if (few_ && n_ % kPanel == 0) {
      there_ = matrix;
      return *this;
    }
    if (few_) make_room();
    for (int64_t p = 0; p < k_; ++p)
      for (int64_t j = 0; j < n_; j += step) {
        A* to = place(p, j);
        const A* from = matrix + p * n_ + j;
        if (step == kPanel && n_ - j >= kPanel)
          std::copy_n(from, kPanel, to);
        else
          std::copy_n(from, std::min(step, n_ - j), to);
      }
    return *this;
  }
  // From the matrix [n, k], its transpose. It must live as long as this.
  Factor& from_transposed(const A* matrix) {
    if (few_) {
      transposed_ = matrix;
      return *this;
    }
    for (int64_t j = 0; j < n_; j += step)
      effdense::rows<A>().transpose(std::min(step, n_ - j), k_, {matrix + j * k_, k_}, {place(0, j), step});
    return *this;
  }

  // c [m, n] = a [m, k] times this. Of c's rows `room` elements may be written, where that is more than n.
  void multiply(int64_t m, Block<const A> a, Block<A> c, int64_t room = 0, Ahead next = {}) const {
    if constexpr (std::is_same_v<A, float>)
      if (const Products* own = products()) {
        if (transposed_ != nullptr) return own->multiply_by_transposed(m, n_, k_, a, {transposed_, k_}, c);
        const int64_t whole = panels(n_) * kPanel;
        return own->multiply(m, room < whole ? n_ : whole, k_, a, right(), c, next);
      }
    gemm(m, n_, k_, a, {data_, n_}, c, false);
  }

  // dz [m, n] = dy [m, k] times this, and the pass over it. `dz` is scratch, used where dz is not kept in
  // registers.
  template <typename T>
  void multiply_backward(const Rows<T>& loops, int64_t m, Block<const A> dy, Block<A> dz,
                         const GradientPass<T>& pass, Ahead next = {}) const {
    if constexpr (std::is_same_v<T, float>)
      if (const Products* own = products()) return own->multiply_backward(m, n_, k_, dy, right(), pass, next);
    if (own_products<A>() != nullptr) multiply(m, dy, dz);
    for (int64_t p = 0; own_products<A>() == nullptr && p < k_; p += kTerms)
      gemm(m, n_, std::min(kTerms, k_ - p), from_column(dy, p), {data_ + p * n_, n_}, dz, p > 0);
    loops.bottleneck_backward(m, n_, pass.x, pass.mean, pass.z, constant(dz), pass.scale, pass.grad,
                              pass.accumulate, pass.sum_d, pass.sum_dx);
  }

 private:
  void make_room() {
    const int64_t count = (n_ + step - 1) / step;
    keep_ =
        count * step == n_ ? at::empty({count, k_, step}, options_) : at::zeros({count, k_, step}, options_);
    data_ = keep_.template mutable_data_ptr<A>();
  }
  Panels right() const {
    return there_ != nullptr ? Panels{there_, kPanel, n_} : Panels{data_, k_ * kPanel, kPanel};
  }

  int64_t k_, n_;
  bool few_;
  at::TensorOptions options_;
  Tensor keep_;
  A* data_ = nullptr;
  const A *there_ = nullptr, *transposed_ = nullptr;  // matrices that stay where they are
};

// c [m, n] = or += a^T b, a [rows, m], b [rows, n]. `scratch` [m, rows] is used where who multiplies wants
// a^T.
template <typename A>
void add_transposed(int64_t rows, int64_t m, int64_t n, Block<const A> a, Block<const A> b, Block<A> c,
                    bool accumulate, Block<A> scratch, Ahead next = {}) {
  if constexpr (std::is_same_v<A, float>)
    if (const Products* own = products()) return own->add_transposed(rows, m, n, a, b, c, accumulate, next);
  effdense::rows<A>().transpose(rows, m, a, scratch);
  const auto product = [&](int64_t r, Block<A> to, bool add) {
    const int64_t k = std::min(kPixels, rows - r);
    gemm(m, n, k, constant(from_column(scratch, r)), from_row(b, r), to, add);
  };
  if (!blas_multiplies()) {
    for (int64_t r = 0; r < rows; r += kPixels) product(r, c, accumulate || r > 0);
    return;
  }
  std::vector<A> part(m * n);
  for (int64_t r = 0; r < rows; r += kPixels) {
    product(r, {part.data(), n}, false);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j)
        c.row(i)[j] = accumulate || r > 0 ? c.row(i)[j] + part[i * n + j] : part[i * n + j];
  }
}

}  // namespace effdense
