// Instructions of a whole warp: barriers, shuffles, votes, matrix fragments. Fragments are laid out as the
// PTX ISA manual has them ("Warp Level Matrix Instructions"), written down from there and not from the
// kernels.
#include <algorithm>

#include "ptx/builder.h"
#include "ptx/machine.h"
#include "ptx/numbers.h"

namespace ptx {
namespace {

// ---- Barriers

void barrier(Warp& warp, const Op& op, uint32_t) {
  warp.barrier = static_cast<int>(op.r[2]);
  warp.expected = static_cast<int>(op.r[3]);
  warp.arrived = op.imm == 0 ? 0 : warp.predicate(op.r[1]) & warp.live;
}

uint32_t number(const Operand& operand) {
  if (operand.kind != Operand::Kind::number) throw Error("has no number where " + operand.text + " is");
  return static_cast<uint32_t>(operand.number);
}

void decode_barrier(Builder& b, Statement& in) {
  in.ignore({"cta", "aligned"});
  if (in.take("warp")) {
    if (!in.take("sync")) throw Error("is unknown");
    Op& op = b.emit([](Warp& warp, const Op&, uint32_t) { ++warp.sync; });
    op.r[15] = b.source(in.operand(0), 4);
    op.flow = Flow::gather_of;
    return;
  }
  const bool reduces = in.take("red");
  if (!reduces && !in.take("sync")) throw Error("is unknown");
  const auto how = reduces ? in.take_one({"popc", "and", "or"}) : "";
  const size_t first = reduces ? 1 : 0;
  uint32_t result = 0, input = 0;
  if (reduces) {
    const bool counts = in.take_type() == Type::u32;
    if (counts != (how == "popc")) throw Error("is unknown");
    const Operand& last = in.operands.back();
    if (last.kind != Operand::Kind::reg || !last.reg.predicate || last.negated)
      throw Error("needs a predicate at the end");
    input = last.reg.at;
    result = counts ? b.destination(in.operand(0), 4) : in.operand(0).reg.at;
  }
  const size_t numbers = in.operands.size() - (reduces ? 2 : 0);
  Op& op = b.emit(
      barrier, {result, input, number(in.operand(first)), numbers > 1 ? number(in.operand(first + 1)) : 0});
  op.imm = how == "popc" ? 1 : how == "and" ? 2 : how == "or" ? 3 : 0;
  op.flow = Flow::barrier;
}

// ---- Shuffles: [0] result, [1] whether it is another lane's, [2] value, [3] b, [4] c, [15] mask

enum class Shuffle { up, down, bfly, idx };

template <Shuffle kHow>
void shuffle(Warp& warp, const Op& op, uint32_t mask) {
  const auto *const a = warp.lanes<uint32_t>(op.r[2]), *const b = warp.lanes<uint32_t>(op.r[3]),
                    *const c = warp.lanes<uint32_t>(op.r[4]);
  uint32_t result[32] = {}, valid = 0;
  for_lanes(mask, [&](int lane) {
    const uint32_t by = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const auto most = static_cast<int>((lane & segment) | (clamp & ~segment)),
               least = static_cast<int>(lane & segment);
    int from = 0;
    bool inside = false;
    if constexpr (kHow == Shuffle::up) inside = (from = lane - static_cast<int>(by)) >= most;
    if constexpr (kHow == Shuffle::down) inside = (from = lane + static_cast<int>(by)) <= most;
    if constexpr (kHow == Shuffle::bfly) inside = (from = lane ^ static_cast<int>(by)) <= most;
    if constexpr (kHow == Shuffle::idx) inside = (from = least | static_cast<int>(by & ~segment)) <= most;
    if (!inside) from = lane;
    if ((mask >> from & 1) == 0)
      warp.fail(op, lane, "takes a value from lane " + std::to_string(from) + ", which is not in the mask");
    result[lane] = a[from];
    valid |= static_cast<uint32_t>(inside) << lane;
  });
  auto* const d = warp.lanes<uint32_t>(op.r[0]);
  for_lanes(mask, [&](int i) { d[i] = result[i]; });
  uint32_t& p = warp.predicate(op.r[1]);
  p = (p & ~mask) | valid;
}

void decode_shuffle(Builder& b, Statement& in) {
  if (!in.take("sync")) throw Error("is unknown");
  const auto how = in.take_one({"up", "down", "bfly", "idx"});
  if (in.type() != Type::u32) throw Error("is unknown");
  const bool two = in.operands.size() == 6;
  const size_t first = two ? 2 : 1;
  const uint32_t value = b.source(in.operand(first), 4), by = b.source(in.operand(first + 1), 4);
  const uint32_t clamp = b.source(in.operand(first + 2), 4), mask = b.source(in.operand(first + 3), 4);
  const uint32_t valid = two && in.operand(1).reg.predicate ? in.operand(1).reg.at : b.new_register(1);
  const Run run = how == "up"     ? shuffle<Shuffle::up>
                  : how == "down" ? shuffle<Shuffle::down>
                  : how == "bfly" ? shuffle<Shuffle::bfly>
                                  : shuffle<Shuffle::idx>;
  Op& op = b.emit(run, {b.destination(in.operand(0), 4), valid, value, by, clamp});
  op.r[15] = mask;
  op.flow = Flow::gather_of;
}

// ---- Votes: [0] result, [1] predicate, imm: 0 ballot, 1 any, 2 all, 3 uni

void vote(Warp& warp, const Op& op, uint32_t mask) {
  const uint32_t input = warp.predicate(op.r[1]), here = (op.count != 0 ? ~input : input) & mask;
  if (op.imm == 0) {
    auto* const d = warp.lanes<uint32_t>(op.r[0]);
    for_lanes(mask, [&](int i) { d[i] = here; });
    return;
  }
  const bool result = op.imm == 1 ? here != 0 : op.imm == 2 ? here == mask : here == mask || here == 0;
  uint32_t& p = warp.predicate(op.r[0]);
  p = (p & ~mask) | (result ? mask : 0);
}

void decode_vote(Builder& b, Statement& in) {
  if (!in.take("sync")) throw Error("is unknown");
  const auto how = in.take_one({"ballot", "any", "all", "uni"});
  in.take_type();
  const Operand &to = in.operand(0), &from = in.operand(1);
  const bool constant = from.kind == Operand::Kind::number;
  if (!constant && !from.reg.predicate) throw Error("needs a predicate");
  const uint32_t input = constant ? b.constant(from.number != 0 ? ~0u : 0, 4) : from.reg.at;
  const uint32_t mask = b.source(in.operand(2), 4);
  Op& op = b.emit(vote, {how == "ballot" ? b.destination(to, 4) : to.reg.at, input});
  op.imm = how == "ballot" ? 0 : how == "any" ? 1 : how == "all" ? 2 : 3;
  op.count = from.negated;
  op.r[15] = mask;
  op.flow = Flow::gather_of;
}

// ---- ldmatrix: [0..3] results, [15] address. Eight lanes name the rows of each 8x8 matrix of 16 bits, of 16
// bytes each; lane l gets row l / 4, columns 2 * (l % 4) and the next, of the matrix or its transpose.

template <bool kTransposed>
void load_matrix(Warp& warp, const Op& op, uint32_t) {
  const auto* const address = warp.lanes<uint64_t>(op.r[15]);
  uint16_t rows[8][8];
  for (int m = 0; m < op.count; ++m) {
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * m + row;
      const uint8_t* const from = warp.memory(Space::shared, address[lane] + op.imm, 16, op, lane, false);
      std::memcpy(rows[row], from, 16);
    }
    auto* const d = warp.lanes<uint32_t>(op.r[m]);
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint16_t low = kTransposed ? rows[column][row] : rows[row][column];
      const uint16_t high = kTransposed ? rows[column + 1][row] : rows[row][column + 1];
      d[lane] = static_cast<uint32_t>(high) << 16 | low;
    }
  }
}

void decode_load_matrix(Builder& b, Statement& in) {
  const auto count = in.take_one({"x1", "x2", "x4"});
  const bool transposed = in.take("trans");
  if (!in.take("sync") || !in.take("aligned") || !in.take("m8n8") || !in.take("shared") ||
      in.type() != Type::u16 || count.empty())
    throw Error("is unknown");
  const Operand &to = in.operand(0), &from = in.operand(1);
  const auto& results = to.kind == Operand::Kind::vector ? to.parts : std::vector<Operand>{to};
  if (results.size() != static_cast<size_t>(count[1] - '0')) throw Error("has another number of results");
  const Operand& base = from.parts.at(0);
  Op op;
  op.r[15] = base.kind == Operand::Kind::symbol ? b.constant(b.symbol(base.text).second, 8)
             : base.reg.bytes == 8              ? base.reg.at
                                                : b.new_register(8);
  if (base.kind == Operand::Kind::reg && base.reg.bytes != 8)
    b.emit(resize(base.reg.bytes, 8, false), {op.r[15], base.reg.at});
  for (size_t m = 0; m < results.size(); ++m) op.r[m] = b.destination(results[m], 4);
  Op& emitted = b.emit(transposed ? load_matrix<true> : load_matrix<false>);
  std::copy(op.r, op.r + 16, emitted.r);
  emitted.imm = static_cast<int64_t>(from.number);
  emitted.count = static_cast<uint8_t>(results.size());
  emitted.flow = Flow::gather;
}

// movmatrix: the transpose of one 8x8 matrix of 16 bits, from fragment to fragment.
void move_matrix(Warp& warp, const Op& op, uint32_t) {
  const auto* const a = warp.lanes<uint32_t>(op.r[1]);
  uint16_t rows[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    rows[lane / 4][lane % 4 * 2] = static_cast<uint16_t>(a[lane]);
    rows[lane / 4][lane % 4 * 2 + 1] = static_cast<uint16_t>(a[lane] >> 16);
  }
  auto* const d = warp.lanes<uint32_t>(op.r[0]);
  for (int lane = 0; lane < 32; ++lane)
    d[lane] = static_cast<uint32_t>(rows[lane % 4 * 2 + 1][lane / 4]) << 16 | rows[lane % 4 * 2][lane / 4];
}

void decode_move_matrix(Builder& b, Statement& in) {
  if (!in.take("sync") || !in.take("aligned") || !in.take("m8n8") || !in.take("trans") ||
      in.type() != Type::u16)
    throw Error("is unknown");
  const uint32_t a = b.source(in.operand(1), 4);
  b.emit(move_matrix, {b.destination(in.operand(0), 4), a}).flow = Flow::gather;
}

// ---- mma, D = A B + C of 16 x 8 sums in float: [0..3] D, [4..] A, then B, then C.
// With g = lane / 4, t = lane % 4 and e elements in a register (2 of 16 bits, 1 of TF32):
//   A register i: rows g (i even) or g + 8 (i odd), columns i / 2 * 4e + t * e ..
//   B register i: rows i * 4e + t * e .., column g
//   C, D: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)

enum class Elements { half, bfloat16, tf32 };

template <Elements kElements, int kDepth>
void multiply(Warp& warp, const Op& op, uint32_t) {
  constexpr int kEach = kElements == Elements::tf32 ? 1 : 2, kBs = kDepth / (4 * kEach), kAs = 2 * kBs;
  double a[16][kDepth], b[kDepth][8];
  const auto value = [&](uint32_t bits, int e, int lane) -> double {
    if constexpr (kElements == Elements::half) return half_of_bits(static_cast<uint16_t>(bits >> 16 * e));
    if constexpr (kElements == Elements::bfloat16)
      return bfloat16_of_bits(static_cast<uint16_t>(bits >> 16 * e));
    if ((bits & 0x1FFF) != 0 && (bits & 0x7F800000) != 0x7F800000)
      warp.fail(op, lane, "has an operand that is not rounded to TF32");
    return std::bit_cast<float>(bits);
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kAs; ++i)
      for (int e = 0; e < kEach; ++e)
        a[g + 8 * (i % 2)][i / 2 * 4 * kEach + t * kEach + e] =
            value(warp.lanes<uint32_t>(op.r[4 + i])[lane], e, lane);
    for (int i = 0; i < kBs; ++i)
      for (int e = 0; e < kEach; ++e)
        b[i * 4 * kEach + t * kEach + e][g] = value(warp.lanes<uint32_t>(op.r[4 + kAs + i])[lane], e, lane);
  }
  double sums[16][8];
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      double sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      sums[row][column] = sum;
    }
  for (int i = 0; i < 4; ++i) {
    const float* const c = warp.lanes<float>(op.r[4 + kAs + kBs + i]);
    float* const d = warp.lanes<float>(op.r[i]);
    for (int lane = 0; lane < 32; ++lane)
      d[lane] = static_cast<float>(sums[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2] + c[lane]);
  }
}

void decode_multiply_matrices(Builder& b, Statement& in) {
  const auto shape = in.take_one({"m16n8k4", "m16n8k8", "m16n8k16"});
  if (!in.take("sync") || !in.take("aligned") || !in.take("row") || !in.take("col") || shape.empty())
    throw Error("is unknown");
  const int depth = std::stoi(shape.substr(6));
  const Type d = in.type(), type = in.type(), other = in.type(), c = in.type();
  if (d != Type::f32 || c != Type::f32 || type != other) throw Error("is unknown for its types");
  const Run run = type == Type::f16 && depth == 8     ? multiply<Elements::half, 8>
                  : type == Type::f16 && depth == 16  ? multiply<Elements::half, 16>
                  : type == Type::bf16 && depth == 8  ? multiply<Elements::bfloat16, 8>
                  : type == Type::bf16 && depth == 16 ? multiply<Elements::bfloat16, 16>
                  : type == Type::tf32 && depth == 4  ? multiply<Elements::tf32, 4>
                  : type == Type::tf32 && depth == 8  ? multiply<Elements::tf32, 8>
                                                      : nullptr;
  if (run == nullptr) throw Error("is unknown for its types");
  const int bs = depth / (type == Type::tf32 ? 4 : 8);
  Op op;
  int at = 0;
  for (const auto& [i, count] : {std::pair{0, 4}, {1, 2 * bs}, {2, bs}, {3, 4}}) {
    const Operand& fragment = in.operand(i);
    const auto& registers =
        fragment.kind == Operand::Kind::vector ? fragment.parts : std::vector<Operand>{fragment};
    if (registers.size() != static_cast<size_t>(count))
      throw Error("has a fragment of another size: " + fragment.text);
    for (const Operand& one : registers) op.r[at++] = i == 0 ? b.destination(one, 4) : b.source(one, 4);
  }
  Op& emitted = b.emit(run);
  std::copy(op.r, op.r + 16, emitted.r);
  emitted.flow = Flow::gather;
}

}  // namespace

bool decode_warp(Builder& b, Statement& in) {
  if (in.name == "bar" || in.name == "barrier")
    decode_barrier(b, in);
  else if (in.name == "shfl")
    decode_shuffle(b, in);
  else if (in.name == "vote")
    decode_vote(b, in);
  else if (in.name == "ldmatrix")
    decode_load_matrix(b, in);
  else if (in.name == "movmatrix")
    decode_move_matrix(b, in);
  else if (in.name == "mma")
    decode_multiply_matrices(b, in);
  else if (in.name == "ret" || in.name == "exit")
    b.emit(nullptr).flow = Flow::exit;
  else
    return false;
  return true;
}

void decode(Builder& b, Statement& in) {
  if (!decode_arithmetic(b, in) && !decode_bits(b, in) && !decode_choice(b, in) && !decode_convert(b, in) &&
      !decode_memory(b, in) && !decode_warp(b, in))
    throw Error("is unknown");
  if (!in.modifiers.empty()) throw Error("has the unknown modifier ." + in.modifiers.front());
}

}  // namespace ptx
