// Runs a kernel block by block, a block warp by warp, a warp's 32 lanes side by side. What has no defined
// outcome on a device is an error here: accesses outside of buffers or not aligned, warps that come to a
// barrier or an .aligned instruction divided, threads that meet in shared memory without a barrier.
#pragma once

#include <bit>
#include <cstring>
#include <string>
#include <vector>

#include "ptx/program.h"

namespace ptx {

struct Size3 {
  unsigned size[3];
  unsigned count() const { return size[0] * size[1] * size[2]; }
};

// What a device may do one way or the other. Tests run both.
struct Mode {
  bool late = true;        // copies land when they are waited for, stores of a block when it has ended
  bool backwards = false;  // the order of a block's warps, and of the blocks
};

struct Launch {
  const Program& program;
  Size3 grid, block;
  size_t dynamic_shared;
  std::vector<uint8_t> parameters;
  std::vector<Region> memory;  // sorted
  Mode mode;
};

struct Group {  // lanes that are at the same operation
  int pc;
  uint32_t lanes;
  bool waits;
};

struct Copy {  // cp.async
  int lane, group;
  uint32_t to;
  const uint8_t* from;
  unsigned bytes, valid;
};

struct Block;

struct Warp {
  Block* block = nullptr;
  int index = 0;
  uint8_t* registers = nullptr;
  uint32_t live = 0;
  std::vector<Group> groups;
  bool at_barrier = false;
  int barrier = 0, expected = 0;  // which, and how many threads
  const Op* at = nullptr;         // of the barrier, which may have a result
  uint32_t arrived = 0;           // with a true predicate
  int sync = 1;                   // counts what orders the warp's own memory accesses
  int open_group[32] = {};        // of copies
  std::vector<Copy> copies;

  template <typename T>
  T* lanes(uint32_t place) {
    return reinterpret_cast<T*>(registers + place);
  }
  uint32_t& predicate(uint32_t place) { return *lanes<uint32_t>(place); }
  [[noreturn]] void fail(const Op& op, int lane, const std::string& what) const;
  // Where so many bytes lie, or an error.
  uint8_t* memory(Space space, uint64_t address, unsigned bytes, const Op& op, int lane, bool write);
  uint8_t* shared(uint32_t address, unsigned bytes, const Op& op, int lane, bool write);
  void land(const Copy& copy, const Op& op);
  void run();

 private:
  int step(Group& group);
  void branch(size_t group, const Op& op, uint32_t taken);
  void meet();
};

// Who was the last to write and to read two bytes of shared memory.
constexpr uint32_t kGranule = 2;
struct Shadow {
  int write_phase = 0, write_sync = 0, writer = 0;
  int read_phase = 0, read_sync = 0, reader = 0, reading_warp = 0;  // -1: several
};

struct Stored {  // what a store to global memory found
  uint8_t* at;
  int thread, phase;
  uint8_t bytes, before[16];
};

struct Block {
  const Launch& launch;
  const Op* ops;
  Size3 index;
  std::vector<uint8_t> shared, local, registers;
  std::vector<Shadow> shadow;
  std::vector<Warp> warps;
  std::vector<Stored> stored;
  int phase = 1;  // counts barriers

  explicit Block(const Launch& all);
  void run(Size3 at);
  // A fence: what these lanes, or the block before the last barrier, have stored is there for all.
  void publish(int warp, uint32_t lanes);
  void remember(uint8_t* at, unsigned bytes, int thread);
  std::string where(int warp, int lane) const;

 private:
  bool release();
};

// Throws Error.
void run(Launch& launch);

// How many operations have run, each by the lanes of one warp.
extern uint64_t executed;

template <typename Body>
inline void for_lanes(uint32_t mask, const Body& body) {
  if (mask == ~0u) {
    for (int i = 0; i < 32; ++i) body(i);
  } else {
    for (; mask != 0; mask &= mask - 1) body(std::countr_zero(mask));
  }
}

}  // namespace ptx
