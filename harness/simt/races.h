// Races between blocks. On the device a block sees what another one has stored only where something orders
// the two; here blocks run one after another, and it would always see it. So where several blocks run at a
// time (SIMT_BLOCKS), every load and store of global memory is looked up: an access to what another block has
// stored in this launch is an error, unless that block's store came before a fence of a thread that then
// counted up, this block's thread counted up later and then fenced, and the access comes after that. Within a
// block a barrier orders.
#pragma once

#include <array>
#include <unordered_map>

#include "machine.h"

namespace simt {

struct Store {
  int block = -1, thread = 0;
  unsigned phase = 0;  // barriers that the block had passed
  int64_t time = 0;
};

// What a thread's fence made ready to be seen: what its block stored before the last barrier, and what the
// thread stored itself.
struct Fence {
  int thread = -1;
  unsigned phase = 0;
  int64_t time = 0;
  bool covers(const Store& store) const {
    return thread >= 0 && (store.phase < phase || (store.thread == thread && store.time < time));
  }
};

// What a block may see of another one: from which thread on, or for all threads from the next barrier on.
struct Sight {
  Fence fence;
  int thread;
  unsigned phase;
};

class Races {
 public:
  void start(bool is_on) {
    is_on_ = is_on;
    if (lines_.empty() && fences_.empty() && released_.empty()) return;
    lines_.clear();
    fences_.clear();
    released_.clear();
    taken_.clear();
    sights_.clear();
  }

  SIMT_UNINSTRUMENTED void access(const void* address, bool is_load, int64_t bytes, Site site) {
    if (!is_on_) return;
    ++time_;
    for (int64_t i = 0; i < bytes; ++i) {
      const auto place = reinterpret_cast<uintptr_t>(address) + i;
      Store& last = lines_[place / kLine][place % kLine];
      check(last, is_load ? "loads" : "stores to", site);
      if (!is_load) last = {machine.block, me(), machine.barriers, time_};
    }
  }

  SIMT_UNINSTRUMENTED void fence() {
    if (!is_on_) return;
    fences_[{machine.block, me()}] = {me(), machine.barriers, ++time_};
    auto& taken = taken_[{machine.block, me()}];
    for (const auto& [block, fence] : taken)
      sights_[{machine.block, block}] = {fence, me(), machine.barriers};
    taken.clear();
  }

  // Of one counter a thread takes what all before it have released, and releases what its fence covers.
  SIMT_UNINSTRUMENTED void count_up(const void* counter, Site site) {
    if (!is_on_) return;
    const auto place = reinterpret_cast<uintptr_t>(counter);
    check(lines_[place / kLine][place % kLine], "counts up", site);
    auto& released = released_[counter];
    auto& taken = taken_[{machine.block, me()}];
    for (const auto& [block, fence] : released) taken[block] = fence;
    const auto own = fences_.find({machine.block, me()});
    if (own != fences_.end()) released[machine.block] = own->second;
  }

 private:
  static constexpr int kLine = 64;
  struct Hash {
    size_t operator()(const std::pair<int, int>& key) const { return key.first * 4099u + key.second; }
  };
  template <typename Value>
  using ByPair = std::unordered_map<std::pair<int, int>, Value, Hash>;

  static int me() {
    const uint3& at = machine.current->index;
    return static_cast<int>(at.x + blockDim.x * (at.y + blockDim.y * at.z));
  }

  SIMT_UNINSTRUMENTED void check(const Store& store, const char* what, Site site) {
    if (store.block < 0 || store.block == machine.block) return;
    const auto found = sights_.find({machine.block, store.block});
    if (found != sights_.end()) {
      const Sight& sight = found->second;
      const bool is_after = machine.barriers > sight.phase || sight.thread == me();
      if (is_after && sight.fence.covers(store)) return;
    }
    fail(*machine.current, site,
         "%s what block %d has stored in this launch, and no fence and counter order the two", what,
         store.block);
  }

  bool is_on_ = false;
  int64_t time_ = 0;
  std::unordered_map<uintptr_t, std::array<Store, kLine>> lines_;
  ByPair<Fence> fences_;                                                      // by block and thread
  std::unordered_map<const void*, std::unordered_map<int, Fence>> released_;  // by counter and block
  ByPair<std::unordered_map<int, Fence>> taken_;  // by block and thread: until its fence
  ByPair<Sight> sights_;                          // by block, of another one
};

SIMT_STATE Races races;

}  // namespace simt
