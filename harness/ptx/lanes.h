// Operations that do the same in every lane, made of a function of one lane's numbers.
#pragma once

#include <type_traits>

#include "ptx/builder.h"
#include "ptx/machine.h"

namespace ptx {

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

inline bool is_float(Type type) { return type == Type::f32 || type == Type::f64; }

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

}  // namespace ptx
