// PTX text into a Program: declarations, scopes, labels, statements. What each instruction does is decoded in
// the files that are named after what they do.
#include <algorithm>
#include <cctype>
#include <cstring>

#include "ptx/builder.h"

namespace ptx {
namespace {

int bytes_of_declared(const Builder& builder, const std::string& type) {
  static const std::map<std::string, int> kBytes{{".b8", 1},  {".u8", 1},  {".s8", 1},  {".b16", 2},
                                                 {".u16", 2}, {".s16", 2}, {".f16", 2}, {".b32", 4},
                                                 {".u32", 4}, {".s32", 4}, {".f32", 4}, {".b64", 8},
                                                 {".u64", 8}, {".s64", 8}, {".f64", 8}, {".pred", 4}};
  const auto found = kBytes.find(type);
  if (found == kBytes.end()) builder.fail("a declaration has the unknown type " + type);
  return found->second;
}

// Of "name[1024]", "name[2][4]" or "name": the name, and how many elements.
std::pair<std::string, uint64_t> sized(const std::string& text) {
  const auto bracket = text.find('[');
  uint64_t count = 1;
  for (auto at = bracket; at != std::string::npos; at = text.find('[', at + 1))
    count *= std::strtoull(text.c_str() + at + 1, nullptr, 0);
  return {trimmed(text.substr(0, bracket)), count};
}

// ".shared .align 16 .b8 name[1024]" and the like; a .reg may declare several, as name<100>.
void declare(Builder& builder, const std::string& text) {
  std::vector<std::string> words;
  size_t at = 0;
  while (text.compare(at, 1, ".") == 0 || std::isdigit(static_cast<unsigned char>(text[at]))) {
    const auto end = text.find_first_of(" \t\n", at);
    if (end == std::string::npos) builder.fail("cannot read the declaration " + text);
    words.push_back(text.substr(at, end - at));
    at = text.find_first_not_of(" \t\n", end);
    if (at == std::string::npos) builder.fail("cannot read the declaration " + text);
  }
  // ".param .u64 .ptr .align 1 name" says how its target is aligned.
  if (const auto pointer = std::find(words.begin(), words.end(), ".ptr"); pointer != words.end())
    words.erase(pointer, words.end());
  if (words.empty()) builder.fail("cannot read the declaration " + text);
  const int bytes = bytes_of_declared(builder, words.back());
  if (words.front() == ".reg") {
    for (const auto& name : split(text.substr(at), ',')) {
      const auto bracket = name.find('<');
      if (bracket == std::string::npos) {
        builder.declare_register(name, bytes, words.back() == ".pred");
      } else {
        const int count = std::stoi(name.substr(bracket + 1));
        for (int i = 0; i < count; ++i)
          builder.declare_register(name.substr(0, bracket) + std::to_string(i), bytes,
                                   words.back() == ".pred");
      }
    }
    return;
  }
  const auto align = std::find(words.begin(), words.end(), ".align");
  const uint32_t unit = align == words.end() ? bytes : std::stoi(*(align + 1));
  const auto [name, count] = sized(text.substr(at));
  const auto has = [&](const char* word) {
    return std::find(words.begin(), words.end(), word) != words.end();
  };
  const auto place = [&](uint32_t& used, Space space) {
    used = (used + unit - 1) / unit * unit;
    builder.declare_symbol(name, space, used);
    used += static_cast<uint32_t>(count * bytes);
  };
  if (has(".param")) {
    place(builder.program.parameter_bytes, Space::param);
    const auto size = static_cast<uint32_t>(count * bytes);
    builder.program.parameters.push_back({name, builder.program.parameter_bytes - size, size});
  } else if (has(".shared") && has(".extern")) {
    builder.declare_symbol(name, Space::shared, kDynamicShared);
  } else if (has(".shared")) {
    place(builder.program.shared_bytes, Space::shared);
  } else if (has(".local")) {
    place(builder.program.local_bytes, Space::local);
  }  // others: an error for whoever uses one
}

Statement statement_of(const Builder& builder, const std::string& text) {
  Statement statement;
  const auto end = text.find_first_of(" \t\n");
  statement.opcode = text.substr(0, end);
  auto parts = split(statement.opcode, '.');
  statement.name = parts.front();
  for (size_t i = 1; i < parts.size(); ++i) {
    // "shared::cta" is what "shared" says
    if (const auto colons = parts[i].find("::cta"); colons != std::string::npos) parts[i].resize(colons);
    statement.modifiers.push_back(parts[i]);
  }
  if (end == std::string::npos) return statement;
  for (const auto& operand : split(text.substr(end), ','))
    // "%r1|%p1": two results
    for (const auto& part : split(operand, '|')) statement.operands.push_back(builder.operand(part));
  return statement;
}

}  // namespace

// ---- A kernel

namespace {

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t at = 0; at <= text.size();) {
    const auto end = std::min(text.find('\n', at), text.size());
    lines.push_back(trimmed(text.substr(at, end - at)));
    at = end + 1;
  }
  return lines;
}

}  // namespace

std::string kernel_text(const std::string& module, const std::string& name) {
  const auto entry = module.find(".entry " + name + "(");
  if (entry == std::string::npos) throw Error("no kernel " + name + " in this module");
  size_t end = module.find('{', entry);
  for (int depth = 0; end < module.size(); ++end) {
    depth += (module[end] == '{') - (module[end] == '}');
    if (depth == 0) break;
  }
  const std::string kernel = module.substr(entry, end + 1 - entry) + "\n";
  // Nothing but declarations stands before the first kernel.
  std::string declarations;
  for (const auto& line : lines_of(module.substr(0, module.find(".entry")))) {
    if (line.find(".shared") == std::string::npos) continue;
    const auto words = line.substr(0, line.find_first_of("[;"));
    const auto declared = words.substr(words.find_last_of(" \t") + 1);
    if (kernel.find(declared) != std::string::npos) declarations += line + "\n";
  }
  return declarations + kernel;
}

namespace {

struct Reader {
  const std::string& text;
  size_t at = 0;
  int line = 1;

  void skip_space() {
    while (at < text.size()) {
      if (text.compare(at, 2, "//") == 0)
        while (at < text.size() && text[at] != '\n') ++at;
      else if (std::isspace(static_cast<unsigned char>(text[at])))
        line += text[at++] == '\n';
      else
        return;
    }
  }
  // As far as the character, without comments.
  std::string until(const char* ends) {
    std::string result;
    while (at < text.size() && !std::strchr(ends, text[at])) {
      if (text.compare(at, 2, "//") == 0) {
        skip_space();
        result += ' ';
        continue;
      }
      line += text[at] == '\n';
      result += text[at++];
    }
    if (at < text.size()) ++at;
    return result;
  }
};

}  // namespace

Program parse(const std::string& name, const std::string& text) {
  Builder builder;
  Program& program = builder.program;
  program.name = name;
  program.lines = lines_of(text);
  Reader reader{text};
  std::map<std::string, int> labels;
  std::vector<std::pair<size_t, std::string>> branches;
  for (reader.skip_space(); text.compare(reader.at, 6, ".entry") != 0; reader.skip_space())
    declare(builder, trimmed(reader.until(";")));
  reader.until("(");  // the name
  const std::string parameters = reader.until(")");
  for (const auto& parameter : split(parameters, ',')) declare(builder, parameter);
  const std::string bounds = reader.until("{");
  if (const auto at = bounds.find(".maxntid"); at != std::string::npos) {
    program.most_threads = 1;
    for (const auto& size : split(bounds.substr(at + 8, bounds.find('\n', at) - at - 8), ','))
      program.most_threads *= std::stoi(size);
  }
  int depth = 1;
  while (depth > 0) {
    reader.skip_space();
    if (reader.at >= text.size()) builder.fail("the text ends within the kernel");
    builder.line = reader.line;
    const char c = text[reader.at];
    if (c == '{' || c == '}') {
      ++reader.at;
      depth += c == '{' ? 1 : -1;
      if (c == '{') builder.open_scope();
      if (c == '}' && depth > 0) builder.close_scope();
      continue;
    }
    size_t end = reader.at;
    while (end < text.size() && is_name(text[end])) ++end;
    if (end > reader.at && text[end] == ':') {
      labels[text.substr(reader.at, end - reader.at)] = static_cast<int>(program.ops.size());
      reader.at = end + 1;
      continue;
    }
    std::string line = trimmed(reader.until(";"));
    if (line.empty() || line.compare(0, 7, ".pragma") == 0) continue;
    if (line[0] == '.') {
      declare(builder, line);
      continue;
    }
    std::optional<Operand> guard;
    if (line[0] == '@') {
      const auto space = line.find_first_of(" \t");
      guard = builder.operand(line.substr(1, space - 1));
      line = trimmed(line.substr(space));
    }
    builder.begin(guard);
    Statement statement = statement_of(builder, line);
    if (statement.name == "bra") {
      builder.emit(nullptr).flow = Flow::branch;
      branches.emplace_back(program.ops.size() - 1, statement.operand(0).text);
      continue;
    }
    try {
      decode(builder, statement);
    } catch (const Error& error) {
      if (std::string(error.what()).starts_with("kernel ")) throw;
      builder.fail("instruction \"" + line + "\" " + error.what());
    }
    builder.end();
  }
  builder.begin(std::nullopt);
  builder.emit(nullptr).flow = Flow::exit;  // a text that ends without ret
  for (const auto& [op, label] : branches) {
    const auto found = labels.find(label);
    if (found == labels.end()) throw Error("kernel " + name + ": unknown label " + label);
    program.ops[op].target = found->second;
  }
  return program;
}

}  // namespace ptx
