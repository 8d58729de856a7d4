// A kernel of PTX text as a list of operations over a warp's registers. parse.cpp splits the text,
// memory.cpp, warp.cpp, arithmetic.cpp and their like say which instruction is which operation, machine.cpp
// runs them.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

struct Warp;
struct Op;

// Executes one operation for the lanes in `mask`.
using Run = void (*)(Warp&, const Op&, uint32_t mask);

// What an operation does to the order of execution.
enum class Flow : uint8_t {
  next,
  branch,
  exit,
  barrier,    // waits for the block's other warps
  gather,     // needs all lanes of the warp at once (.aligned)
  gather_of,  // needs the lanes that the last operand, a mask, names
};

enum class Space : uint8_t { generic, global, shared, local, param };

struct Region {
  uint64_t begin = 0, size = 0;
};

struct Op {
  Run run = nullptr;
  // Where in a warp's registers the operands begin: 32 lanes of one size side by side, a predicate is 32
  // bits.
  uint32_t r[16] = {};
  int64_t imm = 0;
  int guard = -1;  // a predicate's place
  bool negated = false;
  Flow flow = Flow::next;
  Space space = Space::generic;
  uint8_t count = 1;  // elements of a vector
  int target = 0;     // of a branch
  int line = 0;
  mutable Region region;  // of global memory, where it went the last time
};

// Registers whose values are known before the kernel runs.
enum class Special : uint8_t { tid, ntid, ctaid, nctaid, laneid, warpid, lanemask };

struct SpecialRegister {
  Special kind;
  int axis;
  uint32_t at;
};

struct Parameter {
  std::string name;
  uint32_t at, bytes;
};

struct Program {
  std::string name;
  std::vector<Op> ops;
  std::vector<uint8_t> registers;  // of a warp as it starts: constants, and NaN bytes everywhere else
  std::vector<SpecialRegister> specials;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0, shared_bytes = 0, local_bytes = 0, most_threads = 0;  // 0: any
  std::vector<std::string> lines;  // of the text that it was made of
};

// An address in generic space says which window it is in; everything else is global.
constexpr uint64_t kSharedWindow = 0xE000'0000'0000'0000, kLocalWindow = 0xF000'0000'0000'0000;

// Of shared memory: where the dynamic part begins. Static arrays have 48 KB at most.
constexpr uint32_t kDynamicShared = 64 * 1024;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The part of a module's text that is one kernel, and what stands before all kernels.
std::string kernel_text(const std::string& module, const std::string& name);

Program parse(const std::string& name, const std::string& text);

}  // namespace ptx
