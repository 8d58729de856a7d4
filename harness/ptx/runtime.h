// What stands in for the CUDA runtime knows: kernels and their PTX, the memory that they may touch, and how
// to run them.
#pragma once

#include <cstddef>
#include <set>
#include <string>
#include <vector>

#include "ptx/machine.h"

namespace ptx {

struct Settings {
  int architecture = 80;
  Mode mode;
  std::set<std::string> launched;  // names of kernels
};
Settings& settings();

// Of the current architecture, by name.
std::vector<std::string> kernels();
std::string text_of(const std::string& kernel);
// From now on the kernel is this text; "": its own again.
void replace(const std::string& kernel, const std::string& text);

// Memory that kernels may touch, filled with NaN bytes.
void* allocate(size_t bytes);
void release(void* memory);

}  // namespace ptx
