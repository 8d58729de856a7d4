// The order of execution: blocks, warps, and the lanes of a warp that branches have divided.
#include "ptx/machine.h"

#include <algorithm>

namespace ptx {

uint64_t executed = 0;

// ---- A warp. Of its groups the one that is furthest behind runs, as far as the next one: so they meet
// again.

void Warp::fail(const Op& op, int lane, const std::string& what) const {
  const Program& program = block->launch.program;
  const std::string text =
      static_cast<size_t>(op.line) <= program.lines.size() && op.line > 0 ? program.lines[op.line - 1] : "";
  throw Error("kernel " + program.name + ", " + block->where(index, lane) + ", line " +
              std::to_string(op.line) + " \"" + text + "\": " + what);
}

void Warp::branch(size_t group, const Op& op, uint32_t taken) {
  const uint32_t stays = groups[group].lanes & ~taken;
  if (stays == 0) {
    groups[group].pc = op.target;
  } else {
    groups[group] = {groups[group].pc + 1, stays, false};
    if (taken != 0) groups.push_back({op.target, taken, false});
  }
}

// Groups that are at the same place become one.
void Warp::meet() {
  std::sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.pc < b.pc; });
  size_t last = 0;
  for (size_t i = 1; i < groups.size(); ++i) {
    if (groups[i].pc == groups[last].pc) {
      groups[last].lanes |= groups[i].lanes;
      groups[last].waits = false;
    } else {
      groups[++last] = groups[i];
    }
  }
  groups.resize(groups.empty() ? 0 : last + 1);
}

// As far as the barrier or the end.
void Warp::run() {
  while (!groups.empty()) {
    if (groups.size() > 1) meet();
    size_t first = 0;
    while (first < groups.size() && groups[first].waits) ++first;
    if (first == groups.size()) {
      const Op& op = block->ops[groups[0].pc];
      std::string others;
      if (groups.size() > 1)
        others = ", while others wait at line " + std::to_string(block->ops[groups[1].pc].line);
      fail(op, std::countr_zero(groups[0].lanes),
           "needs lanes of the warp that do not come here (here are " +
               std::to_string(std::popcount(groups[0].lanes)) + " of " + std::to_string(std::popcount(live)) +
               others + ")");
    }
    // Up to the next group, which would then be part of this one.
    const int next = first + 1 < groups.size() ? groups[first + 1].pc : INT32_MAX;
    Group& group = groups[first];
    do {
      const Op& op = block->ops[group.pc];
      uint32_t mask = group.lanes;
      if (op.guard >= 0) mask &= op.negated ? ~predicate(op.guard) : predicate(op.guard);
      ++executed;
      if (op.flow == Flow::next) {
        if (mask != 0) op.run(*this, op, mask);
        ++group.pc;
        continue;
      }
      if (op.flow == Flow::branch) {
        branch(first, op, mask);
        if (groups.size() > 1) break;
        continue;
      }
      if (op.flow == Flow::exit) {
        live &= ~mask;
        group.lanes &= ~mask;
        ++group.pc;
        if (group.lanes != 0) continue;
        groups.erase(groups.begin() + static_cast<long>(first));
        for (Group& other : groups) other.waits = false;  // perhaps for these lanes
        break;
      }
      const uint32_t needed = op.flow == Flow::gather_of
                                  ? lanes<uint32_t>(op.r[15])[std::countr_zero(group.lanes)]
                              : op.flow == Flow::gather ? ~0u
                                                        : live;
      if (mask != group.lanes) fail(op, std::countr_zero(group.lanes), "is executed by some lanes only");
      if (mask != needed) {
        if ((mask & ~needed) != 0) fail(op, std::countr_zero(mask & ~needed), "is not in the mask");
        if ((needed & ~live) != 0) fail(op, std::countr_zero(mask), "needs lanes that have exited");
        group.waits = true;
        break;
      }
      op.run(*this, op, mask);
      ++group.pc;
      if (op.flow == Flow::barrier) {
        at_barrier = true;
        at = &op;
        return;
      }
    } while (group.pc < next);
  }
}

// ---- A block

Block::Block(const Launch& all)
    : launch(all),
      ops(all.program.ops.data()),
      shared(kDynamicShared + all.dynamic_shared),
      shadow(shared.size() / kGranule + 1) {
  const unsigned threads = all.block.count(), count = (threads + 31) / 32;
  local.resize(size_t{threads} * all.program.local_bytes);
  registers.resize(count * all.program.registers.size() + 64);
  warps.resize(count);
}

std::string Block::where(int warp, int lane) const {
  const auto text = [](const unsigned (&at)[3]) {
    return "(" + std::to_string(at[0]) + ", " + std::to_string(at[1]) + ", " + std::to_string(at[2]) + ")";
  };
  const unsigned thread = warp * 32 + lane, x = launch.block.size[0], y = launch.block.size[1];
  const unsigned at[3] = {thread % x, thread / x % y, thread / x / y};
  return "block " + text(index.size) + ", thread " + text(at);
}

void Block::run(Size3 at) {
  index = at;
  phase += 1;
  std::fill(shared.begin(), shared.end(), 0xFF);
  std::fill(local.begin(), local.end(), 0xFF);
  const Program& program = launch.program;
  const unsigned threads = launch.block.count();
  const size_t bytes = program.registers.size();
  auto* const base =
      reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(registers.data()) + 63) / 64 * 64);
  const unsigned x = launch.block.size[0], y = launch.block.size[1];
  for (size_t w = 0; w < warps.size(); ++w) {
    Warp& warp = warps[w];
    const int sync = warp.sync + 1;
    warp = Warp();
    warp.block = this;
    warp.index = static_cast<int>(w);
    warp.registers = base + w * bytes;
    warp.sync = sync;
    std::memcpy(warp.registers, program.registers.data(), bytes);
    const unsigned count = std::min<unsigned>(32, threads - w * 32);
    warp.live = count == 32 ? ~0u : (1u << count) - 1;
    warp.groups.push_back({0, warp.live, false});
    for (const SpecialRegister& special : program.specials) {
      auto* const to = warp.lanes<uint32_t>(special.at);
      for (unsigned lane = 0; lane < 32; ++lane) {
        const unsigned thread = static_cast<unsigned>(w) * 32 + lane;
        const unsigned tid[3] = {thread % x, thread / x % y, thread / x / y};
        switch (special.kind) {
          case Special::tid:
            to[lane] = tid[special.axis];
            break;
          case Special::ntid:
            to[lane] = launch.block.size[special.axis];
            break;
          case Special::ctaid:
            to[lane] = index.size[special.axis];
            break;
          case Special::nctaid:
            to[lane] = launch.grid.size[special.axis];
            break;
          case Special::laneid:
            to[lane] = lane;
            break;
          case Special::warpid:
            to[lane] = static_cast<uint32_t>(w);
            break;
          case Special::lanemask:
            to[lane] = (1u << lane) - 1;
            break;
        }
      }
    }
  }
  do {
    for (size_t i = 0; i < warps.size(); ++i) {
      Warp& warp = warps[launch.mode.backwards ? warps.size() - 1 - i : i];
      if (!warp.at_barrier) warp.run();
    }
  } while (release());
}

// All of the block's threads that have not exited are at one barrier: they go on. Returns whether any do.
bool Block::release() {
  const Warp* first = nullptr;
  bool any_of = false, all_of = true;
  int count = 0;
  for (const Warp& warp : warps) {
    if (!warp.at_barrier) continue;
    if (first == nullptr) first = &warp;
    if (warp.barrier != first->barrier)
      warp.fail(*warp.at, 0,
                "barrier " + std::to_string(warp.barrier) + ", while others are at barrier " +
                    std::to_string(first->barrier));
    const int here = std::popcount(warp.live);
    count += std::popcount(warp.arrived);
    any_of = any_of || warp.arrived != 0;
    all_of = all_of && std::popcount(warp.arrived) == here;
  }
  if (first == nullptr) return false;
  int there = 0;
  for (const Warp& warp : warps) there += std::popcount(warp.live);
  if (first->expected != 0 && first->expected != there)
    first->fail(*first->at, 0,
                "is for " + std::to_string(first->expected) + " threads of " + std::to_string(there));
  ++phase;
  for (Warp& warp : warps) {
    if (!warp.at_barrier) continue;
    warp.at_barrier = false;
    const Op& op = *warp.at;
    if (op.imm == 0) continue;
    // barrier.red: 1 popc, 2 and, 3 or
    if (op.imm == 1)
      for_lanes(warp.live, [&](int i) { warp.lanes<uint32_t>(op.r[0])[i] = count; });
    else
      warp.predicate(op.r[0]) = (op.imm == 2 ? all_of : any_of) ? ~0u : 0;
  }
  return true;
}

void Block::remember(uint8_t* at, unsigned bytes, int thread) {
  if (!launch.mode.late) return;
  Stored& entry = stored.emplace_back();
  entry.at = at;
  entry.bytes = static_cast<uint8_t>(bytes);
  entry.thread = thread;
  entry.phase = phase;
  std::memcpy(entry.before, at, bytes);
}

void Block::publish(int warp, uint32_t lanes) {
  std::erase_if(stored, [&](const Stored& one) {
    return one.phase < phase || (one.thread / 32 == warp && (lanes >> one.thread % 32 & 1) != 0);
  });
}

// ---- A launch

void run(Launch& launch) {
  for (const Op& op : launch.program.ops) op.region = {};
  Block block(launch);
  std::vector<Stored> late;
  const auto exchange = [](Stored& one) { std::swap_ranges(one.at, one.at + one.bytes, one.before); };
  const unsigned count = launch.grid.count();
  for (unsigned i = 0; i < count; ++i) {
    const unsigned at = launch.mode.backwards ? count - 1 - i : i;
    const unsigned x = launch.grid.size[0], y = launch.grid.size[1];
    block.stored.clear();
    block.run({{at % x, at / x % y, at / x / y}});
    // What no fence has made known to other blocks is not there for them.
    for (auto one = block.stored.rbegin(); one != block.stored.rend(); ++one) exchange(*one);
    late.insert(late.end(), block.stored.begin(), block.stored.end());
  }
  for (Stored& one : late) exchange(one);
}

}  // namespace ptx
