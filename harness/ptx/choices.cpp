// Comparisons, predicates, what is chosen by them, and moves.
#include <algorithm>
#include <cmath>

#include "ptx/lanes.h"

namespace ptx {
namespace {

// ---- Comparisons: [0] the predicate, [1] its opposite, [2] and [3] what is compared, [4] a predicate

template <typename T, typename F>
void compare(Warp& warp, const Op& op, uint32_t mask) {
  const T *const a = warp.lanes<T>(op.r[2]), *const b = warp.lanes<T>(op.r[3]);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<uint32_t>(F{}(a[i], b[i])) << i;
  uint32_t other = ~result;
  if (op.imm != 0) {
    const uint32_t c = warp.predicate(op.r[4]);
    const auto with = [&](uint32_t x) { return op.imm == 1 ? x & c : op.imm == 2 ? x | c : x ^ c; };
    result = with(result);
    other = with(other);
  }
  const auto set = [&](uint32_t place, uint32_t value) {
    warp.predicate(place) = (warp.predicate(place) & ~mask) | (value & mask);
  };
  set(op.r[0], result);
  set(op.r[1], other);
}

template <typename F>
Run comparison(Type type, F) {
  return for_numbers(type, [](auto t) -> Run { return compare<decltype(t), F>; });
}

// Of floating point: "equ" and the like are true of NaN too.
template <typename F>
struct Unordered {
  template <typename T>
  bool operator()(T a, T b) const {
    return std::isnan(a) || std::isnan(b) || F{}(a, b);
  }
};
template <typename F>
Run unordered(Type type, F) {
  return for_floats(type, [](auto t) -> Run { return compare<decltype(t), Unordered<F>>; });
}

Run comparison_named(const std::string& how, Type type) {
  const auto less = [](auto a, auto b) { return a < b; };
  const auto less_equal = [](auto a, auto b) { return a <= b; };
  const auto greater = [](auto a, auto b) { return a > b; };
  const auto greater_equal = [](auto a, auto b) { return a >= b; };
  const auto equal = [](auto a, auto b) { return a == b; };
  const auto not_equal = [](auto a, auto b) { return a < b || a > b; };
  if (how == "lt" || how == "lo") return comparison(type, less);
  if (how == "le" || how == "ls") return comparison(type, less_equal);
  if (how == "gt" || how == "hi") return comparison(type, greater);
  if (how == "ge" || how == "hs") return comparison(type, greater_equal);
  if (how == "eq") return comparison(type, equal);
  if (how == "ne") return comparison(type, not_equal);
  if (how == "ltu") return unordered(type, less);
  if (how == "leu") return unordered(type, less_equal);
  if (how == "gtu") return unordered(type, greater);
  if (how == "geu") return unordered(type, greater_equal);
  if (how == "equ") return unordered(type, equal);
  if (how == "neu") return unordered(type, not_equal);
  if (how == "num")
    return for_floats(type, [](auto t) -> Run {
      return compare<decltype(t), decltype([](auto a, auto b) { return !std::isnan(a) && !std::isnan(b); })>;
    });
  if (how == "nan")
    return for_floats(type, [](auto t) -> Run {
      return compare<decltype(t), decltype([](auto a, auto b) { return std::isnan(a) || std::isnan(b); })>;
    });
  throw Error("compares in an unknown way");
}

// ---- Predicates

template <typename F>
void of_predicates(Warp& warp, const Op& op, uint32_t mask) {
  uint32_t& d = warp.predicate(op.r[0]);
  d = (d & ~mask) | (F{}(warp.predicate(op.r[1]), warp.predicate(op.r[2])) & mask);
}

uint32_t predicate(Builder& b, const Operand& operand) {
  if (operand.kind == Operand::Kind::number) return b.constant(operand.number != 0 ? ~0u : 0, 4);
  if (operand.kind != Operand::Kind::reg || !operand.reg.predicate)
    throw Error("needs a predicate where " + operand.text + " is");
  if (!operand.negated) return operand.reg.at;
  const uint32_t opposite = b.new_register(1);
  using Not = decltype([](uint32_t a, uint32_t) { return ~a; });
  b.emit(of_predicates<Not>, {opposite, operand.reg.at, operand.reg.at});
  return opposite;
}

uint32_t predicate_result(Builder& b, const Operand& operand) {
  if (operand.kind == Operand::Kind::sink) return b.new_register(1);
  if (operand.kind != Operand::Kind::reg || !operand.reg.predicate)
    throw Error("needs a predicate where " + operand.text + " is");
  return operand.reg.at;
}

template <typename T>
void select(Warp& warp, const Op& op, uint32_t mask) {
  T* const d = warp.lanes<T>(op.r[0]);
  const T *const a = warp.lanes<T>(op.r[1]), *const b = warp.lanes<T>(op.r[2]);
  const uint32_t which = warp.predicate(op.r[3]);
  for_lanes(mask, [&](int i) { d[i] = which >> i & 1 ? a[i] : b[i]; });
}

// ---- Moves between one register and several: [0] one, [1..] its pieces, imm their bytes

template <bool kPack>
void pieces(Warp& warp, const Op& op, uint32_t mask) {
  const auto bytes = static_cast<size_t>(op.imm), whole = bytes * op.count;
  for_lanes(mask, [&](int i) {
    uint8_t all[16];
    uint8_t* const one = warp.registers + op.r[0] + i * whole;
    if (!kPack) std::memcpy(all, one, whole);
    for (int e = 0; e < op.count; ++e) {
      uint8_t* const piece = warp.registers + op.r[1 + e] + i * bytes;
      kPack ? std::memcpy(all + e * bytes, piece, bytes) : std::memcpy(piece, all + e * bytes, bytes);
    }
    if (kPack) std::memcpy(one, all, whole);
  });
}

Run copy_of(int bytes) {
  using Same = decltype([](auto a) { return a; });
  switch (bytes) {
    case 1:
      return unary<uint8_t, uint8_t, Same>;
    case 2:
      return unary<uint16_t, uint16_t, Same>;
    case 4:
      return unary<uint32_t, uint32_t, Same>;
    default:
      return unary<uint64_t, uint64_t, Same>;
  }
}

void decode_move(Builder& b, Statement& in) {
  const Type type = in.type();
  const int bytes = bytes_of(type);
  const Operand &to = in.operand(0), &from = in.operand(1);
  if (type == Type::pred) {
    using First = decltype([](uint32_t a, uint32_t) { return a; });
    const uint32_t a = predicate(b, from);
    b.emit(of_predicates<First>, {predicate_result(b, to), a, a});
    return;
  }
  const bool packs = from.kind == Operand::Kind::vector, unpacks = to.kind == Operand::Kind::vector;
  if (!packs && !unpacks) {
    const uint32_t a = b.source(from, type);
    b.emit(copy_of(bytes), {b.destination(to, bytes), a});
    return;
  }
  if (packs == unpacks) throw Error("has two vectors");
  const auto& parts = (packs ? from : to).parts;
  const int piece = bytes / static_cast<int>(parts.size());
  Op op;
  op.r[0] = packs ? b.destination(to, bytes) : b.source(from, bytes);
  for (size_t e = 0; e < parts.size(); ++e)
    op.r[1 + e] = packs ? b.source(parts[e], piece) : b.destination(parts[e], piece);
  Op& emitted = b.emit(packs ? pieces<true> : pieces<false>);
  std::copy(op.r, op.r + 16, emitted.r);
  emitted.count = static_cast<uint8_t>(parts.size());
  emitted.imm = piece;
}

void decode_compare(Builder& b, Statement& in) {
  const auto how = in.take_one({"lt", "le", "gt", "ge", "eq", "ne", "lo", "ls", "hi", "hs", "ltu", "leu",
                                "gtu", "geu", "equ", "neu", "num", "nan"});
  const auto with = in.take_one({"and", "or", "xor"});
  const Type type = in.type();
  // setp.lt.s32 p|q, a, b, c: the second result and c are optional
  const size_t results = in.operands.size() - (with.empty() ? 2 : 3);
  if (results != 1 && results != 2) throw Error("has another number of operands");
  Run run = nullptr;
  if (how == "ne" && is_float(type))
    run = comparison_named(how, type);
  else if (how == "ne")
    run = comparison(type, [](auto p, auto q) { return p != q; });
  else
    run = comparison_named(how, type);
  const uint32_t x = b.source(in.operand(results), type), y = b.source(in.operand(results + 1), type);
  const uint32_t c = with.empty() ? b.constant(0, 4) : predicate(b, in.operand(results + 2));
  const uint32_t first = predicate_result(b, in.operand(0));
  const uint32_t second = results == 2 ? predicate_result(b, in.operand(1)) : b.new_register(1);
  Op& op = b.emit(run, {first, second, x, y, c});
  op.imm = with.empty() ? 0 : with == "and" ? 1 : with == "or" ? 2 : 3;
}
void decode_select(Builder& b, Statement& in) {
  const Type type = in.type();
  const int bytes = bytes_of(type);
  const uint32_t x = b.source(in.operand(1), type), y = b.source(in.operand(2), type),
                 p = predicate(b, in.operand(3));
  b.emit(bytes == 2   ? select<uint16_t>
         : bytes == 4 ? select<uint32_t>
                      : select<uint64_t>,
         {b.destination(in.operand(0), bytes), x, y, p});
}

}  // namespace

void decode_predicates(Builder& b, Statement& in) {
  const uint32_t x = predicate(b, in.operand(1));
  const uint32_t y = in.name == "not" ? x : predicate(b, in.operand(2)),
                 to = predicate_result(b, in.operand(0));
  Run run = nullptr;
  if (in.name == "not") run = of_predicates<decltype([](uint32_t p, uint32_t) { return ~p; })>;
  if (in.name == "and") run = of_predicates<decltype([](uint32_t p, uint32_t q) { return p & q; })>;
  if (in.name == "or") run = of_predicates<decltype([](uint32_t p, uint32_t q) { return p | q; })>;
  if (in.name == "xor") run = of_predicates<decltype([](uint32_t p, uint32_t q) { return p ^ q; })>;
  if (run == nullptr) throw Error("is unknown for predicates");
  b.emit(run, {to, x, y});
}

bool decode_choice(Builder& b, Statement& in) {
  if (in.name == "setp")
    decode_compare(b, in);
  else if (in.name == "selp")
    decode_select(b, in);
  else if (in.name == "mov")
    decode_move(b, in);
  else
    return false;
  return true;
}

}  // namespace ptx
