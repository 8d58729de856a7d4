// Adapts operators that return their results to a stage, which wants them written to given places. A copy of
// a few numbers costs nothing here.
#pragma once

#include <ATen/ops/zeros_like.h>

#include <cstring>

#include "backend.h"

namespace effdense {

void accumulate_correction(const Tensor& sum_d, const Tensor& sum_dx, const Tensor& rstd, const Tensor& scale,
                           int64_t count, Tensor& a, Tensor& b);  // vectors.cpp

inline void put(StatisticsTo& to, const TwoVectors& values) {
  const auto& [mean, var] = values;
  if (!to.mean.defined()) {
    to.mean = mean;
    to.var = var;
  } else {
    std::memcpy(to.mean.mutable_data_ptr(), mean.const_data_ptr(), mean.nbytes());
    std::memcpy(to.var.mutable_data_ptr(), var.const_data_ptr(), var.nbytes());
  }
  if (to.then != nullptr) cpu_backend.fold(*to.then);
}

inline void put(SumsTo& to, const Tensor& sum_d, const Tensor& sum_dx) {
  using Coefficients = SumsTo::Coefficients;
  if (to.coefficients == Coefficients::made) {
    to.a = at::zeros_like(sum_d);
    to.b = at::zeros_like(sum_d);
  }
  if (to.coefficients != Coefficients::none)
    accumulate_correction(sum_d, sum_dx, to.rstd, to.scale, to.count, to.a, to.b);
  to.sum_d = sum_d;
  to.sum_dx = to.rstd.defined() ? sum_dx.mul(to.rstd) : sum_dx;
}

template <auto function, typename To>
struct PuttingTo;
template <typename... Arguments, TwoVectors (*function)(Arguments...), typename To>
struct PuttingTo<function, To> {
  static void call(To& to, Arguments... arguments) {
    if constexpr (std::is_same_v<To, StatisticsTo>) {
      put(to, function(arguments...));
    } else {
      const auto [sum_d, sum_dx] = function(arguments...);
      put(to, sum_d, sum_dx);
    }
  }
};
template <typename... Arguments, ThreeTensors (*function)(Arguments...), typename To>
struct PuttingTo<function, To> {
  static Tensor call(To& to, Arguments... arguments) {
    const auto [result, sum_d, sum_dx] = function(arguments...);
    put(to, sum_d, sum_dx);
    return result;
  }
};

// Makes a function that returns its results the CPU's operator of its name, for the dispatcher and for C++.
#define EFFDENSE_IMPLEMENT_PUTTING(m, name, To)   \
  do {                                            \
    m.impl(#name, name);                          \
    cpu_backend.name = PuttingTo<name, To>::call; \
  } while (false)

}  // namespace effdense
