// Integers, floating point, comparisons and moves: one lane like the other.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "ptx/builder.h"
#include "ptx/machine.h"

namespace ptx {
namespace {

template <typename R, typename A, typename F>
void unary(Warp& warp, const Op& op, uint32_t mask) {
  R* const d = warp.lanes<R>(op.r[0]);
  const A* const a = warp.lanes<A>(op.r[1]);
  for_lanes(mask, [&](int i) { d[i] = static_cast<R>(F{}(a[i])); });
}

template <typename R, typename A, typename B, typename F>
void binary(Warp& warp, const Op& op, uint32_t mask) {
  R* const d = warp.lanes<R>(op.r[0]);
  const A* const a = warp.lanes<A>(op.r[1]);
  const B* const b = warp.lanes<B>(op.r[2]);
  for_lanes(mask, [&](int i) { d[i] = static_cast<R>(F{}(a[i], b[i])); });
}

template <typename R, typename A, typename B, typename C, typename F>
void ternary(Warp& warp, const Op& op, uint32_t mask) {
  R* const d = warp.lanes<R>(op.r[0]);
  const A* const a = warp.lanes<A>(op.r[1]);
  const B* const b = warp.lanes<B>(op.r[2]);
  const C* const c = warp.lanes<C>(op.r[3]);
  for_lanes(mask, [&](int i) { d[i] = static_cast<R>(F{}(a[i], b[i], c[i])); });
}

// Calls body with a value of the type; others are unknown instructions.
template <typename Body>
Run for_integers(Type type, const Body& body) {
  switch (type) {
    case Type::u16:
      return body(uint16_t{});
    case Type::u32:
      return body(uint32_t{});
    case Type::u64:
      return body(uint64_t{});
    case Type::s16:
      return body(int16_t{});
    case Type::s32:
      return body(int32_t{});
    case Type::s64:
      return body(int64_t{});
    default:
      throw Error("is unknown for its type");
  }
}

template <typename Body>
Run for_floats(Type type, const Body& body) {
  if (type == Type::f32) return body(float{});
  if (type == Type::f64) return body(double{});
  throw Error("is unknown for its type");
}

bool is_float(Type type) { return type == Type::f32 || type == Type::f64; }

template <typename Body>
Run for_numbers(Type type, const Body& body) {
  return is_float(type) ? for_floats(type, body) : for_integers(type, body);
}

template <typename F>
Run unary_of_numbers(Type type, F) {
  return for_numbers(type, [](auto t) -> Run { return unary<decltype(t), decltype(t), F>; });
}
template <typename F>
Run unary_of_floats(Type type, F) {
  return for_floats(type, [](auto t) -> Run { return unary<decltype(t), decltype(t), F>; });
}
template <typename F>
Run binary_of_numbers(Type type, F) {
  return for_numbers(type, [](auto t) -> Run { return binary<decltype(t), decltype(t), decltype(t), F>; });
}
template <typename F>
Run binary_of_integers(Type type, F) {
  return for_integers(type, [](auto t) -> Run { return binary<decltype(t), decltype(t), decltype(t), F>; });
}

// Integers wrap around: signed arithmetic is done on unsigned numbers.
template <typename T>
auto wrapped(T value) {
  if constexpr (std::is_floating_point_v<T>)
    return value;
  else
    return static_cast<uint64_t>(value);
}

template <typename T>
T divided(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return a / b;
  else if (b == 0)
    return static_cast<T>(-1);
  else if (std::is_signed_v<T> && static_cast<int64_t>(b) == -1)
    return static_cast<T>(0 - wrapped(a));
  else
    return static_cast<T>(a / b);
}

template <typename T>
T remainder_of(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && static_cast<int64_t>(b) == -1) return 0;
  return static_cast<T>(a % b);
}

// The smaller, or larger, of numbers; of a number and NaN the number.
struct Least {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return std::isnan(a) ? b : std::isnan(b) ? a : a == b ? (std::signbit(a) ? a : b) : std::min(a, b);
    else
      return std::min(a, b);
  }
};
struct Most {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return std::isnan(a) ? b : std::isnan(b) ? a : a == b ? (std::signbit(a) ? b : a) : std::max(a, b);
    else
      return std::max(a, b);
  }
};
template <typename F>
struct OrNaN {
  template <typename T>
  T operator()(T a, T b) const {
    return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : F{}(a, b);
  }
};

template <typename T, bool kLeft>
T shifted(T a, uint32_t by) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  if constexpr (kLeft)
    return by >= kBits ? T(0) : static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << by);
  else
    return by >= kBits ? static_cast<T>(std::is_signed_v<T> && a < 0 ? -1 : 0) : static_cast<T>(a >> by);
}

template <typename T>
using Wide = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;

template <typename T>
T high(T a, T b) {
  if constexpr (sizeof(T) == 8)
    return static_cast<T>(
        (static_cast<std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>(a) * b) >> 64);
  else
    return static_cast<T>((static_cast<Wide<T>>(a) * b) >> 8 * sizeof(T));
}

uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t all = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> 4 * i & 15;
    auto byte = static_cast<uint32_t>(all >> 8 * (which & 7) & 0xFF);
    if (which & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << 8 * i;
  }
  return result;
}

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

// ---- Which is which

void decode_multiply(Builder& b, Statement& in, bool adds) {
  const auto part = in.take_one({"lo", "hi", "wide"});
  in.take("rn");
  const Type type = in.type();
  const bool wide = part == "wide";
  const int bytes = bytes_of(type), result = wide ? 2 * bytes : bytes;
  const uint32_t x = b.source(in.operand(1), type), y = b.source(in.operand(2), type);
  const uint32_t z = adds ? b.source(in.operand(3), is_float(type) ? bytes : result) : x;
  const uint32_t to = b.destination(in.operand(0), result);
  Run run;
  if (is_float(type)) {
    run = adds ? for_floats(
                     type,
                     [](auto t) -> Run {
                       using T = decltype(t);
                       return ternary<T, T, T, T, decltype([](T p, T q, T r) { return std::fma(p, q, r); })>;
                     })
               : binary_of_numbers(type, [](auto p, auto q) { return p * q; });
  } else if (wide) {
    run = for_integers(type, [&](auto t) -> Run {
      using T = decltype(t);
      using W = Wide<T>;
      using U = std::make_unsigned_t<W>;
      if (adds)
        return ternary<W, T, T, W, decltype([](T p, T q, W r) {
                         return static_cast<W>(static_cast<U>(static_cast<W>(p)) *
                                                   static_cast<U>(static_cast<W>(q)) +
                                               static_cast<U>(r));
                       })>;
      return binary<W, T, T, decltype([](T p, T q) {
                      return static_cast<W>(static_cast<U>(static_cast<W>(p)) *
                                            static_cast<U>(static_cast<W>(q)));
                    })>;
    });
  } else if (part == "hi") {
    run = for_integers(type, [&](auto t) -> Run {
      using T = decltype(t);
      if (adds)
        return ternary<T, T, T, T, decltype([](T p, T q, T r) { return wrapped(high(p, q)) + wrapped(r); })>;
      return binary<T, T, T, decltype([](T p, T q) { return high(p, q); })>;
    });
  } else {
    if (part.empty()) throw Error("does not say which half");
    run = for_integers(type, [&](auto t) -> Run {
      using T = decltype(t);
      if (adds)
        return ternary<T, T, T, T,
                       decltype([](T p, T q, T r) { return wrapped(p) * wrapped(q) + wrapped(r); })>;
      return binary<T, T, T, decltype([](T p, T q) { return wrapped(p) * wrapped(q); })>;
    });
  }
  b.emit(run, {to, x, y, z});
}

Run shift_run(const std::string& name, Type type) {
  return for_integers(type, [&](auto t) -> Run {
    using T = decltype(t);
    if (name == "shl")
      return binary<T, T, uint32_t, decltype([](T p, uint32_t q) { return shifted<T, true>(p, q); })>;
    return binary<T, T, uint32_t, decltype([](T p, uint32_t q) { return shifted<T, false>(p, q); })>;
  });
}

void decode_two(Builder& b, Statement& in) {
  const std::string& name = in.name;
  in.take("rn");
  const bool nan = in.take("NaN");
  if (name == "div" && in.take("approx")) throw Error("is unknown: only exact division");
  const Type type = in.type();
  if (type == Type::pred) {
    const uint32_t x = predicate(b, in.operand(1)), y = predicate(b, in.operand(2)),
                   to = predicate_result(b, in.operand(0));
    if (name == "and")
      b.emit(of_predicates<decltype([](uint32_t p, uint32_t q) { return p & q; })>, {to, x, y});
    else if (name == "or")
      b.emit(of_predicates<decltype([](uint32_t p, uint32_t q) { return p | q; })>, {to, x, y});
    else if (name == "xor")
      b.emit(of_predicates<decltype([](uint32_t p, uint32_t q) { return p ^ q; })>, {to, x, y});
    else
      throw Error("is unknown for predicates");
    return;
  }
  const uint32_t x = b.source(in.operand(1), type);
  const bool shifts = name == "shl" || name == "shr";
  const uint32_t y = shifts ? b.source(in.operand(2), 4) : b.source(in.operand(2), type);
  const uint32_t to = b.destination(in.operand(0), bytes_of(type));
  Run run = nullptr;
  if (shifts)
    run = shift_run(name, type);
  else if (name == "add")
    run = binary_of_numbers(type, [](auto p, auto q) { return wrapped(p) + wrapped(q); });
  else if (name == "sub")
    run = binary_of_numbers(type, [](auto p, auto q) { return wrapped(p) - wrapped(q); });
  else if (name == "div")
    run = binary_of_numbers(type, [](auto p, auto q) { return divided(p, q); });
  else if (name == "rem")
    run = binary_of_integers(type, [](auto p, auto q) { return remainder_of(p, q); });
  else if (name == "min" && nan)
    run = for_floats(type, [](auto t) -> Run {
      using T = decltype(t);
      return binary<T, T, T, OrNaN<Least>>;
    });
  else if (name == "max" && nan)
    run = for_floats(type, [](auto t) -> Run {
      using T = decltype(t);
      return binary<T, T, T, OrNaN<Most>>;
    });
  else if (name == "min")
    run = binary_of_numbers(type, Least{});
  else if (name == "max")
    run = binary_of_numbers(type, Most{});
  else if (name == "and")
    run = binary_of_integers(type, [](auto p, auto q) { return p & q; });
  else if (name == "or")
    run = binary_of_integers(type, [](auto p, auto q) { return p | q; });
  else if (name == "xor")
    run = binary_of_integers(type, [](auto p, auto q) { return p ^ q; });
  else if (name == "copysign")
    run = for_floats(type, [](auto t) -> Run {
      using T = decltype(t);
      return binary<T, T, T, decltype([](T p, T q) { return std::copysign(q, p); })>;
    });
  b.emit(run, {to, x, y});
}

void decode_one(Builder& b, Statement& in) {
  const std::string& name = in.name;
  in.take("rn");
  const bool approximate = in.take("approx");
  if (approximate != (name == "rsqrt")) throw Error("is unknown: only exact roots and reciprocals");
  const Type type = in.type();
  if (type == Type::pred) {
    const uint32_t x = predicate(b, in.operand(1));
    if (name != "not") throw Error("is unknown for predicates");
    b.emit(of_predicates<decltype([](uint32_t p, uint32_t) { return ~p; })>,
           {predicate_result(b, in.operand(0)), x, x});
    return;
  }
  const uint32_t x = b.source(in.operand(1), type);
  const int bytes = name == "popc" || name == "clz" || name == "bfind" ? 4 : bytes_of(type);
  const uint32_t to = b.destination(in.operand(0), bytes);
  Run run = nullptr;
  if (name == "neg")
    run = unary_of_numbers(type, [](auto p) {
      if constexpr (std::is_floating_point_v<decltype(p)>)
        return -p;
      else
        return 0 - wrapped(p);
    });
  else if (name == "abs")
    run = unary_of_numbers(type, [](auto p) {
      if constexpr (std::is_floating_point_v<decltype(p)>)
        return std::fabs(p);
      else
        return p < 0 ? 0 - wrapped(p) : wrapped(p);
    });
  else if (name == "not")
    run = for_integers(type, [](auto t) -> Run {
      using T = decltype(t);
      return unary<T, T, decltype([](T p) { return ~p; })>;
    });
  else if (name == "rcp")
    run = unary_of_floats(type, [](auto p) { return 1 / p; });
  else if (name == "sqrt")
    run = unary_of_floats(type, [](auto p) { return std::sqrt(p); });
  else if (name == "rsqrt")
    run = unary_of_floats(type, [](auto p) { return 1 / std::sqrt(p); });
  else if (name == "popc" || name == "clz" || name == "brev") {
    run = for_integers(type, [&](auto t) -> Run {
      using U = std::make_unsigned_t<decltype(t)>;
      if (name == "popc") return unary<uint32_t, U, decltype([](U p) { return std::popcount(p); })>;
      if (name == "clz") return unary<uint32_t, U, decltype([](U p) { return std::countl_zero(p); })>;
      return unary<U, U, decltype([](U p) {
                     U r = 0;
                     for (unsigned i = 0; i < 8 * sizeof(U); ++i)
                       r = static_cast<U>(r | (p >> i & 1) << (8 * sizeof(U) - 1 - i));
                     return r;
                   })>;
    });
  }
  b.emit(run, {to, x});
}

// Bits of a: `count` of them from `first` on, with the sign where there is one.
template <typename T>
T field(T a, uint32_t first, uint32_t count) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  first &= 0xFF;
  count &= 0xFF;
  T result = 0;
  const uint32_t sign_at = std::min(first + count - 1, kBits - 1);
  const bool sign = std::is_signed_v<T> && count > 0 && (a >> sign_at & 1);
  for (uint32_t i = 0; i < kBits; ++i) {
    const bool bit = i < count && first + i < kBits ? (a >> (first + i) & 1) : sign;
    result = static_cast<T>(result | static_cast<T>(static_cast<T>(bit) << i));
  }
  return result;
}

template <typename T>
void insert(Warp& warp, const Op& op,
            uint32_t mask) {  // [0] result, [1] bits, [2] into, [3] first, [4] count
  T* const d = warp.lanes<T>(op.r[0]);
  const T *const a = warp.lanes<T>(op.r[1]), *const b = warp.lanes<T>(op.r[2]);
  const auto *const c = warp.lanes<uint32_t>(op.r[3]), *const e = warp.lanes<uint32_t>(op.r[4]);
  for_lanes(mask, [&](int i) {
    T result = b[i];
    const uint32_t first = c[i] & 0xFF, count = e[i] & 0xFF;
    for (uint32_t k = 0; k < count && first + k < 8 * sizeof(T); ++k)
      result = (result & ~(T{1} << (first + k))) | (a[i] >> k & 1) << (first + k);
    d[i] = result;
  });
}

void logic(Warp& warp, const Op& op, uint32_t mask) {  // lop3: imm is the table
  auto* const d = warp.lanes<uint32_t>(op.r[0]);
  const uint32_t *const a = warp.lanes<uint32_t>(op.r[1]), *const b = warp.lanes<uint32_t>(op.r[2]),
                        *const c = warp.lanes<uint32_t>(op.r[3]);
  for_lanes(mask, [&](int i) {
    uint32_t result = 0;
    for (int row = 0; row < 8; ++row)
      if (op.imm >> row & 1)
        result |= (row & 4 ? a[i] : ~a[i]) & (row & 2 ? b[i] : ~b[i]) & (row & 1 ? c[i] : ~c[i]);
    d[i] = result;
  });
}

template <bool kLeft, bool kWraps>
uint32_t funnel(uint32_t a, uint32_t b, uint32_t c) {
  const uint32_t by = kWraps ? c & 31 : std::min(c, 32u);
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  return static_cast<uint32_t>(kLeft ? (by == 0 ? both : both << by) >> 32 : both >> by);
}

void decode_bits(Builder& b, Statement& in) {
  const std::string& name = in.name;
  const bool left = in.take("l"), wraps = in.take("wrap");
  in.ignore({"r", "clamp"});
  const Type type = in.type();
  const uint32_t x = b.source(in.operand(1), type);
  if (name == "bfi") {
    const uint32_t y = b.source(in.operand(2), type), z = b.source(in.operand(3), 4),
                   w = b.source(in.operand(4), 4);
    b.emit(bytes_of(type) == 4 ? insert<uint32_t> : insert<uint64_t>,
           {b.destination(in.operand(0), bytes_of(type)), x, y, z, w});
    return;
  }
  const uint32_t y = b.source(in.operand(2), 4), z = b.source(in.operand(3), 4);
  const uint32_t to = b.destination(in.operand(0), bytes_of(type));
  using U = uint32_t;
  Run run = nullptr;
  if (name == "bfe")
    run = for_integers(type, [](auto t) -> Run {
      using T = decltype(t);
      return ternary<T, T, U, U, decltype([](T p, U q, U r) { return field(p, q, r); })>;
    });
  else if (name == "prmt")
    run = ternary<U, U, U, U, decltype([](U p, U q, U r) { return permuted(p, q, r); })>;
  else if (name == "lop3")
    run = logic;
  else if (left)
    run = wraps ? ternary<U, U, U, U, decltype([](U p, U q, U r) { return funnel<true, true>(p, q, r); })>
                : ternary<U, U, U, U, decltype([](U p, U q, U r) { return funnel<true, false>(p, q, r); })>;
  else
    run = wraps ? ternary<U, U, U, U, decltype([](U p, U q, U r) { return funnel<false, true>(p, q, r); })>
                : ternary<U, U, U, U, decltype([](U p, U q, U r) { return funnel<false, false>(p, q, r); })>;
  Op& op = b.emit(run, {to, x, y, z});
  if (name == "lop3") op.imm = static_cast<int64_t>(in.operand(4).number);
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

}  // namespace

bool decode_arithmetic(Builder& b, Statement& in) {
  static const std::initializer_list<const char*> kTwo{"add", "sub", "div", "rem", "min", "max",
                                                       "and", "or",  "xor", "shl", "shr", "copysign"};
  static const std::initializer_list<const char*> kOne{"neg",   "abs",  "not", "rcp", "sqrt",
                                                       "rsqrt", "popc", "clz", "brev"};
  static const std::initializer_list<const char*> kBits{"bfe", "bfi", "prmt", "lop3", "shf"};
  const auto is_in = [&](const auto& names) {
    return std::find(names.begin(), names.end(), in.name) != names.end();
  };
  if (is_in(kTwo)) {
    decode_two(b, in);
  } else if (is_in(kOne)) {
    decode_one(b, in);
  } else if (is_in(kBits)) {
    decode_bits(b, in);
  } else if (in.name == "mul" || in.name == "mad" || in.name == "fma") {
    decode_multiply(b, in, in.name != "mul");
  } else if (in.name == "setp") {
    decode_compare(b, in);
  } else if (in.name == "selp") {
    const Type type = in.type();
    const int bytes = bytes_of(type);
    const uint32_t x = b.source(in.operand(1), type), y = b.source(in.operand(2), type),
                   p = predicate(b, in.operand(3));
    b.emit(bytes == 2   ? select<uint16_t>
           : bytes == 4 ? select<uint32_t>
                        : select<uint64_t>,
           {b.destination(in.operand(0), bytes), x, y, p});
  } else if (in.name == "mov") {
    decode_move(b, in);
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx
