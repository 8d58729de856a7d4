// The machine's GEMM on small dense matrices, from inside a parallel region: ATen's mm, which calls the BLAS
// that torch was built with. (ATen's own cpublas::gemm is not exported.)
#pragma once

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

namespace effdense {

// A row-major matrix in somebody else's memory; `t()` reads it transposed.
template <typename A>
struct Matrix {
  A* data;
  int64_t rows, columns, row_stride, column_stride = 1;
  Matrix t() const { return {data, columns, rows, column_stride, row_stride}; }
  at::Tensor tensor() const {
    return at::from_blob(data, {rows, columns}, {row_stride, column_stride},
                         c10::CppTypeToScalarType<A>::value);
  }
};

// c = a b, or c += a b. Calls the CPU kernel directly: the dispatcher's cost would show on tiles this small.
template <typename A>
void gemm(const Matrix<A>& a, const Matrix<A>& b, const Matrix<A>& c, bool accumulate) {
  at::Tensor out = c.tensor();
  if (accumulate)
    at::cpu::addmm_out(out, out, a.tensor(), b.tensor());
  else
    at::cpu::mm_out(out, a.tensor(), b.tensor());
}

}  // namespace effdense
