// launch(): runs a kernel over its grid, block by block, in the order that the environment variable
// SIMT_ORDER names: fwd, rev, or a seed. With SIMT_BLOCKS=n up to n blocks are there at a time: at barriers,
// counters and fences one is left for another, and races between them are looked for (races.h). Whatever the
// kernel did wrong comes out of it as simt::Error.
#pragma once

#include <numeric>
#include <tuple>
#include <utility>

#include "warp.h"

namespace simt {

// Whether threads may return before a barrier that others still reach.
enum class Exit { together, early };

// ---- Order

// The orders of the blocks in the grid and of the threads in a block.
class Order {
 public:
  Order() {
    const char* name = getenv("SIMT_ORDER");
    if (name == nullptr || strcmp(name, "fwd") == 0) return;
    if (strcmp(name, "rev") == 0) {
      reversed_ = true;
      return;
    }
    char* end = nullptr;
    seed_ = strtoull(name, &end, 10);
    if (end == name || *end != 0)
      throw Error(std::string("simt: SIMT_ORDER must be fwd, rev or a seed, got ") + name);
    shuffled_ = true;
  }

  // A permutation of [0, count): for a seed, the walk in steps of a number that has no divisor in common with
  // count.
  int64_t block(int64_t i, int64_t count) const {
    if (reversed_) return count - 1 - i;
    if (!shuffled_) return i;
    auto step = static_cast<int64_t>(mix(seed_) % count);
    while (std::gcd(step, count) != 1) ++step;
    return static_cast<int64_t>((static_cast<unsigned __int128>(i) * step + mix(seed_ + 1)) % count);
  }

  // Which of `count` blocks goes on.
  size_t turn(int64_t i, size_t count) const {
    if (!shuffled_) return reversed_ ? count - 1 : static_cast<size_t>(i) % count;
    return mix(seed_ + 2 * static_cast<uint64_t>(i)) % count;
  }

  void threads(int64_t block, std::vector<int>& order) const {
    std::iota(order.begin(), order.end(), 0);
    if (reversed_) std::reverse(order.begin(), order.end());
    if (!shuffled_) return;
    uint64_t state = mix(seed_ + static_cast<uint64_t>(block));
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[(state = mix(state)) % i]);
  }

 private:
  static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 31) * 0x9E3779B97F4A7C15u + 0x632BE59BD9B4E019u;
    x = (x ^ x >> 29) * 0xBF58476D1CE4E5B9u;
    return x ^ x >> 32;
  }

  bool reversed_ = false, shuffled_ = false;
  uint64_t seed_ = 0;
};

// ---- Launching

// What a launch may ask the card for: an H100 unless something else is set. Blocks run one after the other.
struct Card {
  int multiprocessors = 132;
  int shared_bytes = 0;  // of a multiprocessor; 0: what the architecture has
};
SIMT_STATE Card card;
inline int multiprocessors() { return card.multiprocessors; }
// Files of one library are compiled for two architectures: hence not of external linkage.
static inline int multiprocessor_shared_bytes() {
  return card.shared_bytes > 0 ? card.shared_bytes : (EFFDENSE_SIMT_ARCHITECTURE < 800 ? 64 : 228) * 1024;
}

// While there is one, launches are noted in it and do not run.
struct Planned {
  const void* kernel;
  dim3 grid, block;
  size_t dynamic_shared_bytes;
};
SIMT_STATE std::vector<Planned>* plan = nullptr;

inline std::string to_string(dim3 size) {
  return "(" + std::to_string(size.x) + "," + std::to_string(size.y) + "," + std::to_string(size.z) + ")";
}

// Of compute capability 7.5, or the most that any from 8.0 to 12.0 has. All other limits are the same.
constexpr size_t kMostSharedBytes = (EFFDENSE_SIMT_ARCHITECTURE < 800 ? 64 : 227) * 1024;

inline void check_configuration(dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                                size_t most_shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.x > 0x7FFFFFFF || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535)
    throw Error("simt: invalid configuration: grid " + to_string(grid));
  if (threads == 0 || threads > 1024 || block.z > 64)
    throw Error("simt: invalid configuration: block " + to_string(block));
  if (dynamic_shared_bytes > most_shared_bytes)
    throw Error("simt: invalid configuration: " + std::to_string(dynamic_shared_bytes) +
                " bytes of dynamic shared memory");
}

// Makes every thread of the block ready to start, its warps empty.
inline void set_up_threads(const std::vector<int>& order) {
  const int count = static_cast<int>(order.size()), warps = (count + 31) / 32;
  machine.order.resize(count);
  machine.warps.resize(std::max<size_t>(machine.warps.size(), warps));
  for (int w = 0; w < warps; ++w) {
    Warp& warp = machine.warps[w];
    const int lanes = std::min(32, count - 32 * w);
    warp.size = warp.open = 0;
    warp.absent = lanes == 32 ? 0 : kFullWarp << lanes;
  }
  machine.head = machine.tail = 0;
  for (int i = 0; i < count; ++i) {
    Thread& thread = *machine.threads[order[i]];
    const unsigned id = order[i];
    thread.index = {id % blockDim.x, id / blockDim.x % blockDim.y, id / blockDim.x / blockDim.y};
    thread.lane = id % 32;
    thread.warp = &machine.warps[id / 32];
    thread.waits_at = nullptr;
    thread.at_barrier = thread.exited = false;
    thread.warp->threads[thread.lane] = &thread;
    thread.warp->order[thread.warp->size++] = thread.lane;
    machine.order[i] = &thread;
    ready_last(&thread);
  }
  machine.live = count;
  machine.exited = machine.waiting = 0;
}

// A block in the middle: what it left in shared memory, and which one it is.
struct Paused {
  Resident resident;
  uint3 index{};
  std::vector<char> static_memory;
  std::unique_ptr<void, decltype(&free)> dynamic_memory{nullptr, free};
  bool is_new = true;
};

// As memcpy, over what lies between variables too.
SIMT_UNINSTRUMENTED inline void copy_memory(char* to, const char* from, size_t count) {
#ifdef __SANITIZE_ADDRESS__
  for (size_t i = 0; i < count; ++i) static_cast<volatile char*>(to)[i] = from[i];
#else
  memcpy(to, from, count);
#endif
}

// Starts the machine's block, or goes on with it, until all its threads have returned or it is left.
inline void go_on(std::vector<Paused>& all, Paused& paused) {
  std::swap(static_cast<Resident&>(machine), paused.resident);
  blockIdx = paused.index;
  if (paused.is_new) {
    for (const Range& range : static_shared) fill_with_nan(range.begin, range.end);
    if (machine.dynamic_shared) fill_with_nan(machine.dynamic_shared, machine.dynamic_shared_end);
    paused.is_new = false;
  } else {
    const char* from = paused.static_memory.data();
    for (const Range& range : static_shared) {
      copy_memory(range.begin, from, range.end - range.begin);
      from += range.end - range.begin;
    }
  }
  order_before(&machine.block_begin);
  resume(machine.host, *machine.ready[machine.head++ % 2048]);
  order_after(&machine.block_end);
  if (machine.failed) {
    machine.threads.clear();  // their stacks were left in the middle of something
    all.clear();
    throw Error(std::string("simt: ") + machine.message);
  }
  if (machine.live > 0) {
    size_t used = 0;
    for (const Range& range : static_shared) used += range.end - range.begin;
    paused.static_memory.resize(used);
    char* to = paused.static_memory.data();
    for (const Range& range : static_shared) {
      copy_memory(to, range.begin, range.end - range.begin);
      to += range.end - range.begin;
    }
  }
  std::swap(static_cast<Resident&>(machine), paused.resident);
}

// Blocks that are there at a time.
inline int blocks_at_a_time() {
  const char* text = getenv("SIMT_BLOCKS");
  if (text == nullptr) return 1;
  char* end = nullptr;
  const long count = strtol(text, &end, 10);
  if (end == text || *end != 0 || count < 1 || count > 64)
    throw Error(std::string("simt: SIMT_BLOCKS must be 1 to 64, got ") + text);
  return static_cast<int>(count);
}

inline void run(const Job& job, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                size_t most_shared_bytes) {
  check_configuration(grid, block, dynamic_shared_bytes, most_shared_bytes);
  const std::lock_guard lock(machine.busy);
  const Order order;
  const int at_a_time = blocks_at_a_time();
  last = {grid, block, dynamic_shared_bytes, {}};
  for (Watched& array : watched) {
    array.loaded_by.assign(array.bytes, Watched::kNobody);
    array.stored_by.assign(array.bytes, Watched::kNobody);
  }
  [[maybe_unused]] static const bool once = (static_shared = find_static_shared(), true);
  machine.job = job;
  machine.failed = false;
  machine.interleaves = at_a_time > 1;
  machine.host.adopt();
  races.start(machine.interleaves);
  counted.clear();
  gridDim = grid;
  blockDim = block;
  std::vector<int> threads(block.x * block.y * block.z);
  static std::vector<Paused> residents;  // their fibres live for many launches
  residents.resize(std::max<size_t>(residents.size(), at_a_time));
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const auto start = [&](int64_t id, Paused& paused) {
    Resident& resident = paused.resident;
    while (resident.threads.size() < threads.size())
      resident.threads.push_back(std::make_unique<Thread>(resident.threads.size()));
    paused.index = {static_cast<unsigned>(id % grid.x), static_cast<unsigned>(id / grid.x % grid.y),
                    static_cast<unsigned>(id / grid.x / grid.y)};
    order.threads(id, threads);
    // Exactly as large as asked for, and fresh: AddressSanitizer sees the byte behind it, and a pointer kept
    // too long.
    void* shared = nullptr;
    if (dynamic_shared_bytes > 0 && posix_memalign(&shared, 128, dynamic_shared_bytes) != 0)
      throw std::bad_alloc();
    paused.dynamic_memory.reset(shared);
    std::swap(static_cast<Resident&>(machine), resident);
    machine.block = static_cast<int>(id);
    machine.barriers = 0;
    machine.dynamic_shared = static_cast<char*>(shared);
    machine.dynamic_shared_end = machine.dynamic_shared + dynamic_shared_bytes;
    set_up_threads(threads);
    std::swap(static_cast<Resident&>(machine), resident);
    paused.is_new = true;
  };
  std::vector<Paused*> running, idle;
  for (int i = 0; i < at_a_time; ++i) idle.push_back(&residents[i]);
  int64_t next = 0, turn = 0;
  while (next < blocks || !running.empty()) {
    for (; next < blocks && !idle.empty(); ++next) {
      start(order.block(next, blocks), *idle.back());
      running.push_back(idle.back());
      idle.pop_back();
    }
    const auto at = running.begin() + static_cast<ptrdiff_t>(order.turn(turn++, running.size()));
    go_on(residents, **at);
    if ((*at)->resident.live > 0) continue;
    (*at)->dynamic_memory.reset();
    idle.push_back(*at);
    running.erase(at);
  }
  for (const int* counter : counted)
    if (*counter != 0)
      throw Error("simt: a counter is left at " + std::to_string(*counter) +
                  ", not at 0, for the next launch");
  ++launched;
  totals.loads += last.counters.loads;
  totals.load_bytes += last.counters.load_bytes;
  totals.stores += last.counters.stores;
  totals.store_bytes += last.counters.store_bytes;
}

template <Exit kExit = Exit::together, typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            cudaStream_t /*stream*/, Arguments&&... arguments) {
  if (plan != nullptr) {
    plan->push_back({reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared_bytes});
    return;
  }
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto body = [](void* data) {
    const Call& call = *static_cast<const Call*>(data);
    std::apply(call.kernel, call.parameters);
  };
  run({body, &call, kExit == Exit::early}, grid, block, dynamic_shared_bytes, kMostSharedBytes);
}

// What the last launch did, and the sum over all that succeeded since the last reset.
inline const Launch& last_launch() { return last; }
inline const Counters& counters() { return totals; }
inline void reset_counters() {
  totals = {};
  launched = 0;
}
inline int64_t launches() { return launched; }

// From now on, counts what a launch moves from and to an array, and holds it for an error if one block
// touches what another one stores. watched_counters() tells what launches did since.
inline void watch(const std::string& name, const void* begin, int64_t bytes) {
  watched.push_back({name, static_cast<const char*>(begin), bytes, {}, {}, {}});
}
inline void unwatch_all() { watched.clear(); }
inline const Counters& watched_counters(const std::string& name) {
  for (const Watched& array : watched) {
    if (array.name == name) return array.counters;
  }
  throw Error("simt: nothing called " + name + " is watched");
}

}  // namespace simt

#define DYN_SHARED(T, name) T* const name = ::simt::dynamic_shared<T>()
