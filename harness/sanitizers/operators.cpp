// Every operator of csrc on the CPU, for the sanitizers: odd sizes, slices that begin anywhere, every type,
// lists of maps, whole stages. An executable, since in Python the uninstrumented libraries drown what they
// say. Results are compared elsewhere. The argument is the number of threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>

#include "sanitizers/maps.h"
#include "schemas.h"
#include "stage.h"

TORCH_LIBRARY(effdense, m) {
  effdense::define_operators(m);
  effdense::define_cpu_operators(m);
  effdense::define_stage(m);
  // As effdense/ops/schemas.py has them: kernels of the CPU's.
  m.def(
      "update_running_statistics(Tensor(a!)[] running, Tensor[] batch, float[] running_factors, float[] "
      "batch_factors) -> ()");
  m.def("count_batches(Tensor(a!)[] counters) -> ()");
  m.def(
      "update_from_vectors(Tensor vectors, int[] starts, Tensor(a!)[] running, float[] running_factors,"
      " float[] batch_factors, Tensor(b!)[] counters, bool any) -> ()");
}
TORCH_LIBRARY_IMPL(effdense, CPU, m) { effdense::implement_stage<effdense::cpu_backend>(m); }

namespace effdense::sanitizers {

int count_threads() { return at::get_num_threads(); }

namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Order = Lie::Order;

std::set<std::string> called;

// Calls an operator by its name and returns what it returns.
template <typename... Arguments>
torch::jit::Stack call(const std::string& op, const Arguments&... arguments) {
  called.insert("effdense::" + op);
  torch::jit::Stack stack;
  (stack.emplace_back(arguments), ...);
  c10::Dispatcher::singleton().findSchemaOrThrow(("effdense::" + op).c_str(), "").callBoxed(stack);
  return stack;
}

template <typename... Arguments>
void refuse(const char* op, const Arguments&... arguments) {
  try {
    call(op, arguments...);
  } catch (const c10::Error&) {
    return;
  }
  TORCH_CHECK(false, op, " was to be refused");
}

at::ScalarType wide(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// What a norm over so many channels has, one element behind the beginning of their memory.
struct Vectors {
  Vectors(int64_t channels, at::ScalarType type)
      : scale({channels}, wide(type), false, 1),
        shift({channels}, wide(type), false, 1),
        mean({channels}, wide(type), false, 1),
        rstd({channels}, wide(type), true, 1),
        a({channels}, wide(type), false, 1),
        b({channels}, wide(type), false, 1) {}
  Flat scale, shift, mean, rstd, a, b;
};

Sizes with(Sizes sizes, int64_t channels) {
  sizes[1] = channels;
  return sizes;
}

void run_maps(const Sizes& sizes, at::ScalarType type, Lie lie, Lie read) {
  Map x(sizes, type, read), dense(sizes, type, lie), grad(sizes, type, lie), out(sizes, type, lie);
  Vectors v(sizes[1], type);
  call("channel_statistics", Tensors{x});
  call("append_features", x.tensor(), out.tensor());
  call("apply_correction", x.tensor(), v.mean.tensor(), v.a.tensor(), v.b.tensor(), grad.tensor(),
       out.tensor());
  call("apply_correction", x.tensor(), v.mean.tensor(), v.a.tensor(), v.b.tensor(), grad.tensor(),
       grad.tensor());
  call("bn_relu", x.tensor(), v.scale.tensor(), v.shift.tensor(), out.tensor());
  call("bn_relu_backward_sums", grad.tensor(), x.tensor(), v.scale.tensor(), v.shift.tensor(),
       v.mean.tensor(), out.tensor());
  for (const bool batch_statistics : {false, true})
    call("bn_relu_backward", grad.tensor(), x.tensor(), v.scale.tensor(), v.shift.tensor(), v.mean.tensor(),
         v.rstd.tensor(), batch_statistics);
  call("bn_relu_backward_accumulate", dense.tensor(), x.tensor(), v.scale.tensor(), v.shift.tensor(),
       v.mean.tensor(), out.tensor());
  for (Map* map : {&x, &dense, &grad, &out}) map->check("an operator on maps");
}

void run_pools(const Sizes& sizes, at::ScalarType type, Lie lie, const Sizes& kernel, const Sizes& stride,
               const Sizes& padding) {
  Map x(sizes, type, lie), grad_x(sizes, type, lie);
  Vectors v(sizes[1], type);
  Sizes pooled{sizes[0], sizes[1]}, averaged = pooled;
  for (size_t i = 0; i < kernel.size(); ++i) {
    pooled.push_back((sizes[i + 2] + 2 * padding[i] - kernel[i]) / stride[i] + 1);
    averaged.push_back(sizes[i + 2] / kernel[i]);
  }
  Map grad(pooled, type, lie), grad_averaged(averaged, type, lie);
  const auto found =
      call("bn_relu_max_pool", x.tensor(), v.scale.tensor(), v.shift.tensor(), kernel, stride, padding);
  call("max_pool_backward", grad.tensor(), found[1].toTensor(), kernel, stride, padding, grad_x.tensor());
  call("bn_relu_avg_pool", x.tensor(), v.scale.tensor(), v.shift.tensor(), kernel);
  call("bn_relu_avg_pool_backward", grad_averaged.tensor(), x.tensor(), v.scale.tensor(), v.shift.tensor(),
       v.mean.tensor(), kernel, grad_x.tensor());
  for (Map* map : {&x, &grad_x, &grad, &grad_averaged}) map->check("a pool");
}

// `of_lists`: the channels come as three maps, each of which lies in another order, and the second's gradient
// is not wanted.
void run_bottleneck(const Sizes& sizes, int64_t out_channels, at::ScalarType type, Lie lie, bool of_lists) {
  const int64_t channels = sizes[1];
  const Sizes parts = of_lists ? Sizes{channels / 3 + 1, channels / 3 + 1, channels - 2 * (channels / 3 + 1)}
                               : Sizes{channels};
  std::vector<std::unique_ptr<Map>> maps;
  Tensors features, grads;
  for (size_t i = 0; i < parts.size(); ++i) {
    Lie own = lie;
    own.order = std::array{Order::pixels, Order::channels, Order::reversed}[i];
    maps.push_back(std::make_unique<Map>(with(sizes, parts[i]), type, own));
    features.push_back(*maps.back());
    maps.push_back(std::make_unique<Map>(with(sizes, parts[i]), type, lie));
    grads.push_back(i == 1 ? at::empty({0}, at::dtype(type)) : maps.back()->tensor());
  }
  Map y(with(sizes, out_channels), type, lie), grad_y(with(sizes, out_channels), type, lie);
  Flat weight({out_channels, channels}, type, false, lie.before), bias({out_channels}, wide(type));
  Vectors v(channels, type), of_out(out_channels, type);
  const std::optional<Tensor> none;
  for (const bool more : {false, true}) {
    const auto maybe = [&](Flat& flat) { return more ? std::optional<Tensor>(flat.tensor()) : none; };
    call("bottleneck", features, v.scale.tensor(), v.shift.tensor(), weight.tensor(), maybe(bias),
         maybe(of_out.scale), maybe(of_out.shift), !more, y.tensor());
  }
  const Tensors corrected{y, of_out.mean, of_out.a, of_out.b};
  const Tensors masked{y, of_out.mean, of_out.a, of_out.b, of_out.scale, of_out.shift};
  for (const auto& [correction, accumulate, need_features, need_weight] :
       {std::tuple(Tensors{}, false, true, true), std::tuple(corrected, true, true, true),
        std::tuple(masked, true, true, false), std::tuple(masked, false, false, true)})
    call("bottleneck_backward", features, grad_y.tensor(), v.scale.tensor(), v.shift.tensor(),
         v.mean.tensor(), weight.tensor(), grads, accumulate, need_features, need_weight, correction);
  for (auto& map : maps) map->check("bottleneck");
  y.check("bottleneck");
  grad_y.check("bottleneck_backward");
}

void run_convolution(const Sizes& sizes, int64_t out_channels, at::ScalarType type, Lie lie) {
  Map x(sizes, type, lie), grad_x(sizes, type, lie);
  Map out(with(sizes, out_channels), type, lie), grad(with(sizes, out_channels), type, lie);
  Sizes kernel(sizes.size(), 3);
  kernel[0] = out_channels;
  kernel[1] = sizes[1];
  Flat weight(kernel, type), bias({out_channels}, wide(type));
  Vectors v(sizes[1], type);
  for (const std::optional<Tensor>& given : {std::optional<Tensor>(), std::optional<Tensor>(bias.tensor())})
    call("bn_relu_conv3x3", x.tensor(), v.scale.tensor(), v.shift.tensor(), weight.tensor(), given,
         out.tensor());
  for (const auto& [accumulate, need_x, need_weight] :
       {std::tuple(false, true, true), std::tuple(true, true, false), std::tuple(false, false, true)})
    call("bn_relu_conv3x3_backward", grad.tensor(), x.tensor(), v.scale.tensor(), v.shift.tensor(),
         v.mean.tensor(), weight.tensor(), grad_x.tensor(), accumulate, need_x, need_weight);
  for (Map* map : {&x, &grad_x, &out, &grad}) map->check("bn_relu_conv3x3");
}

void run_vectors(int64_t channels, at::ScalarType type) {
  Vectors v(channels, type);
  Flat weight({channels}, at::kBFloat16), moved({channels}, type), counter({1}, at::kDouble);
  const std::optional<Tensor> none, some(weight.tensor());
  call("fold", v.mean.tensor(), v.rstd.tensor(), none, none, 1e-5);
  call("fold", v.mean.tensor(), v.rstd.tensor(), some, some, 1e-5);
  call("accumulate_correction", v.mean.tensor(), v.shift.tensor(), v.rstd.tensor(), v.scale.tensor(),
       int64_t{7}, v.a.tensor(), v.b.tensor());
  const std::vector<double> keep{0.9, 0.5}, take{0.1, 0.5};
  call("update_running_statistics", Tensors{moved, v.a}, Tensors{v.mean, v.mean}, keep, take);
  const Tensor batches = at::zeros({}, at::kLong);
  call("count_batches", Tensors{batches, counter});
  Flat vectors({2 * channels}, wide(type), true);
  call("update_from_vectors", vectors.tensor(), Sizes{0, channels}, Tensors{moved, v.b}, keep, take,
       Tensors{batches}, true);
}

struct StageOf {
  Sizes sizes;
  Sizes pool;
  int64_t growth, width, layers;  // width 0: layers without a bottleneck
  bool newest_first, drops;
};

// A whole stage, forward and backward.
void run_stage(const StageOf& s, at::ScalarType type, const char* memory) {
  const bool bottleneck = s.width > 0, infers = std::string(memory) == "inference";
  std::vector<std::unique_ptr<Flat>> owned;
  const auto vector = [&](int64_t count) -> Tensor& {
    return *owned.emplace_back(std::make_unique<Flat>(Sizes{count}, wide(type), true));
  };
  const auto weight = [&](int64_t out, int64_t in, int64_t side) -> Tensor& {
    Sizes kernel(s.sizes.size(), side);
    kernel[0] = out;
    kernel[1] = in;
    return *owned.emplace_back(std::make_unique<Flat>(kernel, type));
  };
  OptionalTensors parameters, running, masks;
  std::vector<double> eps, drop;
  c10::List<bool> batch_statistics, needs({true});
  int64_t channels = s.sizes[1];
  const auto norm = [&](int64_t size) {
    for (int i = 0; i < 2; ++i) {
      parameters.push_back(vector(size));
      running.push_back(infers ? std::optional<Tensor>(vector(size)) : std::nullopt);
    }
    eps.push_back(1e-5);
    batch_statistics.push_back(!infers);
  };
  const auto convolution = [&](Tensor& conv_weight) {
    parameters.push_back(conv_weight);
    parameters.push_back(std::optional<Tensor>());
  };
  for (int64_t i = 0; i < s.layers; ++i, channels += s.growth) {
    norm(channels);
    if (bottleneck) {
      convolution(weight(s.width, channels, 1));
      norm(s.width);
    }
    convolution(weight(s.growth, bottleneck ? s.width : channels, 3));
    for (const int64_t dropped : {bottleneck ? s.width : channels, s.growth}) {
      if (!s.drops) continue;
      const bool there = dropped == s.growth;
      masks.push_back(there ? std::optional<Tensor>(at::ones(with(s.sizes, dropped), at::dtype(type)))
                            : std::nullopt);
      drop.push_back(there ? 0.5 : 0.0);
    }
  }
  if (!s.pool.empty()) {
    norm(channels);
    convolution(weight(channels / 2, channels, 1));
  }
  for (size_t i = 0; i < parameters.size(); ++i) needs.push_back(parameters.get(i).has_value());
  Map x(s.sizes, type, {Order::pixels, 1, 2});
  const std::string mode = memory;
  const Sizes dilation;
  const auto scratch = [&](bool backward) {
    const auto bytes =
        call("stage_scratch", x.tensor(), s.sizes[1], parameters, masks, bottleneck, mode, int64_t{0}, eps,
             batch_statistics, drop, s.pool, dilation, s.newest_first, backward)[0];
    return at::empty({bytes.toInt()}, at::kByte);
  };
  const auto made =
      call("stage_forward", x.tensor(), parameters, running, masks, bottleneck, mode, int64_t{0}, eps,
           batch_statistics, drop, s.pool, dilation, s.newest_first, scratch(false));
  if (infers) return;
  const Tensor features = made[1].toTensor(), saved = made[2].toTensor(), vectors = made[3].toTensor();
  const Tensor grad = at::ones_like(s.pool.empty() ? features : made[0].toTensor());
  c10::List<bool> pool_needs;
  OptionalTensors pool_parameters;
  for (size_t i = s.pool.empty() ? parameters.size() : parameters.size() - 4; i < parameters.size(); ++i) {
    pool_needs.push_back(needs.get(i + 1));
    pool_parameters.push_back(parameters.get(i));
  }
  const auto started = call("stage_start_backward", grad, features, vectors, pool_parameters, pool_needs,
                            1e-5, true, s.pool)[0]
                           .toTensorVector();
  call("stage_backward", started[0], started[1], started[2], s.sizes[1], features, saved, vectors, parameters,
       masks, needs, bottleneck, mode, int64_t{0}, eps, batch_statistics, drop, s.pool, dilation,
       s.newest_first, scratch(true));
  x.check("stage_forward");
}

// Numbers that do not fit are refused without having been computed with.
void run_refusals() {
  Map x({1, 3, 4, 4}, at::kFloat), grad({1, 3, 2, 2}, at::kFloat);
  Vectors v(3, at::kFloat);
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  for (const int64_t huge : {most, most / 2 + 1, most / 4}) {
    refuse("bn_relu_avg_pool", x.tensor(), v.scale.tensor(), v.shift.tensor(), Sizes{huge, huge});
    for (const Sizes& kernel : {Sizes{2, 2}, Sizes{huge, huge}})
      refuse("bn_relu_max_pool", x.tensor(), v.scale.tensor(), v.shift.tensor(), kernel, Sizes{1, 1},
             Sizes{huge, huge});
  }
  // A step that is as long as can be is allowed: there is one window.
  call("bn_relu_max_pool", x.tensor(), v.scale.tensor(), v.shift.tensor(), Sizes{3, 3}, Sizes{most, most},
       Sizes{1, 1});
}

void run_all(at::ScalarType type) {
  const std::vector<Lie> lies{{}, {Order::pixels, 1, 2}, {Order::pixels, 4, 0}, {Order::pixels, 16, 5}};
  for (const Sizes& sizes : {Sizes{1, 1, 1},
                             {2, 3, 5},
                             {1, 13, 3, 5},
                             {3, 40, 7, 9},
                             {2, 24, 2, 3, 4},
                             {2, 300, 4, 5},
                             {2, 12, 20, 21},
                             {0, 4, 3, 3}}) {
    for (const Lie& lie : lies) run_maps(sizes, type, lie, lie);
    for (const Order order : {Order::channels, Order::reversed})
      run_maps(sizes, type, lies[1], {order, 3, 0});
  }
  for (const Lie& lie : lies)
    for (const int64_t channels : {1, 3, 12, 40}) {
      run_pools({2, channels, 9, 8}, type, lie, {3, 3}, {2, 2}, {1, 1});
      run_pools({3, channels, 7, 7}, type, lie, {7, 7}, {1, 1}, {0, 0});
      run_pools({2, channels, 5}, type, lie, {2}, {3}, {1});
      run_pools({2, channels, 4, 3, 5}, type, lie, {2, 1, 4}, {1, 2, 3}, {1, 0, 2});
    }
  for (const Lie& lie : lies) {
    for (const auto& [sizes, out_channels] : {std::pair(Sizes{1, 1, 1}, 1),
                                              {{1, 3, 7}, 5},
                                              {{2, 12, 13, 5}, 48},
                                              {{1, 130, 33}, 48},
                                              {{1, 40, 5, 8}, 160},
                                              {{2, 13, 20, 21}, 12},
                                              {{3, 16, 2, 2}, 16},
                                              {{0, 4, 3, 3}, 8}})
      run_bottleneck(sizes, out_channels, type, lie, false);
    run_bottleneck({2, 22, 7, 9}, 48, type, lie, true);
    run_bottleneck({1, 7, 2, 3, 3}, 4, type, lie, true);
    for (const auto& [sizes, out_channels] : {std::pair(Sizes{1, 1, 1, 1}, 1),
                                              {{2, 3, 5}, 2},
                                              {{1, 5, 3, 4}, 3},
                                              {{2, 48, 9, 7}, 12},
                                              {{1, 16, 4, 5}, 12},
                                              {{2, 32, 3, 3}, 32},
                                              {{1, 20, 17, 40}, 7},
                                              {{2, 6, 3, 4, 5}, 4},
                                              {{1, 16, 2, 2, 3}, 8}})
      run_convolution(sizes, out_channels, type, lie);
  }
  for (const int64_t channels : {1, 13, 300}) run_vectors(channels, type);
  for (const char* memory : {"balanced", "minimal", "inference"})
    for (const StageOf& stage : {StageOf{{2, 7, 6, 5}, {2, 2}, 3, 8, 3, false, false},
                                 {{2, 6, 4, 4}, {}, 5, 0, 2, true, true},
                                 {{1, 4, 9}, {9}, 2, 4, 2, true, false},
                                 {{1, 5, 3, 4, 4}, {}, 4, 12, 2, false, true}})
      run_stage(stage, type, memory);
}

// Of the operators that are defined, those that have not been called.
std::string forgotten() {
  std::string names;
  for (const c10::OperatorName& op : c10::Dispatcher::singleton().getAllOpNames())
    if (op.name.rfind("effdense::", 0) == 0 && called.count(op.name) == 0) names += " " + op.name;
  return names;
}

}  // namespace
}  // namespace effdense::sanitizers

int main(int count, char** arguments) {
  using namespace effdense::sanitizers;
  if (count != 2) {
    fputs("usage: operators THREADS\n", stderr);
    return 2;
  }
  try {
    const c10::InferenceMode without_autograd;
    at::set_num_threads(std::atoi(arguments[1]));
    for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kBFloat16}) run_all(type);
    run_refusals();
    TORCH_CHECK(forgotten().empty(), "harness/sanitizers does not call", forgotten());
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  printf("%zu operators have run with %d threads on %s\n", called.size(), at::get_num_threads(),
         at::get_cpu_capability().c_str());
  return 0;
}
