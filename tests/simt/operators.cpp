// torch.ops.effdense_simt, or what EFFDENSE_SIMT names: the CUDA operators from their own sources, kernels
// and bindings, on CPU tensors. And what the harness knows of them: the traffic of arrays and launches.
#include "schemas.h"

// One translation unit: torch's headers cost more time than all else.
#include "cuda/batch_norm.cpp"
#include "cuda/bottleneck.cpp"
#include "cuda/features.cpp"
#include "cuda/pool.cpp"
#include "simt/launch.h"
#include "stage.cpp"

namespace {

std::vector<int64_t> as_list(const simt::Counters& counters) {
  return {counters.loads, counters.load_bytes, counters.stores, counters.store_bytes};
}

// The whole memory that x lies in.
void watch(const std::string& name, const at::Tensor& x) {
  simt::watch(name, x.storage().data(), static_cast<int64_t>(x.storage().nbytes()));
}

}  // namespace

TORCH_LIBRARY(EFFDENSE_SIMT, m) {
  effdense::define_operators(m);
  effdense::define_stage(m);
  // loads, their bytes, stores, their bytes: of what is watched, and of all launches since `forget`
  m.def("watch(str name, Tensor x) -> ()", watch);
  m.def("watched(str name) -> int[]",
        [](const std::string& name) { return as_list(simt::watched_counters(name)); });
  m.def("traffic() -> int[]", [] { return as_list(simt::counters()); });
  m.def("launches() -> int", [] { return simt::launches(); });  // since `forget`
  m.def("forget() -> ()", [] {
    simt::unwatch_all();
    simt::reset_counters();
  });
}

TORCH_LIBRARY_IMPL(EFFDENSE_SIMT, CPU, m) { effdense::implement_stage<effdense::cuda_backend>(m); }
