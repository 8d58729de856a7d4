// The library's products of matrices, as loops: the program's own functions come before the library's of the
// same name, which the sanitizers do not see into.
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>

namespace {

template <typename A>
void multiply(int64_t m, int64_t n, int64_t k, int64_t a_step, int64_t b_step, int64_t c_step, bool add,
              const A* a, const A* b, A* c) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      A sum = add ? c[i * c_step + j] : A(0);
      for (int64_t p = 0; p < k; ++p) sum += a[i * a_step + p] * b[p * b_step + j];
      c[i * c_step + j] = sum;
    }
}

// Row-major matrices in double: what effdense's gemm.h gives to ATen.
at::Tensor& multiply(at::Tensor& out, const at::Tensor& left, const at::Tensor& right, bool add) {
  TORCH_CHECK(
      out.scalar_type() == at::kDouble && out.stride(1) == 1 && left.stride(1) == 1 && right.stride(1) == 1,
      "harness/sanitizers: a product of row-major matrices in double was expected");
  multiply(out.size(0), out.size(1), left.size(1), left.stride(0), right.stride(0), out.stride(0), add,
           left.const_data_ptr<double>(), right.const_data_ptr<double>(), out.mutable_data_ptr<double>());
  return out;
}

}  // namespace

namespace at::native::cpublas {
void brgemm(int64_t m, int64_t n, int64_t k, int64_t a_step, int64_t b_step, int64_t c_step, const bool add,
            const float* a, const float* b, float* c, bool) {
  multiply(m, n, k, a_step, b_step, c_step, add, a, b, c);
}
}  // namespace at::native::cpublas

namespace at::cpu {
Tensor& mm_out(Tensor& out, const Tensor& left, const Tensor& right) {
  return multiply(out, left, right, false);
}
Tensor& addmm_out(Tensor& out, const Tensor& to, const Tensor& left, const Tensor& right, const Scalar&,
                  const Scalar&) {
  TORCH_CHECK(out.is_same(to), "harness/sanitizers: a product that is added in place was expected");
  return multiply(out, left, right, true);
}
}  // namespace at::cpu
