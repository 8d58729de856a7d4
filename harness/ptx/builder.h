// Shared by parse.cpp and the instructions' files: a statement of PTX, its operands, and the program that
// grows.
#pragma once

#include <array>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ptx/program.h"

namespace ptx {

enum class Type : uint8_t {
  pred,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  bf16,
  f32,
  f64,
  f16x2,
  bf16x2,
  tf32
};

constexpr int bytes_of(Type type) {
  constexpr int kBytes[] = {4, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 4, 4, 4};
  return kBytes[static_cast<int>(type)];
}

struct Register {
  uint32_t at;
  int bytes;
  bool predicate;
};

struct Operand {
  enum class Kind : uint8_t { reg, number, symbol, vector, address, sink } kind;
  std::string text;
  Register reg{};
  bool negated = false;        // of a predicate
  uint64_t number = 0;         // bits; of an address or symbol, what is added
  int float_bytes = 0;         // of a number that is written as 0f or 0d
  std::vector<Operand> parts;  // of a vector; of an address its base, if it has one
};

// "add.rn.f32 %f1, %f2, %f3;" without its guard.
struct Statement {
  std::string opcode, name;
  std::vector<std::string> modifiers;
  std::vector<Operand> operands;

  bool take(const std::string& modifier);  // whether it was there; gone now
  // The one of these that is there, or "".
  std::string take_one(std::initializer_list<const char*> any);
  void ignore(std::initializer_list<const char*> any);
  std::optional<Type> take_type();  // the first that is left
  Type type();                      // the same, where there must be one
  const Operand& operand(size_t i) const;
};

class Builder {
 public:
  Program program;
  int line = 0;  // of the statement that is decoded

  Builder();
  [[noreturn]] void fail(const std::string& what) const;
  uint32_t new_register(int bytes);
  uint32_t constant(uint64_t value, int bytes);
  uint32_t special(Special kind, int axis);
  void declare_register(const std::string& name, int bytes, bool predicate);
  void declare_symbol(const std::string& name, Space space, uint64_t at);
  void open_scope() { scopes_.emplace_back(); }
  void close_scope();
  Operand operand(std::string text) const;

  // A place with elements of exactly so many bytes that has the operand's value.
  uint32_t source(const Operand& operand, int bytes);
  uint32_t source(const Operand& operand, Type type);
  // Where an operation may leave elements of so many bytes. A wider register gets them by another operation,
  // which follows: end() it.
  uint32_t destination(const Operand& operand, int bytes, bool sign = false);
  std::pair<Space, uint64_t> symbol(const std::string& name) const;
  Op& emit(Run run, std::initializer_list<uint32_t> registers = {});
  void begin(const std::optional<Operand>& guard);
  void end();

 private:
  struct Widening {
    uint32_t from, to;
    int from_bytes, to_bytes;
    bool sign;
  };
  std::vector<std::map<std::string, Register>> scopes_;
  std::map<std::string, std::pair<Space, uint64_t>> symbols_;
  std::map<std::pair<uint64_t, int>, uint32_t> constants_;
  std::map<std::pair<int, int>, uint32_t> specials_;
  std::vector<Widening> widenings_;
  int guard_ = -1;
  bool negated_ = false;
};

std::string trimmed(const std::string& text);
// At the character, where it is outside of brackets.
std::vector<std::string> split(const std::string& text, char at);
// Whether names have such a character.
bool is_name(char c);

// Adds the operations of one statement to the program.
void decode(Builder& builder, Statement& statement);
// The parts of it: whether the instruction was one of theirs.
bool decode_arithmetic(Builder& builder, Statement& statement);
bool decode_bits(Builder& builder, Statement& statement);
bool decode_choice(Builder& builder, Statement& statement);
bool decode_convert(Builder& builder, Statement& statement);
bool decode_memory(Builder& builder, Statement& statement);
bool decode_warp(Builder& builder, Statement& statement);

// and, or, xor, not of predicates
void decode_predicates(Builder& builder, Statement& statement);

// An operation that copies elements into ones of another size, with or without sign.
Run resize(int from_bytes, int to_bytes, bool sign);

}  // namespace ptx
