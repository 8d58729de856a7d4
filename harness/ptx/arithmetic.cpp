// Integers and floating point: sums, products, quotients, roots, shifts.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "ptx/lanes.h"

namespace ptx {
namespace {

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
  if (type == Type::pred) return decode_predicates(b, in);
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
  if (type == Type::pred) return decode_predicates(b, in);
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

}  // namespace

bool decode_arithmetic(Builder& b, Statement& in) {
  static const std::initializer_list<const char*> kTwo{"add", "sub", "div", "rem", "min", "max",
                                                       "and", "or",  "xor", "shl", "shr", "copysign"};
  static const std::initializer_list<const char*> kOne{"neg",   "abs",  "not", "rcp", "sqrt",
                                                       "rsqrt", "popc", "clz", "brev"};
  const auto is_in = [&](const auto& names) {
    return std::find(names.begin(), names.end(), in.name) != names.end();
  };
  if (is_in(kTwo)) {
    decode_two(b, in);
  } else if (is_in(kOne)) {
    decode_one(b, in);
  } else if (in.name == "mul" || in.name == "mad" || in.name == "fma") {
    decode_multiply(b, in, in.name != "mul");
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx
