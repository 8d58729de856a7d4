// The library of operators (schemas.h) and the Python module: build info.
// Kernels register themselves for their device in csrc/<device>/; csrc/checks.h says what they refuse.
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "schemas.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

TORCH_LIBRARY(effdense, m) {
  effdense::define_operators(m);
  effdense::define_cpu_operators(m);
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] =
#if defined(__clang__)
      __VERSION__;
#else
      "GCC " __VERSION__;
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef EFFDENSE_CUDA_ARCHITECTURES  // as TORCH_CUDA_ARCH_LIST has them
  info["cuda"] = EFFDENSE_CUDA;
  info["arch_list"] = EFFDENSE_CUDA_ARCHITECTURES;
#else
  info["cuda"] = pybind11::none();
  info["arch_list"] = "";
#endif
  return info;
}

// Asks for large pages behind a large tensor: fresh memory costs a page fault per page, and a feature buffer
// is walked with a wide step. Advice only; what is not wholly the tensor's is left alone.
void use_large_pages(const at::Tensor& x) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + x.storage().nbytes() - x.storage_offset() * x.itemsize()) / kPage * kPage;
  if (x.is_cpu() && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

PYBIND11_MODULE(_effdense, m) {
  m.doc() = "effdense's compiled operators: importing registers torch.ops.effdense.*";
  m.def("use_large_pages", &use_large_pages, "Advises the system to put a tensor's memory on large pages.");
  m.def("build_info", &build_info, "What this module was built with.");
}
