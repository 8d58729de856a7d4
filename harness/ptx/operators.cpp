// torch.ops.effdense_ptx: the CUDA operators from their own bindings, on CPU tensors, with nvcc's objects of
// the kernels beneath, whose PTX is interpreted. And what tests ask the interpreter. From here on the
// tensors' memory comes from the interpreter too, so that it knows where every buffer ends.
#include "schemas.h"

// One translation unit: torch's headers cost more time than all else.
#include <c10/core/Allocator.h>

#include "cuda/batch_norm.cpp"
#include "cuda/bottleneck.cpp"
#include "cuda/features.cpp"
#include "cuda/pool.cpp"
#include "ptx/runtime.h"
#include "stage_backward.cpp"
#include "stage_forward.cpp"

namespace {

struct Buffers final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* const memory = ptx::allocate(bytes);
    return {memory, memory, &ptx::release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &ptx::release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

void watch_memory() {
  static Buffers buffers;
  c10::SetAllocator(c10::DeviceType::CPU, &buffers, 100);
}

}  // namespace

TORCH_LIBRARY(EFFDENSE_SIMT, m) {
  effdense::define_operators(m);
  effdense::define_stage(m);
  watch_memory();
  // late: copies and stores land as late as they may; backwards: the order of blocks and warps
  m.def("use(int architecture, bool late, bool backwards) -> ()",
        [](int64_t architecture, bool late, bool backwards) {
          ptx::settings().architecture = static_cast<int>(architecture);
          ptx::settings().mode = {late, backwards};
        });
  m.def("kernels() -> str[]", ptx::kernels);
  m.def("launched() -> str[]", [] {
    return std::vector<std::string>(ptx::settings().launched.begin(), ptx::settings().launched.end());
  });
  m.def("forget() -> ()", [] { ptx::settings().launched.clear(); });
  m.def("executed() -> int", [] { return static_cast<int64_t>(ptx::executed); });
  m.def("text(str kernel) -> str", ptx::text_of);
  m.def("replace(str kernel, str text) -> ()", ptx::replace);
}

TORCH_LIBRARY_IMPL(EFFDENSE_SIMT, CPU, m) { effdense::implement_stage<effdense::cuda_backend>(m); }
