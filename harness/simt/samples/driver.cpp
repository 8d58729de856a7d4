// Runs one sample kernel, compares with a plain loop, and prints what came of it as one line of JSON; "error"
// is the largest difference over 1 + the expected magnitude, 1e30 for NaN. An executable, and as a shared
// library the function `run_sample`, to show that errors come out of a library that Python has loaded.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "samples.cu"

namespace {

using namespace effdense::kernels;
using Arguments = std::vector<std::string>;

// Reproducible, of both signs, and in every bit.
std::vector<float> values(size_t count, unsigned seed) {
  std::vector<float> result(count);
  for (float& value : result) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / (1 << 23) - 1.0f;
  }
  return result;
}

std::string report(const char* key, double value) {
  const simt::Launch& launch = simt::last_launch();
  std::ostringstream text;
  text << "{\"" << key << "\": " << (std::isnan(value) ? 1e30 : value);
  text << ", \"loads\": " << launch.counters.loads << ", \"load_bytes\": " << launch.counters.load_bytes;
  text << ", \"stores\": " << launch.counters.stores << ", \"store_bytes\": " << launch.counters.store_bytes;
  for (const simt::Watched& array : simt::watched) {
    text << ", \"" << array.name << "_load_bytes\": " << array.counters.load_bytes;
    text << ", \"" << array.name << "_store_bytes\": " << array.counters.store_bytes;
  }
  text << ", \"shared\": " << launch.dynamic_shared_bytes << "}";
  return text.str();
}

// The largest |expected - actual| / (1 + |expected|); NaN if there is one.
double difference(const std::vector<double>& expected, const std::function<double(size_t)>& actual) {
  double largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(expected[i] - actual(i)) / (1 + std::abs(expected[i]));
    if (std::isnan(error)) return error;
    largest = std::max(largest, error);
  }
  return largest;
}

// relu(scale * x + shift) rounded by `round`, times w(column, k).
std::vector<double> plain_gemm(int rows, int columns, int depth, const std::function<float(int, int)>& x,
                               const std::function<float(int, int)>& w, const std::vector<float>& scale,
                               const std::vector<float>& shift, const std::function<float(float)>& round) {
  std::vector<double> y(static_cast<size_t>(rows) * columns);
  std::vector<float> z(depth);
  for (int r = 0; r < rows; ++r) {
    for (int k = 0; k < depth; ++k) z[k] = round(std::fmax(scale[k] * x(r, k) + shift[k], 0.0f));
    for (int c = 0; c < columns; ++c) {
      for (int k = 0; k < depth; ++k) y[static_cast<size_t>(r) * columns + c] += double{z[k]} * w(c, k);
    }
  }
  return y;
}

std::string run_gemm(const Arguments& arguments) {
  const int rows = std::stoi(arguments.at(0)), columns = std::stoi(arguments.at(1)),
            depth = std::stoi(arguments.at(2));
  const auto x = values(static_cast<size_t>(rows) * depth, 1),
             w = values(static_cast<size_t>(columns) * depth, 2);
  const auto scale = values(depth, 3), shift = values(depth, 4);
  std::vector<float> y(static_cast<size_t>(rows) * columns);
  gemm(x.data(), scale.data(), shift.data(), w.data(), y.data(), rows, columns, depth);
  const auto expected = plain_gemm(
      rows, columns, depth, [&](int r, int k) { return x[r * depth + k]; },
      [&](int c, int k) { return w[c * depth + k]; }, scale, shift, [](float z) { return z; });
  return report("error", difference(expected, [&](size_t i) { return y[i]; }));
}

// Rows of x and w are padded to 16 bytes with NaN, which must not come through.
template <typename T>
std::string run_tensor_core(const Arguments& arguments) {
  const int rows = std::stoi(arguments.at(0)), columns = std::stoi(arguments.at(1)),
            depth = std::stoi(arguments.at(2));
  const bool by_depth = arguments.at(3) == "by_depth";
  const Plant plant = arguments.at(3) == "no_wait"      ? Plant::no_wait
                      : arguments.at(3) == "early_copy" ? Plant::early_copy
                                                        : Plant::nothing;
  const auto matrix = [](int lines, int width, unsigned seed) {
    const int stride = (width + 7) / 8 * 8;
    auto source = values(static_cast<size_t>(lines) * stride, seed);
    std::vector<T> result;
    for (size_t i = 0; i < source.size(); ++i) {
      result.push_back(static_cast<T>(static_cast<int>(i % stride) < width ? source[i] : NAN));
    }
    return std::pair{result, stride};
  };
  const auto [x, x_stride] = matrix(rows, depth, 1);
  const auto [w, w_stride] = by_depth ? matrix(depth, columns, 2) : matrix(columns, depth, 2);
  const auto scale = values(depth, 3), shift = values(depth, 4);
  std::vector<T> y(static_cast<size_t>(rows) * columns);
  simt::watch("w", w.data(), w.size() * sizeof(T));
  simt::watch("y", y.data(), y.size() * sizeof(T));
  tensor_core_gemm(x.data(), scale.data(), shift.data(), w.data(), y.data(), rows, columns, depth, x_stride,
                   w_stride, by_depth, plant);
  const auto expected = plain_gemm(
      rows, columns, depth, [&](int r, int k) { return static_cast<float>(x[r * x_stride + k]); },
      [&](int c, int k) { return static_cast<float>(by_depth ? w[k * w_stride + c] : w[c * w_stride + k]); },
      scale, shift, [](float z) { return static_cast<float>(static_cast<T>(z)); });
  return report("error", difference(expected, [&](size_t i) { return static_cast<float>(y[i]); }));
}

std::string run_tf32(const Arguments& arguments) {
  const int tiles = std::stoi(arguments.at(0)), depth = std::stoi(arguments.at(1)), rows = 16 * tiles;
  const auto x = values(static_cast<size_t>(rows) * depth, 1), w = values(static_cast<size_t>(8) * depth, 2);
  std::vector<float> y(static_cast<size_t>(rows) * 8);
  tf32_gemm(x.data(), w.data(), y.data(), tiles, depth);
  // 11 significant bits, ties away from zero.
  const auto round = [](float value) {
    int exponent;
    const float fraction = std::frexp(value, &exponent);
    return std::ldexp(std::round(std::ldexp(fraction, 11)), exponent - 11);
  };
  const std::vector<float> ones(depth, 1.0f), zeros(depth, 0.0f);
  std::vector<double> expected(y.size());
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < 8; ++c) {
      for (int k = 0; k < depth; ++k)
        expected[r * 8 + c] += double{round(x[r * depth + k])} * round(w[c * depth + k]);
    }
  }
  return report("error", difference(expected, [&](size_t i) { return y[i]; }));
}

std::string run_primitives(const Arguments&) {
  std::vector<int> x(32), actual(32 * kWarpResults);
  for (int lane = 0; lane < 32; ++lane) x[lane] = lane * 11 % 32;
  warp_primitives(x.data(), actual.data());
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= (x[lane] % 3 == 0 ? 1u : 0u) << lane;
  std::vector<double> expected(actual.size());
  for (int lane = 0; lane < 32; ++lane) {
    bool any = false, all = true;
    for (int other = lane / 16 * 16; other < lane / 16 * 16 + 16; ++other) {
      any = any || x[other] == 7;
      all = all && x[other] < 20;
    }
    const int segment = lane % 16;
    const int results[kWarpResults] = {x[(lane + 5) % 32],
                                       x[lane / 8 * 8 + 3],
                                       x[lane ^ 9],
                                       lane % 8 < 4 ? x[lane] : x[lane ^ 4],
                                       segment < 3 ? x[lane] : x[lane - 3],
                                       segment > 12 ? x[lane] : x[lane + 3],
                                       static_cast<int>(ballot),
                                       any,
                                       all,
                                       x[lane ^ 1]};
    for (int i = 0; i < kWarpResults; ++i) expected[32 * i + lane] = results[i];
  }
  return report("error", difference(expected, [&](size_t i) { return actual[i]; }));
}

std::string run_row_sums(const Arguments& arguments) {
  const int rows = std::stoi(arguments.at(0)), columns = std::stoi(arguments.at(1));
  const auto source = values(static_cast<size_t>(rows) * columns, 1);
  const std::vector<double> x(source.begin(), source.end());
  std::vector<double> sums(rows), expected(rows);
  row_sums(x.data(), sums.data(), rows, columns);
  for (int i = 0; i < rows * columns; ++i) expected[i / columns] += x[i];
  return report("error", difference(expected, [&](size_t i) { return sums[i]; }));
}

std::string run_reverse(const Arguments& arguments) {
  const int threads = std::stoi(arguments.at(1)), count = std::stoi(arguments.at(2));
  const auto x = values(2 * count, 1);
  std::vector<float> y(2 * count);
  (arguments.at(0) == "static" ? reverse_static : reverse)(x.data(), y.data(), threads, count);
  std::vector<double> expected;
  for (int i = 0; i < 2 * count; ++i) expected.push_back(x[i / count * count + count - 1 - i % count]);
  return report("error", difference(expected, [&](size_t i) { return y[i]; }));
}

std::string run_bug(const Arguments& arguments) {
  const auto x = values(64, 1);
  std::vector<float> y(64);
  if (arguments.size() > 1) simt::watch("y", y.data(), y.size() * sizeof(float));
  if (!launch_bug(arguments.at(0).c_str(), x.data(), y.data())) throw std::invalid_argument("no such bug");
  int count = 0;
  for (const float value : y) count += std::isnan(value);
  return report("nan", count);
}

// Millions of multiply-adds a second of the two GEMMs.
std::string run_speed(const Arguments&) {
  const int rows = 512, columns = 128, depth = 256;
  const auto x = values(rows * depth, 1), w = values(columns * depth, 2), scale = values(depth, 3),
             shift = values(depth, 4);
  std::vector<float> y(rows * columns);
  const std::vector<__half> half_x(x.begin(), x.end()), half_w(w.begin(), w.end());
  std::vector<__half> half_y(rows * columns);
  const auto rate = [&](const std::function<void()>& run) {
    run();
    const auto start = std::chrono::steady_clock::now();
    run();
    return 1e-6 * rows * columns * depth /
           std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  const double plain =
      rate([&] { gemm(x.data(), scale.data(), shift.data(), w.data(), y.data(), rows, columns, depth); });
  const double tensor_core = rate([&] {
    tensor_core_gemm(half_x.data(), scale.data(), shift.data(), half_w.data(), half_y.data(), rows, columns,
                     depth, depth, depth, false, Plant::nothing);
  });
  return "{\"plain\": " + std::to_string(plain) + ", \"tensor_core\": " + std::to_string(tensor_core) + "}";
}

std::string run(const std::string& name, const Arguments& arguments) {
  static const std::map<std::string, std::string (*)(const Arguments&)> samples = {
      {"gemm", run_gemm},
      {"half", run_tensor_core<__half>},
      {"bfloat16", run_tensor_core<__nv_bfloat16>},
      {"tf32", run_tf32},
      {"primitives", run_primitives},
      {"row_sums", run_row_sums},
      {"reverse", run_reverse},
      {"bug", run_bug},
      {"speed", run_speed}};
  simt::unwatch_all();
  return samples.at(name)(arguments);
}

}  // namespace

// 0 and the report, or 2 and the message of the simt::Error.
extern "C" __attribute__((visibility("default"))) int run_sample(int count, const char** words, char* text,
                                                                 int size) {
  int status = 0;
  std::string result;
  try {
    result = run(words[0], Arguments(words + 1, words + count));
  } catch (const simt::Error& error) {
    status = 2;
    result = error.what();
  }
  snprintf(text, size, "%s", result.c_str());
  return status;
}

int main(int count, const char** words) {
  char text[4096];
  const int status = run_sample(count - 1, words + 1, text, sizeof text);
  fprintf(status == 0 ? stdout : stderr, "%s\n", text);
  return status;
}
