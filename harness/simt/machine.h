// The machine: one block at a time, its threads as fibres, handed from one to the next where they wait.
// Barriers and warp-wide operations, the errors they find, and what a launch counts. Nothing here is CUDA's
// own vocabulary: that is warp.h and memory.h.
#pragma once

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

// What __CUDA_ARCH__ would be: 750, or 800 for 8.0 and later.
#ifndef EFFDENSE_SIMT_ARCHITECTURE
#define EFFDENSE_SIMT_ARCHITECTURE 800
#endif

// A section of its own, in templates too: memory.h.
#undef __shared__
#define __shared__ static __attribute__((noinit))
#define __launch_bounds__(...)

// Built-in variables of a kernel; the scheduler sets them at every switch.
SIMT_STATE uint3 threadIdx{}, blockIdx{};
SIMT_STATE dim3 blockDim{}, gridDim{};

namespace simt {

using Site = std::source_location;  // of a call in a kernel

// What a kernel did wrong; launch() throws it.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Global memory as the accessors saw it.
struct Counters {
  int64_t loads = 0, load_bytes = 0, stores = 0, store_bytes = 0;
};

// An array in global memory of which the traffic is wanted apart from the rest, and of which each byte is to
// belong to one block if any block stores to it.
struct Watched {
  static constexpr int kNobody = -1, kMany = -2;
  std::string name;
  const char* begin;
  int64_t bytes;
  std::vector<int> loaded_by, stored_by;  // blocks, for each byte
  Counters counters;
};

struct Launch {
  dim3 grid, block;
  size_t dynamic_shared_bytes = 0;
  Counters counters;
};

struct Warp;

// A cp.async that was issued and not yet waited for.
struct PendingCopy {
  void* to;
  int bytes, group;
  unsigned char data[16];
};

struct Thread {
  explicit Thread(size_t index);
  Fiber fiber;
  uint3 index{};
  Warp* warp = nullptr;
  int lane = 0;
  const char* waits_at = nullptr;  // the operation, null while it runs
  bool at_barrier = false, exited = false;
  Site site;
  std::unique_ptr<PendingCopy[]> copies;
  int pending = 0, capacity = 0, committed_groups = 0;
};

// Computes a warp operation for the lanes in `mask`, of which each left an operand.
using Compute = void (*)(Warp& warp, uint32_t mask);

// Lanes that wait for each other in one warp operation.
struct Group {
  Compute compute;
  const char* name;
  Site site;
  uint32_t mask, arrived;
  char* ordering;  // what ThreadSanitizer knows the operation by
};

struct Warp {
  Thread* threads[32];
  int order[32], size;  // lanes in the order in which they are let go
  uint32_t absent;      // lanes that exited, or never were
  int open;
  Group groups[32];
  void* operands[32];
  char orderings[64];
  unsigned next_ordering;
};

// What differs between launches.
struct Job {
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  bool early_return = false;
};

// A block that runs, or was left in the middle while another one runs.
struct Resident {
  int block = 0;  // linear
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> order;  // the block's threads as SIMT_ORDER has them
  int live = 0, exited = 0, waiting = 0;
  Site barrier;
  Thread* first_waiting = nullptr;
  // Ready threads: a ring, a power of two long.
  Thread* ready[2048];
  unsigned head = 0, tail = 0;
  char *dynamic_shared = nullptr, *dynamic_shared_end = nullptr;
  unsigned barriers = 0;
};

struct Machine : Resident {
  std::mutex busy;
  Job job;
  Thread* current = nullptr;
  Fiber host;
  bool interleaves = false;  // there are other residents
  bool failed = false;
  char message[1024];
  // For ThreadSanitizer: a thread may arrive at the next barrier before another has left this one, hence two.
  char barrier_orderings[2], block_begin = 0, block_end = 0;
};

SIMT_STATE Machine machine;
SIMT_STATE Launch last;
SIMT_STATE Counters totals;
SIMT_STATE int64_t launched = 0;
SIMT_STATE std::vector<Watched> watched;

#ifdef __SANITIZE_THREAD__
inline void order_before(void* object) { __tsan_release(object); }
inline void order_after(void* object) { __tsan_acquire(object); }
#else
inline void order_before(void*) {}
inline void order_after(void*) {}
#endif

// ---- Errors

// Gives the launch up: the host's stack throws, and no fibre runs again.
[[noreturn, gnu::cold]] SIMT_UNINSTRUMENTED inline void fail(const Thread& thread, Site site,
                                                             const char* format, ...) {
  const int used = snprintf(machine.message, sizeof machine.message,
                            "%s:%u: in %s: block (%u,%u,%u), thread (%u,%u,%u): ", site.file_name(),
                            static_cast<unsigned>(site.line()), site.function_name(), blockIdx.x, blockIdx.y,
                            blockIdx.z, thread.index.x, thread.index.y, thread.index.z);
  if (used < static_cast<int>(sizeof machine.message)) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(machine.message + used, sizeof machine.message - used, format, arguments);
    va_end(arguments);
  }
  machine.failed = true;
  order_before(&machine.block_end);
  Fiber::transfer(machine.current->fiber, machine.host);
  abort();
}

SIMT_UNINSTRUMENTED inline bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

// ---- Scheduling

SIMT_UNINSTRUMENTED inline void ready_last(Thread* thread) { machine.ready[machine.tail++ % 2048] = thread; }
SIMT_UNINSTRUMENTED inline void ready_first(Thread* thread) { machine.ready[--machine.head % 2048] = thread; }

[[noreturn]] SIMT_UNINSTRUMENTED inline void fail_deadlock() {
  const Thread *first = nullptr, *other = nullptr;
  for (const auto& thread : machine.threads) {
    if (thread->waits_at == nullptr) continue;
    if (first == nullptr)
      first = thread.get();
    else if (!same(thread->site, first->site))
      other = thread.get();
  }
  if (other == nullptr) fail(*first, first->site, "waits at %s, and no thread can run", first->waits_at);
  fail(*first, first->site, "waits at %s, and no thread can run: thread (%u,%u,%u) waits at %s, %s:%u",
       first->waits_at, other->index.x, other->index.y, other->index.z, other->waits_at,
       other->site.file_name(), static_cast<unsigned>(other->site.line()));
}

SIMT_UNINSTRUMENTED inline void resume(Fiber& from, Thread& next) {
  machine.current = &next;
  threadIdx = next.index;
  next.waits_at = nullptr;
  Fiber::transfer(from, next.fiber);
}

// Lets the other threads run until somebody makes this one ready.
SIMT_UNINSTRUMENTED inline void wait(Thread& self) {
  if (machine.head == machine.tail) fail_deadlock();
  order_before(&machine.block_end);  // in case the launch fails before this thread runs again
  Thread& next = *machine.ready[machine.head++ % 2048];
  if (&next == &self)
    self.waits_at = nullptr;
  else
    resume(self.fiber, next);
}

SIMT_UNINSTRUMENTED inline void open_barrier() {
  const int count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  for (int i = 0; i < count; ++i) {
    Thread* thread = machine.order[i];
    if (!thread->at_barrier) continue;
    thread->at_barrier = false;
    ready_last(thread);
  }
  machine.waiting = 0;
  ++machine.barriers;
}

[[gnu::noinline]] SIMT_UNINSTRUMENTED inline void barrier(const char* name, Site site) {
  Thread& self = *machine.current;
  if (machine.exited > 0 && !machine.job.early_return) {
    fail(self, site, "%s, but %d threads of the block have returned", name, machine.exited);
  }
  if (machine.waiting > 0 && !same(site, machine.barrier)) {
    const Thread& first = *machine.first_waiting;
    fail(self, site, "%s is divergent: thread (%u,%u,%u) waits at %s:%u", name, first.index.x, first.index.y,
         first.index.z, machine.barrier.file_name(), static_cast<unsigned>(machine.barrier.line()));
  }
  if (machine.waiting++ == 0) {
    machine.barrier = site;
    machine.first_waiting = &self;
  }
  char* const ordering = &machine.barrier_orderings[machine.barriers % 2];
  self.at_barrier = true;
  self.waits_at = name;
  self.site = site;
  order_before(ordering);
  const bool opens = machine.waiting == machine.live;
  if (opens) open_barrier();
  if (opens && machine.interleaves)
    Fiber::transfer(self.fiber, machine.host);
  else
    wait(self);
  order_after(ordering);
}

// Where several blocks run at a time: lets another one go on, and comes back some time.
SIMT_UNINSTRUMENTED inline void let_other_blocks_run() {
  if (!machine.interleaves) return;
  Thread& self = *machine.current;
  ready_first(&self);
  Fiber::transfer(self.fiber, machine.host);
}

// ---- Warp operations

SIMT_UNINSTRUMENTED inline Group& join(Thread& self, const char* name, Compute compute, uint32_t mask,
                                       Site site) {
  Warp& warp = *self.warp;
  if ((mask >> self.lane & 1) == 0)
    fail(self, site, "%s: the mask 0x%08x lacks the calling lane %d", name, mask, self.lane);
  for (int i = 0; i < warp.open; ++i) {
    Group& group = warp.groups[i];
    if ((group.mask & mask) == 0) continue;
    if (group.mask == mask && group.compute == compute && same(group.site, site)) return group;
    fail(self, site, "%s with mask 0x%08x, while lanes 0x%08x of its warp wait at %s with mask 0x%08x, %s:%u",
         name, mask, group.arrived, group.name, group.mask, group.site.file_name(),
         static_cast<unsigned>(group.site.line()));
  }
  if (mask & warp.absent) {
    fail(self, site, "%s: the mask 0x%08x names lanes 0x%08x, which have returned or do not exist", name,
         mask, mask & warp.absent);
  }
  return warp.groups[warp.open++] = {compute, name, site,
                                     mask,    0,    &warp.orderings[warp.next_ordering++ % 64]};
}

// One operation of the lanes in `mask`: the last to arrive computes it for all of them.
// Only __syncwarp orders memory between lanes; the others exchange registers.
[[gnu::noinline]] SIMT_UNINSTRUMENTED inline void collective(const char* name, Compute compute, uint32_t mask,
                                                             void* operand, bool orders_memory, Site site) {
  Thread& self = *machine.current;
  Warp& warp = *self.warp;
  Group& group = join(self, name, compute, mask, site);
  char* const ordering = group.ordering;
  warp.operands[self.lane] = operand;
  if (orders_memory) order_before(ordering);
  group.arrived |= 1u << self.lane;
  self.site = site;
  if (group.arrived != mask) {
    self.waits_at = name;
    wait(self);
  } else {
    compute(warp, mask);
    group = warp.groups[--warp.open];
    for (int i = warp.size; i-- > 0;) {
      const int lane = warp.order[i];
      if (lane != self.lane && (mask >> lane & 1)) ready_first(warp.threads[lane]);
    }
  }
  if (orders_memory) order_after(ordering);
}

// ---- The life of a thread

SIMT_UNINSTRUMENTED inline void finish(Thread& self) {
  Warp& warp = *self.warp;
  self.pending = self.committed_groups = 0;
  self.exited = true;
  ++machine.exited;
  --machine.live;
  warp.absent |= 1u << self.lane;
  for (int i = 0; i < warp.open; ++i) {
    const Group& group = warp.groups[i];
    if (group.mask >> self.lane & 1) {
      fail(self, group.site, "returned, while lanes 0x%08x of its warp wait for it at %s with mask 0x%08x",
           group.arrived, group.name, group.mask);
    }
  }
  order_before(&machine.block_end);
  if (machine.waiting > 0) {
    if (!machine.job.early_return)
      fail(self, machine.barrier, "returned, while %d threads wait at the barrier", machine.waiting);
    if (machine.waiting == machine.live) open_barrier();
  }
  if (machine.live == 0) {
    Fiber::transfer(self.fiber, machine.host);
  } else {
    wait(self);
  }
}

// A fibre lives for many blocks.
SIMT_UNINSTRUMENTED inline void thread_entry() {
  Thread& self = *machine.current;
  Fiber::arrive(self.fiber);
  for (;;) {
    order_after(&machine.block_begin);
    machine.job.body(machine.job.argument);
    finish(self);
  }
}

inline Thread::Thread(size_t index) : fiber(thread_entry, index) {}

}  // namespace simt
