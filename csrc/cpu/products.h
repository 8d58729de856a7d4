// Products of small float matrices together with the loops around them, for the instruction sets where that
// beats the library's GEMM: AVX2. Their source is products.inc; gemm.h decides who multiplies.
#pragma once

#include "cpu/rows.h"

namespace effdense {

// The right factor lies in panels of so many columns, each [k, kPanel], the last one filled up with zeros.
constexpr int64_t kPanel = 16;

// Sums over pixels are taken so many at a time: their rounding errors grow with the root of this, not of a
// tile.
constexpr int64_t kPixels = 64;

// The same for what a 3x3x3 convolution sends back to a pixel: so many terms at a time, a plane's of 32
// channels.
constexpr int64_t kTerms = 288;

// What bottleneck_backward in rows.h does with a product dz: masks it by z, sums it, writes it to grad.
template <typename T>
struct GradientPass {
  Block<const acc_t<T>> x, z;
  const acc_t<T>*mean, *scale;
  Block<T> grad;    // null: not wanted
  bool accumulate;  // grad += scale * d
  double *sum_d, *sum_dx;
};

// Rows that are wanted after a product. It fetches them into L2 bit by bit, for itself it waits for no
// memory.
struct Ahead {
  const void* data;
  int64_t step, bytes, rows;  // bytes from row to row, and of one; no rows: nothing is fetched
};

// Of left factors with no more rows the right one is read where it lies: laid out, it would be read and
// written once for one or two reads.
constexpr int64_t kFewRows = 12;

// The right factor of a product, in panels of columns: laid out for it, or a part of a row-major matrix whose
// number of columns is a multiple of kPanel.
struct Panels {
  const float* data;
  int64_t panel_step, row_step;  // elements from panel to panel, and from row to row in one
};

struct Products {
  // c [m, n] = a [m, k] b [k, n]
  void (*multiply)(int64_t m, int64_t n, int64_t k, Block<const float> a, Panels b, Block<float> c,
                   Ahead next);
  // c [m, n] = a [m, k] b^T, b [n, k]; for few rows
  void (*multiply_by_transposed)(int64_t m, int64_t n, int64_t k, Block<const float> a, Block<const float> b,
                                 Block<float> c);
  // c [m, n] = or += a^T b, a [rows, m], b [rows, n], of which whole vectors are read: up to kPanel - 1
  // columns more
  void (*add_transposed)(int64_t rows, int64_t m, int64_t n, Block<const float> a, Block<const float> b,
                         Block<float> c, bool accumulate, Ahead next);
  // dz [m, n] = dy [m, k] b [k, n], and the pass over it; dz itself is not stored
  void (*multiply_backward)(int64_t m, int64_t n, int64_t k, Block<const float> dy, Panels b,
                            const GradientPass<float>& pass, Ahead next);
};

namespace avx2 {
extern const Products products;
}

// Those of this machine, or null: the library multiplies.
const Products* products();

// Whether the library's float products may be the BLAS's, as on the baseline: what these add to a matrix they
// may sum on from there, in a chain as long as the batch. oneDNN's begin at zero and add the result.
bool blas_multiplies();

}  // namespace effdense
