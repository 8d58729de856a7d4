// Loads, stores, atomics, cp.async: where an address leads, and what may be done there.
#include <algorithm>
#include <type_traits>

#include "ptx/builder.h"
#include "ptx/machine.h"

namespace ptx {

// ---- Addresses

uint8_t* Warp::memory(Space space, uint64_t address, unsigned bytes, const Op& op, int lane, bool write) {
  const auto outside = [&](const char* what, uint64_t size) {
    fail(op, lane,
         std::to_string(bytes) + " bytes at " + std::to_string(address) + " are outside of " + what + " of " +
             std::to_string(size) + " bytes");
  };
  if (address % bytes != 0)
    fail(op, lane, "address " + std::to_string(address) + " is no multiple of " + std::to_string(bytes));
  if (space == Space::generic) {
    space = address >= kLocalWindow ? Space::local : address >= kSharedWindow ? Space::shared : Space::global;
    if (space != Space::global) address &= 0xFFFF'FFFF;
  }
  switch (space) {
    case Space::shared:
      if (address > 0xFFFF'FFFF) outside("shared memory", block->shared.size());
      return shared(static_cast<uint32_t>(address), bytes, op, lane, write);
    case Space::local: {
      const uint64_t size = block->launch.program.local_bytes;
      if (address > size || size - address < bytes) outside("a thread's local memory", size);
      return &block->local[(index * 32u + lane) * size + address];
    }
    case Space::param: {
      const auto& parameters = block->launch.parameters;
      if (address > parameters.size() || parameters.size() - address < bytes)
        outside("the parameters", parameters.size());
      if (write) fail(op, lane, "parameters cannot be written");
      return const_cast<uint8_t*>(&parameters[address]);
    }
    default:
      break;
  }
  if (address - op.region.begin >= op.region.size || op.region.begin + op.region.size - address < bytes) {
    const auto& all = block->launch.memory;
    auto next = std::upper_bound(all.begin(), all.end(), address,
                                 [](uint64_t a, const Region& r) { return a < r.begin; });
    const Region none{0, 0}, &before = next == all.begin() ? none : *(next - 1);
    if (address - before.begin >= before.size || before.begin + before.size - address < bytes)
      fail(op, lane,
           std::to_string(bytes) + " bytes at " + std::to_string(address) + ", " +
               std::to_string(address - before.begin) + " bytes behind the beginning of a buffer of " +
               std::to_string(before.size) + ", are in no buffer");
    op.region = before;
  }
  return reinterpret_cast<uint8_t*>(address);
}

// Shared memory orders nothing by itself: between two threads, of which one writes, there must be a barrier,
// or in a warp bar.warp.sync.
uint8_t* Warp::shared(uint32_t address, unsigned bytes, const Op& op, int lane, bool write) {
  const uint64_t fixed = block->launch.program.shared_bytes;
  const bool dynamic = address >= kDynamicShared;
  const uint64_t offset = dynamic ? address - kDynamicShared : address;
  const uint64_t size = dynamic ? block->launch.dynamic_shared : fixed;
  if (offset > size || size - offset < bytes)
    fail(op, lane,
         std::to_string(bytes) + " bytes at " + std::to_string(offset) + " are outside of " +
             (dynamic ? "dynamic" : "static") + " shared memory of " + std::to_string(size) + " bytes");
  const int thread = index * 32 + lane, phase = block->phase;
  const auto meets = [&](int other, const char* what) {
    fail(op, lane,
         std::string(write ? "writes" : "reads") + " shared memory at " + std::to_string(offset) + " that " +
             (other < 0 ? "other threads have" : "thread " + std::to_string(other) + " has") + " " + what +
             " without a barrier since");
  };
  for (uint32_t at = address / kGranule; at <= (address + bytes - 1) / kGranule; ++at) {
    Shadow& shadow = block->shadow[at];
    if (shadow.write_phase == phase && shadow.writer != thread &&
        (shadow.writer / 32 != index || shadow.write_sync == sync))
      meets(shadow.writer, "written");
    if (write) {
      if (shadow.read_phase == phase && shadow.reader != thread &&
          (shadow.reading_warp != index || shadow.read_sync == sync))
        meets(shadow.reader, "read");
      shadow.write_phase = phase;
      shadow.write_sync = sync;
      shadow.writer = thread;
    } else if (shadow.read_phase != phase || (shadow.reading_warp == index && shadow.read_sync != sync)) {
      shadow.read_phase = phase;
      shadow.read_sync = sync;
      shadow.reader = thread;
      shadow.reading_warp = index;
    } else {
      if (shadow.reader != thread) shadow.reader = -1;
      if (shadow.reading_warp != index) shadow.reading_warp = -1;
    }
  }
  return &block->shared[address];
}

void Warp::land(const Copy& copy, const Op& op) {
  uint8_t* const to = shared(copy.to, copy.bytes, op, copy.lane, true);
  std::memcpy(to, copy.from, copy.valid);
  std::memset(to + copy.valid, 0, copy.bytes - copy.valid);
}

namespace {

// ---- Loads and stores: r = registers of the elements, [15] the address

template <typename Element, typename Stored>
void load(Warp& warp, const Op& op, uint32_t mask) {
  const auto* const address = warp.lanes<uint64_t>(op.r[15]);
  for_lanes(mask, [&](int i) {
    const uint8_t* const from =
        warp.memory(op.space, address[i] + op.imm, sizeof(Element) * op.count, op, i, false);
    for (int e = 0; e < op.count; ++e) {
      Element value;
      std::memcpy(&value, from + e * sizeof(Element), sizeof(Element));
      warp.lanes<Stored>(op.r[e])[i] = static_cast<Stored>(value);
    }
  });
}

template <typename Element, typename Stored>
void store(Warp& warp, const Op& op, uint32_t mask) {
  const auto* const address = warp.lanes<uint64_t>(op.r[15]);
  for_lanes(mask, [&](int i) {
    const unsigned bytes = sizeof(Element) * op.count;
    uint8_t* const to = warp.memory(op.space, address[i] + op.imm, bytes, op, i, true);
    if (op.space == Space::global || (op.space == Space::generic && address[i] < kSharedWindow))
      warp.block->remember(to, bytes, warp.index * 32 + i);
    for (int e = 0; e < op.count; ++e) {
      const auto value = static_cast<Element>(warp.lanes<Stored>(op.r[e])[i]);
      std::memcpy(to + e * sizeof(Element), &value, sizeof(Element));
    }
  });
}

template <typename Element>
Run access(bool loads, int stored) {
  switch (stored) {
    case 1:
      return loads ? load<Element, uint8_t> : store<Element, uint8_t>;
    case 2:
      return loads ? load<Element, uint16_t> : store<Element, uint16_t>;
    case 4:
      return loads ? load<Element, uint32_t> : store<Element, uint32_t>;
    default:
      return loads ? load<Element, uint64_t> : store<Element, uint64_t>;
  }
}

Run access(Type type, bool loads, int stored) {
  switch (type) {
    case Type::u8:
      return access<uint8_t>(loads, stored);
    case Type::s8:
      return access<int8_t>(loads, stored);
    case Type::s16:
      return access<int16_t>(loads, stored);
    case Type::s32:
      return access<int32_t>(loads, stored);
    default:
      break;
  }
  switch (bytes_of(type)) {
    case 2:
      return access<uint16_t>(loads, stored);
    case 4:
      return access<uint32_t>(loads, stored);
    default:
      return access<uint64_t>(loads, stored);
  }
}

Space take_space(Statement& in) {
  const auto name = in.take_one({"global", "shared", "local", "param", "const"});
  if (name == "const") throw Error("is of constant memory, which is unknown here");
  return name == "global"   ? Space::global
         : name == "shared" ? Space::shared
         : name == "local"  ? Space::local
         : name == "param"  ? Space::param
                            : Space::generic;
}

// The address as 64 bits in a register, and what is added to it.
uint32_t address_of(Builder& b, const Operand& operand, int64_t& added) {
  if (operand.kind != Operand::Kind::address) throw Error("has no address where one must be");
  const Operand& base = operand.parts.at(0);
  added = static_cast<int64_t>(operand.number);
  if (base.kind == Operand::Kind::symbol) added += static_cast<int64_t>(b.symbol(base.text).second);
  if (base.kind == Operand::Kind::number) added += static_cast<int64_t>(base.number);
  if (base.kind != Operand::Kind::reg) return b.constant(0, 8);
  if (base.reg.bytes == 8) return base.reg.at;
  const uint32_t wide = b.new_register(8);
  b.emit(resize(base.reg.bytes, 8, false), {wide, base.reg.at});
  return wide;
}

void fence(Warp& warp, const Op&, uint32_t mask) { warp.block->publish(warp.index, mask); }

// Of an access that is a fence too.
bool orders(Statement& in, const char* how) {
  in.ignore({"gpu", "cta", "sys", "cluster"});
  return in.take(how) || in.take("acq_rel") || in.take("sc");
}

void decode_access(Builder& b, Statement& in, bool loads) {
  const Space space = take_space(in);
  const bool releases = !loads && orders(in, "release");
  in.ignore({"volatile", "relaxed", "acquire", "weak", "nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "gpu",
             "cta", "sys"});
  std::erase_if(in.modifiers,
                [](const std::string& m) { return m.starts_with("L1::") || m.starts_with("L2::"); });
  const auto vector = in.take_one({"v2", "v4", "v8"});
  const Type type = in.type();
  const Operand& data = in.operand(loads ? 0 : 1);
  const auto& elements = data.kind == Operand::Kind::vector ? data.parts : std::vector<Operand>{data};
  if (elements.size() != (vector.empty() ? 1u : static_cast<size_t>(vector[1] - '0')))
    throw Error("has another number of elements");
  if (releases) b.emit(fence);
  Op op;
  op.r[15] = address_of(b, in.operand(loads ? 1 : 0), op.imm);
  int stored = bytes_of(type);
  for (size_t e = 0; e < elements.size(); ++e) {
    const Operand& element = elements[e];
    if (element.kind == Operand::Kind::reg && e == 0) stored = element.reg.bytes;
    op.r[e] = loads ? b.destination(element, stored) : b.source(element, stored);
  }
  Op& emitted = b.emit(access(type, loads, stored));
  std::copy(op.r, op.r + 16, emitted.r);
  emitted.imm = op.imm;
  emitted.space = space;
  emitted.count = static_cast<uint8_t>(elements.size());
}

// ---- Atomics on integers: r = result, operand, second operand, [15] the address. Lane after lane.

enum class Atomic { add, min, max, and_, or_, xor_, exch, inc, dec, cas };

template <typename T, Atomic kOp>
void atomic(Warp& warp, const Op& op, uint32_t mask) {
  const auto* const address = warp.lanes<uint64_t>(op.r[15]);
  const T *const a = warp.lanes<T>(op.r[1]), *const b = warp.lanes<T>(op.r[2]);
  for_lanes(mask, [&](int i) {
    uint8_t* const at = warp.memory(op.space, address[i] + op.imm, sizeof(T), op, i, false);
    T before, after;
    std::memcpy(&before, at, sizeof(T));
    if constexpr (kOp == Atomic::add) after = before + a[i];
    if constexpr (kOp == Atomic::min) after = std::min(before, a[i]);
    if constexpr (kOp == Atomic::max) after = std::max(before, a[i]);
    if constexpr (kOp == Atomic::and_) after = before & a[i];
    if constexpr (kOp == Atomic::or_) after = before | a[i];
    if constexpr (kOp == Atomic::xor_) after = before ^ a[i];
    if constexpr (kOp == Atomic::exch) after = a[i];
    if constexpr (kOp == Atomic::inc) after = before >= a[i] ? 0 : before + 1;
    if constexpr (kOp == Atomic::dec) after = before == 0 || before > a[i] ? a[i] : before - 1;
    if constexpr (kOp == Atomic::cas) after = before == a[i] ? b[i] : before;
    std::memcpy(at, &after, sizeof(T));
    warp.lanes<T>(op.r[0])[i] = before;
  });
}

template <typename T>
Run atomic_run(const std::string& what) {
  if (what == "add") return atomic<T, Atomic::add>;
  if (what == "min") return atomic<T, Atomic::min>;
  if (what == "max") return atomic<T, Atomic::max>;
  if (what == "and") return atomic<T, Atomic::and_>;
  if (what == "or") return atomic<T, Atomic::or_>;
  if (what == "xor") return atomic<T, Atomic::xor_>;
  if (what == "exch") return atomic<T, Atomic::exch>;
  if (what == "inc") return atomic<T, Atomic::inc>;
  if (what == "dec") return atomic<T, Atomic::dec>;
  if (what == "cas") return atomic<T, Atomic::cas>;
  throw Error("is unknown");
}

void decode_atomic(Builder& b, Statement& in, bool reduces) {
  const Space space = take_space(in);
  if (orders(in, "release")) b.emit(fence);
  in.ignore({"relaxed", "acquire"});
  const auto what = in.take_one({"add", "min", "max", "and", "or", "xor", "exch", "inc", "dec", "cas"});
  const Type type = in.type();
  Run run = nullptr;
  if (type == Type::u32) run = atomic_run<uint32_t>(what);
  if (type == Type::s32) run = atomic_run<int32_t>(what);
  if (type == Type::u64) run = atomic_run<uint64_t>(what);
  if (type == Type::s64) run = atomic_run<int64_t>(what);
  if (run == nullptr) throw Error("is unknown: atomics are of integers");
  const size_t first = reduces ? 0 : 1;
  int64_t added = 0;
  const int bytes = bytes_of(type);
  const uint32_t address = address_of(b, in.operand(first), added);
  const uint32_t a = b.source(in.operand(first + 1), bytes);
  const uint32_t second = what == "cas" ? b.source(in.operand(first + 2), bytes) : a;
  const uint32_t result = reduces ? b.new_register(bytes) : b.destination(in.operand(0), bytes);
  Op& op = b.emit(run, {result, a, second});
  op.r[15] = address;
  op.imm = added;
  op.space = space;
}

// ---- cp.async: r = to, from, valid bytes; imm the bytes, target what is added to `to`

void copy(Warp& warp, const Op& op, uint32_t mask) {
  const auto *const to = warp.lanes<uint64_t>(op.r[0]), *const from = warp.lanes<uint64_t>(op.r[1]);
  const auto* const valid = warp.lanes<uint32_t>(op.r[2]);
  const auto bytes = static_cast<unsigned>(op.count);
  for_lanes(mask, [&](int i) {
    const auto place = static_cast<uint32_t>(to[i] + op.target);
    const uint64_t source = from[i] + op.imm;
    if (valid[i] > bytes)
      warp.fail(op, i, "src-size " + std::to_string(valid[i]) + " is more than " + std::to_string(bytes));
    if (place % bytes != 0)
      warp.fail(op, i, "address " + std::to_string(place) + " is no multiple of " + std::to_string(bytes));
    if (source % bytes != 0)
      warp.fail(op, i, "address " + std::to_string(source) + " is no multiple of " + std::to_string(bytes));
    // Read as bytes, as many as are asked for; where none is, from anywhere.
    const uint8_t* at = nullptr;
    if (valid[i] > 0) {
      at = warp.memory(Space::global, source, 1, op, i, false);
      warp.memory(Space::global, source + valid[i] - 1, 1, op, i, false);
    }
    const Copy one{i, warp.open_group[i], place, at, bytes, valid[i]};
    if (warp.block->launch.mode.late)
      warp.copies.push_back(one);
    else
      warp.land(one, op);
  });
}

void commit(Warp& warp, const Op&, uint32_t mask) {
  for_lanes(mask, [&](int i) { ++warp.open_group[i]; });
}

// imm: how many groups may be outstanding, -1: not even what is uncommitted.
void wait(Warp& warp, const Op& op, uint32_t mask) {
  std::erase_if(warp.copies, [&](const Copy& one) {
    if ((mask >> one.lane & 1) == 0) return false;
    if (op.imm >= 0 && one.group >= warp.open_group[one.lane] - op.imm) return false;
    warp.land(one, op);
    return true;
  });
}

void decode_copy(Builder& b, Statement& in) {
  if (!in.take("async")) throw Error("is unknown");
  if (in.take("commit_group")) {
    b.emit(commit);
  } else if (in.take("wait_group")) {
    b.emit(wait).imm = static_cast<int64_t>(in.operand(0).number);
  } else if (in.take("wait_all")) {
    b.emit(wait).imm = -1;
  } else {
    const bool bypasses = in.take("cg");
    if (!bypasses && !in.take("ca")) throw Error("is unknown");
    if (!in.take("shared") || !in.take("global")) throw Error("is unknown");
    std::erase_if(in.modifiers, [](const std::string& m) { return m.starts_with("L2::"); });
    const uint64_t bytes = in.operand(2).number;
    if (bypasses ? bytes != 16 : bytes != 4 && bytes != 8 && bytes != 16)
      throw Error("copies that many bytes never");
    int64_t to_added = 0, from_added = 0;
    const uint32_t to = address_of(b, in.operand(0), to_added),
                   from = address_of(b, in.operand(1), from_added);
    const uint32_t valid = in.operands.size() > 3 ? b.source(in.operand(3), 4) : b.constant(bytes, 4);
    Op& op = b.emit(copy, {to, from, valid});
    op.imm = from_added;
    op.target = static_cast<int>(to_added);
    op.count = static_cast<uint8_t>(bytes);
  }
}

}  // namespace

bool decode_memory(Builder& b, Statement& in) {
  if (in.name == "ld" || in.name == "ldu" || in.name == "st") {
    decode_access(b, in, in.name != "st");
  } else if (in.name == "atom" || in.name == "red") {
    decode_atomic(b, in, in.name == "red");
  } else if (in.name == "cp") {
    decode_copy(b, in);
  } else if (in.name == "membar" || in.name == "fence") {
    in.ignore({"sc", "acq_rel", "acquire", "release"});
    if (in.take_one({"gl", "gpu", "sys"}).empty()) {
      if (!in.take("cta")) throw Error("is unknown");
    } else {
      b.emit(fence);
    }
  } else if (in.name == "prefetch" || in.name == "prefetchu") {
    in.modifiers.clear();
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx
