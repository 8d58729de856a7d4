// torch.ops.effdense_simt, or what EFFDENSE_SIMT names: the CUDA operators from their own sources, kernels
// and bindings, on CPU tensors. And what the harness knows of them: the traffic of arrays and launches.
#include <dlfcn.h>

#include "schemas.h"

// One translation unit: torch's headers cost more time than all else.
#include "cuda/batch_norm.cpp"
#include "cuda/bottleneck.cpp"
#include "cuda/features.cpp"
#include "cuda/pool.cpp"
#include "simt/launch.h"
#include "stage_backward.cpp"
#include "stage_forward.cpp"

namespace {

std::vector<int64_t> as_list(const simt::Counters& counters) {
  return {counters.loads, counters.load_bytes, counters.stores, counters.store_bytes};
}

// The whole memory that x lies in.
void watch(const std::string& name, const at::Tensor& x) {
  simt::watch(name, x.storage().data(), static_cast<int64_t>(x.storage().nbytes()));
}

std::vector<simt::Planned> planned;

// Of every launch since `plan`: where its kernel is in this library, grid x, y, z, threads, dynamic shared
// memory.
std::vector<int64_t> take_plan() {
  std::vector<int64_t> numbers;
  for (const auto& [kernel, grid, block, shared] : planned) {
    Dl_info where{};
    dladdr(kernel, &where);
    const int64_t address = static_cast<const char*>(kernel) - static_cast<const char*>(where.dli_fbase);
    for (const int64_t number : {address, int64_t{grid.x}, int64_t{grid.y}, int64_t{grid.z},
                                 int64_t{block.x} * block.y * block.z, static_cast<int64_t>(shared)})
      numbers.push_back(number);
  }
  planned.clear();
  simt::plan = nullptr;
  return numbers;
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
  // launches are noted instead of run, until they are taken
  m.def("plan() -> ()", [] { simt::plan = &planned; });
  m.def("take_plan() -> int[]", take_plan);
  // what launches are cut for; without numbers: as in the beginning
  m.def("card(int multiprocessors=132, int shared_bytes=0) -> ()",
        [](int64_t multiprocessors, int64_t shared_bytes) {
          simt::card = {static_cast<int>(multiprocessors), static_cast<int>(shared_bytes)};
        });
  m.def("forget() -> ()", [] {
    simt::unwatch_all();
    simt::reset_counters();
  });
}

TORCH_LIBRARY_IMPL(EFFDENSE_SIMT, CPU, m) { effdense::implement_stage<effdense::cuda_backend>(m); }
