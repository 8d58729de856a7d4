// The machine's GEMM on small dense matrices, from inside a parallel region. float: oneDNN's micro-kernel,
// which ATen exports (and which falls back to the BLAS where oneDNN has none); double: ATen's mm on the BLAS.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include "cpu/rows.h"

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

}  // namespace effdense
