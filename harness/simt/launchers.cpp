// Every launcher on memory that ends where its matrices end, for the sanitizers: an executable, since in a
// torch extension the uninstrumented libraries drown them. Results are compared elsewhere. Built by g++ it
// runs on the CPU, by nvcc on a GPU, under compute-sanitizer (benchmarks/gpu/launchers.py).
#include "kernels/launchers.h"

#include <cstdio>
#include <utility>
#include <vector>

#include "kernels/bottleneck_launchers.h"
#include "kernels/compat.cuh"
#include "simt/launchers_memory.h"

namespace effdense::kernels {
namespace {

template <typename T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> values(count);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(static_cast<float>(i * 37 % 101));
  return values;
}

// A matrix in a block of memory of its own, from `first` elements behind its beginning to its last row's last
// channel.
template <typename T>
struct Owner {
  Memory<T> memory;
  Matrix<T> matrix;

  Owner(Size size, int64_t step, int64_t first)
      : memory(numbers<T>(size.rows == 0 ? 0 : first + (size.rows - 1) * step + size.channels)),
        matrix{memory.data() + first, step} {}
  Matrix<const T> read() const { return {matrix.data, matrix.step}; }
};

template <typename A>
Parameter parameter(Memory<A>& vector) {
  return {vector.data(), sizeof(A) == 8 ? Element::float64 : Element::float32};
}

template <typename A>
struct Vectors {
  Memory<A> scale, shift, mean, rstd, a, b;
  explicit Vectors(int64_t channels)
      : scale(channels, A(0.5)),
        shift(channels, A(1)),
        mean(channels, A(0.1)),
        rstd(channels, A(2)),
        a(channels, A(3)),
        b(channels, A(0.25)) {}
  Norm<A> norm() const { return {scale.data(), shift.data(), mean.data(), rstd.data()}; }
};

// What calls have for partial sums, and for counting.
template <typename A>
struct Temporary {
  Memory<A> partial;
  Memory<int> counters;
  explicit Temporary(int64_t size) : partial(size), counters(kCounters, 0) {}
  Scratch<A> scratch() { return {partial.data(), counters.data()}; }
};

template <typename T>
void run_maps(Size size, int64_t step, int64_t first) {
  using A = acc_t<T>;
  Owner<T> x(size, step, first), grad(size, step, first), out(size, step, first);
  Vectors<A> v(size.channels);
  Temporary<A> temporary(workspace_size<T>(size));
  const Scratch<A> scratch = temporary.scratch();
  Memory<A> one(size.channels), two(size.channels), a(size.channels), b(size.channels);
  channel_statistics(size, x.read(), {one.data(), two.data()}, scratch, nullptr);
  // Folded with two channels before them and one behind.
  const int64_t wide = size.channels + 3;
  Vectors<A> of_norm(wide);
  Memory<A> rstd(wide), scale(wide), shift(wide);
  const Fold<A> then{wide,
                     of_norm.mean.data(),
                     of_norm.rstd.data(),
                     parameter(of_norm.scale),
                     parameter(of_norm.shift),
                     A(0.1),
                     rstd.data(),
                     scale.data(),
                     shift.data(),
                     {},
                     {}};
  append_features<T>(size, x.read(), out.matrix, {of_norm.mean.data() + 2, of_norm.rstd.data() + 2, then, 2},
                     scratch, nullptr);
  const SumsOut<A> sums{one.data(), two.data()};
  const SumsOut<A> with_correction{one.data(), two.data(), v.rstd.data(), v.scale.data(),
                                   a.data(),   b.data(),   false,         A(0.25)};
  apply_correction(size, x.read(), v.mean.data(), v.a.data(), v.b.data(), grad.read(), out.matrix, nullptr);
  bn_relu(size, x.read(), v.norm(), out.matrix, nullptr);
  for (const bool batch_statistics : {false, true})
    bn_relu_backward<T>(size, grad.matrix, x.read(), v.norm(), batch_statistics, sums, scratch, nullptr);
  bn_relu_backward_sums<T>(size, grad.read(), x.read(), v.norm(), out.matrix, with_correction, scratch,
                           nullptr);
  bn_relu_backward_accumulate<T>(size, grad.read(), x.read(), v.norm(), out.matrix, sums, scratch, nullptr);
}

template <typename T>
void run_pools(Windows windows, int64_t more, int64_t first) {
  using A = acc_t<T>;
  const auto pixels = [](const int (&size)[3]) { return int64_t{1} * size[0] * size[1] * size[2]; };
  const Size in{windows.images * pixels(windows.in), windows.channels};
  const Size out{windows.images * pixels(windows.out), windows.channels};
  const int64_t step = windows.channels + more;
  Owner<T> x(in, step, first), grad_x(in, step, first), y(out, step, first);
  Owner<uint8_t> where(out, windows.channels, 0);
  Vectors<A> v(windows.channels);
  bn_relu_max_pool(windows, x.read(), v.norm(), y.matrix, where.matrix, nullptr);
  max_pool_backward(windows, y.read(), where.read(), grad_x.matrix, nullptr);
  for (int axis = 0; axis < 3; ++axis) {
    windows.stride[axis] = windows.kernel[axis];
    windows.padding[axis] = 0;
    windows.out[axis] = windows.in[axis] / windows.kernel[axis];
  }
  const Size averaged{windows.images * pixels(windows.out), windows.channels};
  Owner<T> pooled(averaged, step, first);
  Memory<A> workspace(avg_pool_workspace_size<T>(windows)), one(windows.channels), two(windows.channels);
  bn_relu_avg_pool(windows, x.read(), v.norm(), pooled.matrix, nullptr);
  bn_relu_avg_pool_backward<T>(windows, pooled.read(), x.read(), v.norm(), grad_x.matrix,
                               {one.data(), two.data()}, {workspace.data(), nullptr}, nullptr);
}

template <typename T>
void run_bottleneck(Size size, int64_t out_channels, int64_t more, bool tf32) {
  using A = acc_t<T>;
  const Size out{size.rows, out_channels};
  Owner<T> x(size, size.channels + more, 0), grad_x(size, size.channels + more, 0);
  Owner<T> y(out, out_channels + more, 0), grad_y(out, out_channels + more, 0);
  Owner<T> weight({out_channels, size.channels}, size.channels, 0);
  Vectors<A> v(size.channels), of_out(out_channels);
  Memory<A> mean(out_channels), var(out_channels), sum_d(size.channels), sum_dx(size.channels);
  Memory<A> grad_weight(out_channels * size.channels);
  Temporary<A> temporary(bottleneck_workspace_size<T>(size, out_channels));
  bottleneck<T>(size, out_channels, x.read(), v.norm(), weight.read(),
                {of_out.mean.data(), of_out.scale.data(), of_out.shift.data()}, tf32, y.matrix,
                {mean.data(), var.data()}, temporary.scratch(), nullptr);
  Memory<A> workspace(bottleneck_backward_workspace_size<T>(size, out_channels));
  const Correction<T> correction{y.read(),        of_out.mean.data(),  of_out.a.data(),
                                 of_out.b.data(), of_out.scale.data(), of_out.shift.data()};
  bottleneck_backward<T>(size, out_channels, x.read(), grad_y.read(), correction, v.norm(), weight.read(),
                         tf32, grad_x.matrix, true, grad_weight.data(), {sum_d.data(), sum_dx.data()},
                         workspace.data(), nullptr);
}

// Sizes, out channels, what a step is longer than its channels: every tile, pieces of every size.
template <typename T>
void run_bottlenecks(bool tf32 = false) {
  assumed_multiprocessors = 1;  // the largest tiles
  run_bottleneck<T>({1, 1}, 1, 0, tf32);
  run_bottleneck<T>({7, 3}, 5, 0, tf32);
  run_bottleneck<T>({130, 12}, 48, 4, tf32);
  run_bottleneck<T>({33, 130}, 48, 4, tf32);
  run_bottleneck<T>({40, 40}, 160, 8, tf32);
  run_bottleneck<T>({33, 24}, 200, 1, tf32);
  run_bottleneck<T>({600, 13}, 12, 3, tf32);
  assumed_multiprocessors = 3;  // 64 pixels
  run_bottleneck<T>({130, 12}, 48, 4, tf32);
  assumed_multiprocessors = 5;  // 32 pixels
  run_bottleneck<T>({130, 12}, 48, 4, tf32);
  assumed_multiprocessors = 132;  // 16 pixels
  run_bottleneck<T>({7, 3}, 5, 0, tf32);
  run_bottleneck<T>({33, 130}, 48, 4, tf32);
  assumed_multiprocessors = 0;
}

template <typename T>
void run_all() {
  for (const Size size : {Size{1, 1}, {9, 3}, {70, 12}, {49, 13}, {300, 24}, {33, 40}, {20, 300}})
    for (const auto& [first, more] : {std::pair{0, 0}, {0, 8}, {4, 8}, {1, 3}})
      run_maps<T>(size, size.channels + more, first);
  for (const int64_t channels : {1, 3, 12, 24})
    for (const int64_t more : {0, 8}) {
      run_pools<T>({2, channels, {1, 9, 8}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, {1, 5, 4}}, more, more);
      run_pools<T>({3, channels, {1, 7, 7}, {1, 7, 7}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}}, more, more);
      run_pools<T>({2, channels, {4, 3, 5}, {2, 1, 4}, {1, 2, 3}, {1, 0, 2}, {5, 2, 2}}, more, more);
    }
}

template <typename A>
void run_vectors(int64_t channels) {
  Vectors<A> v(channels);
  Memory<A> rstd(channels), scale(channels), shift(channels);
  std::vector<Fold<A>> folds(30);  // more than one launch has
  folds[0] =
      folds[29] = {channels,    v.mean.data(), v.rstd.data(), parameter(v.scale), parameter(v.shift), A(0.1),
                   rstd.data(), scale.data(),  shift.data(),  parameter(v.a),     parameter(v.b)};
  fold(folds.data(), static_cast<int64_t>(folds.size()), nullptr);
  accumulate_correction(channels, v.mean.data(), v.shift.data(), v.rstd.data(), v.scale.data(), 7, v.a.data(),
                        v.b.data(), nullptr);
}

}  // namespace
}  // namespace effdense::kernels

int main() {
  using namespace effdense::kernels;
  try {
    run_all<float>();
    run_all<double>();
    run_all<__half>();
    run_bottlenecks<float>();
    run_bottlenecks<float>(true);
    run_bottlenecks<double>();
    run_bottlenecks<__half>();
#ifndef __SANITIZE_THREAD__  // which is slow, and barriers are the same in both types of 16 bits
    run_all<__nv_bfloat16>();
    run_bottlenecks<__nv_bfloat16>();
#endif
    for (const int channels : {0, 1, 13, 300}) {
      run_vectors<float>(channels);
      run_vectors<double>(channels);
    }
    wait_for_device();
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  puts("every launcher has run");
  return 0;
}
