// A statement's modifiers and types, its operands, and where they lie in a warp's registers.
#include "ptx/builder.h"

#include <algorithm>
#include <cctype>
#include <cstring>

namespace ptx {
namespace {

constexpr uint32_t kAlign = 32;

}  // namespace

// ---- Text

std::string trimmed(const std::string& text) {
  const auto first = text.find_first_not_of(" \t\r\n");
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  int depth = 0;
  std::string part;
  for (const char c : text) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == at && depth == 0) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty() || !parts.empty()) parts.push_back(trimmed(part));
  return parts;
}

bool is_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

// ---- Statement

bool Statement::take(const std::string& modifier) {
  const auto found = std::find(modifiers.begin(), modifiers.end(), modifier);
  if (found == modifiers.end()) return false;
  modifiers.erase(found);
  return true;
}

std::string Statement::take_one(std::initializer_list<const char*> any) {
  for (const char* modifier : any)
    if (take(modifier)) return modifier;
  return "";
}

void Statement::ignore(std::initializer_list<const char*> any) {
  for (const char* modifier : any) take(modifier);
}

std::optional<Type> Statement::take_type() {
  static const std::map<std::string, Type> kTypes{
      {"pred", Type::pred}, {"u8", Type::u8},       {"b8", Type::u8},         {"u16", Type::u16},
      {"b16", Type::u16},   {"u32", Type::u32},     {"b32", Type::u32},       {"u64", Type::u64},
      {"b64", Type::u64},   {"s8", Type::s8},       {"s16", Type::s16},       {"s32", Type::s32},
      {"s64", Type::s64},   {"f16", Type::f16},     {"bf16", Type::bf16},     {"f32", Type::f32},
      {"f64", Type::f64},   {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2}, {"tf32", Type::tf32}};
  for (auto modifier = modifiers.begin(); modifier != modifiers.end(); ++modifier) {
    const auto found = kTypes.find(*modifier);
    if (found == kTypes.end()) continue;
    modifiers.erase(modifier);
    return found->second;
  }
  return std::nullopt;
}

Type Statement::type() {
  const auto found = take_type();
  if (!found) throw Error("has no type");
  return *found;
}

const Operand& Statement::operand(size_t i) const {
  if (i >= operands.size()) throw Error("has too few operands");
  return operands[i];
}

// ---- Builder

Builder::Builder() : scopes_(1) {}

void Builder::fail(const std::string& what) const {
  throw Error("kernel " + program.name + ", line " + std::to_string(line) + ": " + what);
}

uint32_t Builder::new_register(int bytes) {
  const auto at = static_cast<uint32_t>(program.registers.size());
  const uint32_t all = bytes * 32u;
  program.registers.resize(at + (all + kAlign - 1) / kAlign * kAlign, 0xFF);
  return at;
}

uint32_t Builder::constant(uint64_t value, int bytes) {
  const auto [found, added] = constants_.try_emplace({value, bytes}, 0);
  if (added) {
    found->second = new_register(bytes);
    for (int lane = 0; lane < 32; ++lane)
      std::memcpy(&program.registers[found->second + lane * bytes], &value, bytes);
  }
  return found->second;
}

uint32_t Builder::special(Special kind, int axis) {
  const auto [found, added] = specials_.try_emplace({static_cast<int>(kind), axis}, 0);
  if (added) {
    found->second = new_register(4);
    program.specials.push_back({kind, axis, found->second});
  }
  return found->second;
}

void Builder::declare_register(const std::string& name, int bytes, bool predicate) {
  scopes_.back()[name] = {new_register(predicate ? 1 : bytes), bytes, predicate};
}

void Builder::declare_symbol(const std::string& name, Space space, uint64_t at) {
  symbols_[name] = {space, at};
}

void Builder::close_scope() {
  if (scopes_.size() == 1) fail("a } too many");
  scopes_.pop_back();
}

std::pair<Space, uint64_t> Builder::symbol(const std::string& name) const {
  const auto found = symbols_.find(name);
  if (found == symbols_.end()) fail("unknown symbol " + name);
  return found->second;
}

Operand Builder::operand(std::string text) const {
  static const std::map<std::string, std::pair<Special, int>> kSpecials{
      {"%tid", {Special::tid, 0}},
      {"%ntid", {Special::ntid, 0}},
      {"%ctaid", {Special::ctaid, 0}},
      {"%nctaid", {Special::nctaid, 0}},
      {"%laneid", {Special::laneid, 0}},
      {"%warpid", {Special::warpid, 0}},
      {"%lanemask_lt", {Special::lanemask, 0}}};
  Operand result{};
  result.text = text = trimmed(text);
  if (text.empty()) fail("an operand is missing");
  if (text == "_") {
    result.kind = Operand::Kind::sink;
  } else if (text.front() == '{') {
    result.kind = Operand::Kind::vector;
    for (const auto& part : split(text.substr(1, text.size() - 2), ','))
      result.parts.push_back(operand(part));
  } else if (text.front() == '[') {
    result.kind = Operand::Kind::address;
    text = trimmed(text.substr(1, text.size() - 2));
    const auto sign = text.find_first_of("+-", 1);
    result.parts.push_back(operand(text.substr(0, sign)));
    if (sign != std::string::npos) {
      auto offset = trimmed(text.substr(sign + 1));
      int64_t number = std::strtoll(offset.c_str(), nullptr, 0);
      result.number = static_cast<uint64_t>(text[sign] == '-' ? -number : number);
    }
  } else if (text.front() == '!' || !is_name(text.front()) ||
             std::isdigit(static_cast<unsigned char>(text.front()))) {
    if (text.front() == '!') {
      result = operand(text.substr(1));
      result.negated = true;
    } else if (text.size() > 2 && text[0] == '0' && std::strchr("fFdD", text[1])) {
      result.kind = Operand::Kind::number;
      result.number = std::strtoull(text.c_str() + 2, nullptr, 16);
      result.float_bytes = std::tolower(text[1]) == 'f' ? 4 : 8;
    } else {
      result.kind = Operand::Kind::number;
      char* end = nullptr;
      result.number = text.front() == '-' ? static_cast<uint64_t>(std::strtoll(text.c_str(), &end, 0))
                                          : std::strtoull(text.c_str(), &end, 0);
      if (*end != '\0' && *end != 'U') fail("cannot read the operand " + text);
    }
  } else {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(text);
      if (found == scope->end()) continue;
      result.kind = Operand::Kind::reg;
      result.reg = found->second;
      return result;
    }
    const auto dot = text.find('.');
    const auto known = kSpecials.find(text.substr(0, dot));
    if (known != kSpecials.end()) {
      const int axis = dot == std::string::npos ? 0 : text[dot + 1] - 'x';
      result.kind = Operand::Kind::reg;
      result.reg = {const_cast<Builder*>(this)->special(known->second.first, axis), 4, false};
    } else if (text.front() == '%') {
      fail("unknown register " + text);
    } else {
      result.kind = Operand::Kind::symbol;  // a label too
      const auto sign = text.find_first_of("+-");
      if (sign != std::string::npos) {
        result.number = std::strtoll(text.c_str() + sign, nullptr, 0);
        result.text = trimmed(text.substr(0, sign));
      }
    }
  }
  return result;
}

uint32_t Builder::source(const Operand& from, int bytes) {
  switch (from.kind) {
    case Operand::Kind::number:
      if (from.float_bytes != 0 && from.float_bytes != bytes)
        fail("number " + from.text + " of another type");
      return constant(from.number & (bytes == 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * bytes) - 1), bytes);
    case Operand::Kind::symbol: {
      const auto [space, at] = symbol(from.text);
      return constant(at + from.number, bytes);
    }
    case Operand::Kind::reg: {
      if (from.reg.predicate) fail("predicate " + from.text + " as a number");
      if (from.reg.bytes == bytes) return from.reg.at;
      if (from.reg.bytes < bytes) fail("register " + from.text + " is too narrow");
      const uint32_t narrow = new_register(bytes);
      emit(resize(from.reg.bytes, bytes, false), {narrow, from.reg.at});
      return narrow;
    }
    default:
      fail("operand " + from.text + " where a register or a number must be");
  }
}

uint32_t Builder::source(const Operand& from, Type type) {
  if (from.kind == Operand::Kind::number && from.float_bytes == 8 && type == Type::f32) {
    double wide;
    std::memcpy(&wide, &from.number, 8);
    const auto value = static_cast<float>(wide);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return constant(bits, 4);
  }
  return source(from, bytes_of(type));
}

uint32_t Builder::destination(const Operand& to, int bytes, bool sign) {
  if (to.kind == Operand::Kind::sink) return new_register(bytes);
  if (to.kind != Operand::Kind::reg || to.reg.predicate) fail("operand " + to.text + " cannot be a result");
  if (to.reg.bytes == bytes) return to.reg.at;
  if (to.reg.bytes < bytes) fail("register " + to.text + " is too narrow");
  const uint32_t narrow = new_register(bytes);
  widenings_.push_back({narrow, to.reg.at, bytes, to.reg.bytes, sign});
  return narrow;
}

void Builder::begin(const std::optional<Operand>& guard) {
  guard_ = -1;
  if (!guard) return;
  if (guard->kind != Operand::Kind::reg || !guard->reg.predicate)
    fail("guard " + guard->text + " is no predicate");
  guard_ = static_cast<int>(guard->reg.at);
  negated_ = guard->negated;
}

Op& Builder::emit(Run run, std::initializer_list<uint32_t> registers) {
  Op op;
  op.run = run;
  op.guard = guard_;
  op.negated = negated_;
  op.line = line;
  if (registers.size() > std::size(op.r)) fail("too many operands");
  std::copy(registers.begin(), registers.end(), op.r);
  program.ops.push_back(op);
  return program.ops.back();
}

void Builder::end() {
  for (const auto& [from, to, from_bytes, to_bytes, sign] : widenings_)
    emit(resize(from_bytes, to_bytes, sign), {to, from});
  widenings_.clear();
}

}  // namespace ptx
