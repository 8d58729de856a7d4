// Stands in for the CUDA runtime beneath the objects that nvcc makes: what they register and launch runs
// here. Objects carry their PTX, for every architecture that they were compiled for.
#include "ptx/runtime.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string_view>

namespace ptx {
namespace {

struct Kernel {
  std::string name;
  const void* module;
  size_t most_dynamic = 0;  // what was asked for by cudaFuncSetAttribute
};

struct State {
  std::recursive_mutex mutex;
  Settings settings;
  std::map<const void*, std::map<int, std::string_view>> modules;  // texts, by architecture
  std::map<const void*, Kernel> kernels;                           // by the host's function
  std::map<std::pair<std::string, int>, std::unique_ptr<Program>> programs;
  std::map<std::string, std::string> replaced;
  std::map<uint64_t, uint64_t> memory;
  std::string message;
};
State& state() {
  static State* const all = new State;  // objects register before main and after it
  return *all;
}

// ---- Fat binaries: a header, and entries of which each has a header of its own

struct FatBinary {
  unsigned magic, version;
  const uint8_t* data;
};

template <typename T>
T read(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

std::map<int, std::string_view> texts_of(const FatBinary& binary) {
  std::map<int, std::string_view> texts;
  const uint8_t* at = binary.data;
  if (binary.magic != 0x466243B1 || read<uint32_t>(at) != 0xBA55ED50) std::abort();
  const uint8_t* const end = at + read<uint16_t>(at + 6) + read<uint64_t>(at + 8);
  at += read<uint16_t>(at + 6);
  while (at < end) {
    const auto kind = read<uint16_t>(at);
    const auto header = read<uint32_t>(at + 4);
    const auto bytes = read<uint64_t>(at + 8);
    if (kind == 1 && read<uint32_t>(at + 16) == 0)  // PTX, uncompressed
      texts[static_cast<int>(read<uint32_t>(at + 28))] = {reinterpret_cast<const char*>(at + header), bytes};
    at += header + bytes;
  }
  return texts;
}

std::string module_text(const Kernel& kernel, int architecture) {
  const auto& texts = state().modules[kernel.module];
  const auto found = texts.find(architecture);
  if (found == texts.end()) throw Error("no PTX of " + kernel.name + " for " + std::to_string(architecture));
  return std::string(found->second).c_str();  // padded with zeros
}

const Kernel& kernel_named(const std::string& name) {
  for (const auto& [host, kernel] : state().kernels)
    if (kernel.name == name) return kernel;
  throw Error("no kernel " + name);
}

const Program& program_of(const Kernel& kernel) {
  auto& program = state().programs[{kernel.name, state().settings.architecture}];
  if (program == nullptr) program = std::make_unique<Program>(parse(kernel.name, text_of(kernel.name)));
  return *program;
}

cudaError_t refuse(const std::string& message) {
  state().message = message;
  return cudaErrorLaunchFailure;
}

cudaError_t start(const void* host, dim3 grid, dim3 block, void** arguments, size_t dynamic_shared) {
  const std::lock_guard lock(state().mutex);
  const auto found = state().kernels.find(host);
  if (found == state().kernels.end()) return cudaErrorInvalidDeviceFunction;
  const Kernel& kernel = found->second;
  try {
    const Program& program = program_of(kernel);
    Launch launch{program, {{grid.x, grid.y, grid.z}}, {{block.x, block.y, block.z}}, dynamic_shared, {},
                  {},      state().settings.mode};
    if (launch.grid.count() == 0 || launch.block.count() == 0 || grid.y > 65535 || grid.z > 65535)
      return refuse("the grid or the block has no such size");
    if (program.most_threads != 0 && launch.block.count() > program.most_threads)
      return refuse("more threads than the " + std::to_string(program.most_threads) +
                    " of its launch bounds");
    if (program.shared_bytes + dynamic_shared > 48 * 1024 && dynamic_shared > kernel.most_dynamic)
      return refuse("more dynamic shared memory than was asked for");
    launch.parameters.resize(program.parameter_bytes);
    for (size_t i = 0; i < program.parameters.size(); ++i)
      std::memcpy(&launch.parameters[program.parameters[i].at], arguments[i], program.parameters[i].bytes);
    for (const auto& [begin, size] : state().memory) launch.memory.push_back({begin, size});
    state().settings.launched.insert(kernel.name);
    run(launch);
  } catch (const std::exception& error) {
    return refuse(error.what());
  }
  return cudaSuccess;
}

}  // namespace

Settings& settings() { return state().settings; }

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const auto& [host, kernel] : state().kernels) names.push_back(kernel.name);
  std::sort(names.begin(), names.end());
  return names;
}

std::string text_of(const std::string& kernel) {
  const auto replaced = state().replaced.find(kernel);
  if (replaced != state().replaced.end()) return replaced->second;
  return kernel_text(module_text(kernel_named(kernel), state().settings.architecture), kernel);
}

void replace(const std::string& kernel, const std::string& text) {
  const std::lock_guard lock(state().mutex);
  state().programs.erase({kernel, state().settings.architecture});
  if (text.empty())
    state().replaced.erase(kernel);
  else
    state().replaced[kernel] = text;
}

void* allocate(size_t bytes) {
  if (bytes == 0) return nullptr;
  void* const memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory, 0xFF, bytes);
  const std::lock_guard lock(state().mutex);
  state().memory[reinterpret_cast<uint64_t>(memory)] = bytes;
  return memory;
}

void release(void* memory) {
  if (memory == nullptr) return;
  {
    const std::lock_guard lock(state().mutex);
    state().memory.erase(reinterpret_cast<uint64_t>(memory));
  }
  std::free(memory);
}

}  // namespace ptx

// ---- What the objects call. Hidden, so that a CUDA runtime beside it is not replaced.

#pragma GCC visibility push(hidden)
extern "C" {

void** __cudaRegisterFatBinary(void* binary) {
  ptx::state().modules[binary] = ptx::texts_of(*static_cast<const ptx::FatBinary*>(binary));
  return static_cast<void**>(binary);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  ptx::state().kernels[host] = {name, module};
}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { std::abort(); }  // nobody writes <<<>>>
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return ptx::start(kernel, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
  return ptx::start(host, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  static const std::map<int, int> kMost{{75, 64}, {80, 163}, {86, 99}, {87, 163}, {89, 99}, {120, 99}};
  const auto found = kMost.find(ptx::settings().architecture);
  if (value > (found == kMost.end() ? 227 : found->second) * 1024) return cudaErrorInvalidValue;
  ptx::state().kernels.at(host).most_dynamic = static_cast<size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaFuncGetName(const char** name, const void* host) {
  *name = ptx::state().kernels.at(host).name.c_str();
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? ptx::state().message.c_str()
                                         : "an error of the stand-in for CUDA's runtime";
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = ptx::settings().architecture / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = ptx::settings().architecture % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: {  // CUDA's programming guide, technical specifications
      const int number = ptx::settings().architecture;
      *value = 1024 * (number < 80 ? 64 : number == 80 ? 164 : number < 90 || number >= 120 ? 100 : 228);
      return cudaSuccess;
    }
    default:
      return cudaErrorInvalidValue;
  }
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

}  // extern "C"
#pragma GCC visibility pop
