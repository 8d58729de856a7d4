// The bottleneck's launchers on the CPU. As a shared library: `run` over a case that Python makes, which
// reports the traffic of its arrays as JSON. As an executable, for the sanitizers: ragged shapes in all
// arithmetics, every array exactly as large as it must be.
#include <cstdio>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/bottleneck.cu"
#include "kernels/bottleneck_backward.cu"

namespace {

using namespace effdense::kernels;

struct Case {  // tests/test_simt_bottleneck.py has the same
  int64_t pixels, channels, out, tf32, accumulate;
  int64_t x_step, y_step, grad_y_step, deferred_y_step, grad_x_step;
  const void *x, *weight, *scale, *shift, *mean;
  const void *bias, *out_scale, *out_shift;
  void *y, *y_mean, *y_var;
  const void *grad_y, *deferred_y, *deferred_mean, *a, *b;
  void *grad_x, *grad_weight, *sum_d, *sum_dx;
};

template <typename T>
void watch(const char* name, const T* data, int64_t rows, int64_t step, int64_t columns) {
  if (data != nullptr && rows > 0) simt::watch(name, data, ((rows - 1) * step + columns) * sizeof(T));
}

template <typename T>
void run(const std::string& op, const Case& c) {
  using A = acc_t<T>;
  const auto type = [](const void* data) { return static_cast<const T*>(data); };
  const auto vector = [](const void* data) { return static_cast<const A*>(data); };
  const auto result = [](void* data) { return static_cast<A*>(data); };
  const Size size{c.pixels, c.channels};
  const Norm<A> norm{vector(c.scale), vector(c.shift), vector(c.mean)};
  watch("x", type(c.x), c.pixels, c.x_step, c.channels);
  watch("weight", type(c.weight), c.out, c.channels, c.channels);
  if (op == "bottleneck") {
    std::vector<A> workspace(c.y_mean == nullptr ? 0 : bottleneck_workspace_size<T>(size, c.out));
    watch("y", type(c.y), c.pixels, c.y_step, c.out);
    watch("workspace", workspace.data(), 1, 0, workspace.size());
    bottleneck<T>(size, c.out, {type(c.x), c.x_step}, norm, type(c.weight),
                  {vector(c.bias), vector(c.out_scale), vector(c.out_shift)}, c.tf32,
                  {static_cast<T*>(c.y), c.y_step}, result(c.y_mean), result(c.y_var), workspace.data(),
                  nullptr);
    return;
  }
  std::vector<A> workspace(bottleneck_backward_workspace_size<T>(size, c.out));
  watch("grad_y", type(c.grad_y), c.pixels, c.grad_y_step, c.out);
  watch("deferred_y", type(c.deferred_y), c.pixels, c.deferred_y_step, c.out);
  watch("grad_x", type(c.grad_x), c.pixels, c.grad_x_step, c.channels);
  watch("workspace", workspace.data(), 1, 0, workspace.size());
  const Deferred<T> deferred{
      {type(c.deferred_y), c.deferred_y_step}, vector(c.deferred_mean), vector(c.a), vector(c.b)};
  bottleneck_backward<T>(size, c.out, {type(c.x), c.x_step}, {type(c.grad_y), c.grad_y_step}, deferred, norm,
                         type(c.weight), c.tf32, {static_cast<T*>(c.grad_x), c.grad_x_step}, c.accumulate,
                         result(c.grad_weight), result(c.sum_d), result(c.sum_dx), workspace.data(), nullptr);
}

const std::map<std::string, void (*)(const std::string&, const Case&)> kTypes = {
    {"float32", run<float>},
    {"float64", run<double>},
    {"float16", run<__half>},
    {"bfloat16", run<__nv_bfloat16>}};

// Every array of its own allocation, without a byte to spare.
template <typename T>
void run_ragged(const char* dtype, bool tf32) {
  using A = acc_t<T>;
  const int64_t shapes[][4] = {{1, 1, 1, 0},     {7, 3, 5, 0},     {130, 12, 48, 4}, {49, 300, 48, 4},
                               {70, 40, 160, 8}, {33, 24, 200, 1}, {600, 13, 12, 3}};
  for (const auto& [pixels, channels, out, more] : shapes) {
    unsigned seed = 1;
    const auto values = [&](auto zero, int64_t count) {
      std::vector<decltype(zero)> result;
      for (int64_t i = 0; i < count; ++i) {
        seed = seed * 1664525u + 1013904223u;
        result.push_back(static_cast<decltype(zero)>(static_cast<float>(seed >> 8) / (1 << 23) - 1.0f));
      }
      return result;
    };
    const auto map = [&](int64_t columns) { return values(T{}, (pixels - 1) * (columns + more) + columns); };
    const auto x = map(channels), weight = values(T{}, out * channels), grad_y = map(out),
               deferred_y = map(out);
    const auto scale = values(A{}, channels), shift = values(A{}, channels), mean = values(A{}, channels);
    const auto bias = values(A{}, out), a = values(A{}, out), b = values(A{}, out);
    auto y = map(out), grad_x = map(channels);
    auto y_mean = values(A{}, out), y_var = y_mean, grad_weight = values(A{}, out * channels),
         sum_d = values(A{}, channels), sum_dx = sum_d;
    const Case all{pixels,
                   channels,
                   out,
                   tf32,
                   true,
                   channels + more,
                   out + more,
                   out + more,
                   out + more,
                   channels + more,
                   x.data(),
                   weight.data(),
                   scale.data(),
                   shift.data(),
                   mean.data(),
                   bias.data(),
                   a.data(),
                   b.data(),
                   y.data(),
                   y_mean.data(),
                   y_var.data(),
                   grad_y.data(),
                   deferred_y.data(),
                   bias.data(),
                   a.data(),
                   b.data(),
                   grad_x.data(),
                   grad_weight.data(),
                   sum_d.data(),
                   sum_dx.data()};
    for (const char* op : {"bottleneck", "bottleneck_backward"}) {
      simt::unwatch_all();
      kTypes.at(dtype)(op, all);
    }
    printf("%s%s %lld %lld %lld\n", dtype, tf32 ? " tf32" : "", static_cast<long long>(pixels),
           static_cast<long long>(channels), static_cast<long long>(out));
  }
}

}  // namespace

// 0 and the traffic, or 2 and the message of the simt::Error.
extern "C" __attribute__((visibility("default"))) int run_case(const char* op, const char* dtype,
                                                               const Case* c, char* text, int size) {
  std::ostringstream result;
  int status = 0;
  simt::unwatch_all();
  try {
    kTypes.at(dtype)(op, *c);
    result << "{\"\": 0";
    for (const simt::Watched& array : simt::watched) {
      result << ", \"" << array.name << "\": [" << array.counters.load_bytes << ", "
             << array.counters.store_bytes << "]";
    }
    result << "}";
  } catch (const simt::Error& error) {
    status = 2;
    result << error.what();
  }
  simt::unwatch_all();
  snprintf(text, size, "%s", result.str().c_str());
  return status;
}

int main() {
  try {
    run_ragged<__half>("float16", false);
    run_ragged<__nv_bfloat16>("bfloat16", false);
    run_ragged<float>("float32", true);
    run_ragged<float>("float32", false);
    run_ragged<double>("float64", false);
  } catch (const simt::Error& error) {
    fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
