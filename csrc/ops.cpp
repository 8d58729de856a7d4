// Defines the library of operators (schemas.h) and the Python module. Kernels register themselves for their
// device in csrc/<device>/.
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include "module_state.h"
#include "pages.h"
#include "schemas.h"
#include "stage.h"

TORCH_LIBRARY(effdense, m) {
  effdense::define_operators(m);
  effdense::define_cpu_operators(m);
  effdense::define_stage(m);
}

TORCH_LIBRARY_IMPL(effdense, CPU, m) { effdense::implement_stage<effdense::cpu_backend>(m); }
#ifdef EFFDENSE_CUDA_ARCHITECTURES
TORCH_LIBRARY_IMPL(effdense, CUDA, m) { effdense::implement_stage<effdense::cuda_backend>(m); }
#endif

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

}  // namespace

PYBIND11_MODULE(_effdense, m) {
  m.doc() = "effdense's compiled operators: importing registers torch.ops.effdense.*";
  m.def("use_large_pages", &effdense::use_large_pages,
        "Advises the system to put a tensor's memory on large pages.");
  m.def("module_state", &effdense::module_state, "What modules are like, for module_state_is.");
  m.def("module_state_is", &effdense::module_state_is, "Whether the modules are still like that.");
  m.def("build_info", &build_info, "What this module was built with.");
}
