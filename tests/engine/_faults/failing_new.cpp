// Stands before the C++ library: what the compiled module asks `operator new` for (containers, kernels'
// arguments) fails one by one, as the test asks (tests/engine/test_faults.py). Allocations of PyTorch's own
// are left alone: oneDNN crashes where its fail.
#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<long> left{-1};  // allocations until one fails; below zero: none does
std::atomic<bool> failed{false};
std::uintptr_t first = 0, last = 0;  // where the module's code is

int find(dl_phdr_info* info, std::size_t, void* name) {
  if (std::strstr(info->dlpi_name, static_cast<const char*>(name)) == nullptr) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type != PT_LOAD || !(part.p_flags & PF_X)) continue;
    first = info->dlpi_addr + part.p_vaddr;
    last = first + part.p_memsz;
  }
  return 1;
}

void* allocate(std::size_t bytes, std::size_t alignment, const void* caller) {
  const auto from = reinterpret_cast<std::uintptr_t>(caller);
  if (from >= first && from < last && left.load() >= 0 && left.fetch_sub(1) == 0) {
    failed = true;
    throw std::bad_alloc();
  }
  void* memory = alignment == 0
                     ? std::malloc(bytes == 0 ? 1 : bytes)
                     : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

// Which module: a part of its path. 0 where it is not loaded.
extern "C" int watch(const char* name) { return dl_iterate_phdr(find, const_cast<char*>(name)); }
extern "C" void fail_after(long allocations) {
  failed = false;
  left = allocations;
}
extern "C" int has_failed() { return failed; }
// How many there were since fail_after(most).
extern "C" long counted(long most) { return most - left; }

void* operator new(std::size_t bytes) { return allocate(bytes, 0, __builtin_return_address(0)); }
void* operator new[](std::size_t bytes) { return allocate(bytes, 0, __builtin_return_address(0)); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment), __builtin_return_address(0));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment), __builtin_return_address(0));
}
