// What a channel's statistics and its two sums become, in whichever kernel finishes them: the folded norm,
// the gradients of its parameters, its part of the correction. Products that are added to something
// are fused by name, so that the bits are the same in every kernel.
#pragma once

#include "kernels/access.cuh"

namespace effdense::kernels {

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

template <typename A>
__device__ __forceinline__ A load_parameter(const Parameter& from, int64_t c) {
  switch (from.type) {
    case Element::float32:
      return static_cast<A>(load(static_cast<const float*>(from.data) + c));
    case Element::float64:
      return static_cast<A>(load(static_cast<const double*>(from.data) + c));
    case Element::float16:
      return static_cast<A>(static_cast<float>(load(static_cast<const __half*>(from.data) + c)));
    default:
      return static_cast<A>(static_cast<float>(load(static_cast<const __nv_bfloat16*>(from.data) + c)));
  }
}

// One channel of a norm with these statistics.
template <typename A>
__device__ __forceinline__ void fold_channel(const Fold<A>& fold, int64_t c, A mean, A var) {
  const A r = A(1) / root(var + fold.eps);
  const A scale = fold.weight.data == nullptr ? r : r * load_parameter<A>(fold.weight, c);
  const A bias = fold.bias.data == nullptr ? A(0) : load_parameter<A>(fold.bias, c);
  store(fold.rstd + c, r);
  store(fold.scale + c, scale);
  store(fold.shift + c, multiply_add(-mean, scale, bias));
}

template <typename A>
__device__ __forceinline__ void fold_channel(const Fold<A>& fold, int64_t c) {
  if (fold.running_mean.data == nullptr)
    return fold_channel(fold, c, load(fold.mean + c), load(fold.var + c));
  const A mean = load_parameter<A>(fold.running_mean, c), var = load_parameter<A>(fold.running_var, c);
  store(fold.mean + c, mean);
  store(fold.var + c, var);
  fold_channel(fold, c, mean, var);
}

// By a whole block: the channels whose statistics were there before, all but `count` from to.first on.
template <typename A>
__device__ __forceinline__ void fold_earlier(const StatisticsOut<A>& to, int64_t count) {
  for (int64_t c = threadIdx.x; c < to.then.channels; c += blockDim.x)
    if (c < to.first || c >= to.first + count) fold_channel(to.then, c);
}

template <typename A>
__device__ __forceinline__ void finish_statistics(const StatisticsOut<A>& to, int64_t c, A mean, A var) {
  store(to.mean + c, mean);
  store(to.var + c, var);
  if (to.then.channels > 0) fold_channel(to.then, to.first + c, mean, var);
}

// What is added to a and b.
template <typename A>
__device__ __forceinline__ void accumulate_channel_correction(A share, A scale, A rstd, A sum_d, A sum_dx,
                                                              A& a, A& b) {
  const A over = share * scale;
  a = multiply_add(over, sum_d, a);
  b = multiply_add(over * rstd * rstd, sum_dx, b);
}

template <typename A>
__device__ __forceinline__ void finish_sums(const SumsOut<A>& to, int64_t c, A sum_d, A sum_dx) {
  const A rstd = to.rstd == nullptr ? A(1) : load(to.rstd + c);
  store(to.sum_d + c, sum_d);
  store(to.sum_dx + c, sum_dx * rstd);
  if (to.a == nullptr) return;
  A a = to.adds ? load(to.a + c) : A(0), b = to.adds ? load(to.b + c) : A(0);
  accumulate_channel_correction(to.share, load(to.scale + c), rstd, sum_d, sum_dx, a, b);
  store(to.a + c, a);
  store(to.b + c, b);
}

}  // namespace effdense::kernels
