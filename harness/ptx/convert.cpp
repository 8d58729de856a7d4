// cvt, with its rounding modes, and changes of address space.
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "ptx/builder.h"
#include "ptx/machine.h"
#include "ptx/numbers.h"

namespace ptx {

// ---- Numbers of 16 and 19 bits, by their definition

double round_to(double value, Format format, Rounding rounding) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), format.least_exponent);
  const double unit = std::ldexp(1.0, exponent - format.digits + 1);
  const double scaled = value / unit;  // exact: a power of two
  double whole = 0;
  switch (rounding) {
    case Rounding::nearest:
      whole = std::nearbyint(scaled);
      break;  // ties to even
    case Rounding::away:
      whole = std::round(scaled);
      break;
    case Rounding::zero:
      whole = std::trunc(scaled);
      break;
    case Rounding::down:
      whole = std::floor(scaled);
      break;
    case Rounding::up:
      whole = std::ceil(scaled);
      break;
  }
  const double result = whole * unit,
               largest = (2 - std::ldexp(1.0, 1 - format.digits)) * std::ldexp(1.0, format.most_exponent);
  if (std::fabs(result) <= largest) return result;
  const bool to_zero = rounding == Rounding::zero || rounding == (value > 0 ? Rounding::down : Rounding::up);
  return std::copysign(to_zero ? largest : std::numeric_limits<double>::infinity(), value);
}

uint16_t bits_of_half(double value) {
  const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
  value = std::fabs(value);
  if (std::isnan(value)) return 0x7FFF;
  if (std::isinf(value)) return sign | 0x7C00;
  if (value < 0x1p-14) return static_cast<uint16_t>(sign | static_cast<int>(value * 0x1p24));
  const int exponent = std::ilogb(value);
  return static_cast<uint16_t>(sign |
                               ((exponent + 14) * 1024 + static_cast<int>(std::ldexp(value, 10 - exponent))));
  // the leading 1 adds one to the exponent
}

uint16_t bits_of_bfloat16(double value) {
  if (std::isnan(value)) return 0x7FFF;
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(value)) >> 16);
}

float half_of_bits(uint16_t bits) {
  static const auto* const kTable = [] {
    auto* const table = new float[65536];
    for (int i = 0; i < 65536; ++i) {
      const int exponent = i >> 10 & 31, mantissa = i & 1023;
      const float value = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
      table[i] = i & 0x8000 ? -value : value;
    }
    return table;
  }();
  return kTable[bits];
}

namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};
struct Tf32 {
  uint32_t bits;
};

double value_of(Half x) { return half_of_bits(x.bits); }
double value_of(Bfloat16 x) { return bfloat16_of_bits(x.bits); }
double value_of(Tf32 x) { return std::bit_cast<float>(x.bits); }
template <typename T>
T value_of(T x) {
  return x;
}

double round_whole(double value, Rounding rounding) {
  switch (rounding) {
    case Rounding::nearest:
      return std::nearbyint(value);
    case Rounding::zero:
      return std::trunc(value);
    case Rounding::down:
      return std::floor(value);
    case Rounding::up:
      return std::ceil(value);
    default:
      return std::round(value);
  }
}

constexpr bool is_small(auto x) {
  using T = decltype(x);
  return std::is_same_v<T, Half> || std::is_same_v<T, Bfloat16> || std::is_same_v<T, Tf32>;
}

// To D; of what is no D the nearest that is, and 0 of NaN where D is an integer.
template <typename D, typename S>
D converted(S from, Rounding rounding) {
  if constexpr (std::is_same_v<D, Half>) {
    return {bits_of_half(round_to(static_cast<double>(value_of(from)), kHalf, rounding))};
  } else if constexpr (std::is_same_v<D, Bfloat16>) {
    return {bits_of_bfloat16(round_to(static_cast<double>(value_of(from)), kBfloat16, rounding))};
  } else if constexpr (std::is_same_v<D, Tf32>) {
    return {std::bit_cast<uint32_t>(
        static_cast<float>(round_to(static_cast<double>(value_of(from)), kTf32, rounding)))};
  } else if constexpr (is_small(S{})) {
    return converted<D>(value_of(from), rounding);
  } else if constexpr (std::is_floating_point_v<D>) {
    if (rounding == Rounding::nearest || sizeof(D) > sizeof(S)) {
      return static_cast<D>(from);
    }
    if constexpr (std::is_integral_v<S>) {
      const int before = std::fegetround();
      std::fesetround(rounding == Rounding::zero ? FE_TOWARDZERO
                      : rounding == Rounding::up ? FE_UPWARD
                                                 : FE_DOWNWARD);
      volatile S same = from;
      volatile D result = static_cast<D>(same);
      std::fesetround(before);
      return result;
    } else {
      return static_cast<D>(round_to(static_cast<double>(from), kFloat, rounding));
    }
  } else if constexpr (std::is_floating_point_v<S>) {
    const double whole = round_whole(static_cast<double>(from), rounding);
    if (std::isnan(whole)) return 0;
    const auto least = static_cast<double>(std::numeric_limits<D>::min()),
               most = static_cast<double>(std::numeric_limits<D>::max());
    return whole <= least  ? std::numeric_limits<D>::min()
           : whole >= most ? std::numeric_limits<D>::max()
                           : static_cast<D>(whole);
  } else {
    return static_cast<D>(from);
  }
}

// op.imm: the rounding; op.count: whether relu comes first
template <typename D, typename S>
void convert(Warp& warp, const Op& op, uint32_t mask) {
  D* const d = warp.lanes<D>(op.r[0]);
  const S* const a = warp.lanes<S>(op.r[1]);
  const auto rounding = static_cast<Rounding>(op.imm);
  for_lanes(mask, [&](int i) {
    if constexpr (is_small(D{})) {
      const auto value = static_cast<double>(value_of(a[i]));
      d[i] = converted<D>(op.count != 0 && value < 0 ? 0.0 : value, rounding);
    } else {
      d[i] = converted<D>(a[i], rounding);
    }
  });
}

// Two floats into one register: the first is the upper half.
template <typename D>
void convert_pair(Warp& warp, const Op& op, uint32_t mask) {
  auto* const d = warp.lanes<uint32_t>(op.r[0]);
  const float *const high = warp.lanes<float>(op.r[1]), *const low = warp.lanes<float>(op.r[2]);
  const auto one = [&](float x) {
    return static_cast<uint32_t>(
        converted<D>(op.count != 0 && x < 0 ? 0.0f : x, static_cast<Rounding>(op.imm)).bits);
  };
  for_lanes(mask, [&](int i) { d[i] = one(high[i]) << 16 | one(low[i]); });
}

template <typename T>
void round_in_place(Warp& warp, const Op& op, uint32_t mask) {
  T* const d = warp.lanes<T>(op.r[0]);
  const T* const a = warp.lanes<T>(op.r[1]);
  for_lanes(mask, [&](int i) { d[i] = static_cast<T>(round_whole(a[i], static_cast<Rounding>(op.imm))); });
}

template <typename Body>
Run with_type(Type type, const Body& body) {
  switch (type) {
    case Type::u8:
      return body(uint8_t{});
    case Type::u16:
      return body(uint16_t{});
    case Type::u32:
      return body(uint32_t{});
    case Type::u64:
      return body(uint64_t{});
    case Type::s8:
      return body(int8_t{});
    case Type::s16:
      return body(int16_t{});
    case Type::s32:
      return body(int32_t{});
    case Type::s64:
      return body(int64_t{});
    case Type::f16:
      return body(Half{});
    case Type::bf16:
      return body(Bfloat16{});
    case Type::f32:
      return body(float{});
    case Type::f64:
      return body(double{});
    case Type::tf32:
      return body(Tf32{});
    default:
      throw Error("is unknown for its types");
  }
}

void decode_cvt(Builder& b, Statement& in) {
  const auto name = in.take_one({"rn", "rna", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"});
  const Rounding rounding = name.empty() || name == "rn" || name == "rni" ? Rounding::nearest
                            : name == "rna"                               ? Rounding::away
                            : name == "rz" || name == "rzi"               ? Rounding::zero
                            : name == "rm" || name == "rmi"               ? Rounding::down
                                                                          : Rounding::up;
  const bool relu = in.take("relu");
  const Type to = in.type(), from = in.type();
  const auto finish = [&](Op& op) {
    op.imm = static_cast<int64_t>(rounding);
    op.count = relu;
  };
  if (to == Type::f16x2 || to == Type::bf16x2) {
    if (from != Type::f32 || (name != "rn" && name != "rz")) throw Error("is unknown for its types");
    const uint32_t high = b.source(in.operand(1), from), low = b.source(in.operand(2), from);
    const Run run = to == Type::f16x2 ? convert_pair<Half> : convert_pair<Bfloat16>;
    finish(b.emit(run, {b.destination(in.operand(0), 4), high, low}));
    return;
  }
  const auto is_floating = [](Type t) { return t >= Type::f16; };
  const bool whole = name.size() == 3 && name != "rna";
  const bool small = to == Type::f16 || to == Type::bf16 || to == Type::tf32;
  if (is_floating(from) && !is_floating(to) && !whole) throw Error("does not say how it rounds");
  if (relu && !small) throw Error("is unknown for its types");
  if (name.empty() && is_floating(to) && (bytes_of(to) < bytes_of(from) || small || !is_floating(from)))
    throw Error("does not say how it rounds");
  Run run = nullptr;
  if (whole && is_floating(from) && is_floating(to)) {
    if (to != from || (to != Type::f32 && to != Type::f64)) throw Error("is unknown for its types");
    run = to == Type::f32 ? round_in_place<float> : round_in_place<double>;
  } else {
    run = with_type(to, [&](auto d) -> Run {
      return with_type(from, [&](auto s) -> Run {
        if constexpr (std::is_same_v<decltype(s), Tf32>)
          throw Error("is unknown for its types");
        else
          return convert<decltype(d), decltype(s)>;
      });
    });
  }
  const uint32_t a = b.source(in.operand(1), bytes_of(from));
  finish(b.emit(run, {b.destination(in.operand(0), bytes_of(to), to >= Type::s8 && to <= Type::s64), a}));
}

// ---- Addresses in generic space

template <bool kToGeneric>
void convert_address(Warp& warp, const Op& op, uint32_t mask) {
  auto* const d = warp.lanes<uint64_t>(op.r[0]);
  const auto* const a = warp.lanes<uint64_t>(op.r[1]);
  const uint64_t window = op.space == Space::shared  ? kSharedWindow
                          : op.space == Space::local ? kLocalWindow
                                                     : 0;
  for_lanes(mask, [&](int i) { d[i] = kToGeneric ? a[i] + window : a[i] - window; });
}

void decode_cvta(Builder& b, Statement& in) {
  const bool to = in.take("to");
  const auto space = in.take_one({"global", "shared", "local"});
  if (space.empty() || in.type() != Type::u64) throw Error("is unknown");
  const uint32_t a = b.source(in.operand(1), 8);
  b.emit(to ? convert_address<false> : convert_address<true>, {b.destination(in.operand(0), 8), a}).space =
      space == "global"   ? Space::global
      : space == "shared" ? Space::shared
                          : Space::local;
}

}  // namespace

Run resize(int from_bytes, int to_bytes, bool sign) {
  constexpr Type kSigned[] = {Type::s8, Type::s16, Type::s32, Type::s64},
                 kUnsigned[] = {Type::u8, Type::u16, Type::u32, Type::u64};
  const auto type = [&](int bytes) {
    return (sign ? kSigned : kUnsigned)[std::countr_zero(static_cast<unsigned>(bytes))];
  };
  return with_type(type(to_bytes), [&](auto d) -> Run {
    return with_type(type(from_bytes), [&](auto s) -> Run { return convert<decltype(d), decltype(s)>; });
  });
}

bool decode_convert(Builder& b, Statement& in) {
  if (in.name == "cvt")
    decode_cvt(b, in);
  else if (in.name == "cvta")
    decode_cvta(b, in);
  else
    return false;
  return true;
}

}  // namespace ptx
