// Bit fields, permutations of bytes, logic of three operands.
#include <algorithm>

#include "ptx/lanes.h"

namespace ptx {
namespace {

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

void decode_field(Builder& b, Statement& in) {
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

}  // namespace

bool decode_bits(Builder& b, Statement& in) {
  for (const char* name : {"bfe", "bfi", "prmt", "lop3", "shf"})
    if (in.name == name) {
      decode_field(b, in);
      return true;
    }
  return false;
}

}  // namespace ptx
