// Operators on one number per channel: fold, accumulate_correction, and the update of running statistics.
// They are operators because a deep net has hundreds of norms, and a handful of tensor operations for each
// would cost more than its pixels.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/results.h"

namespace effdense {
namespace {

void fold(const FoldOf& norm, const Tensor& weight, const Tensor& bias) {
  const Tensor& mean = norm.mean;
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), "fold", [&] {
    const scalar_t *mean_data = mean.const_data_ptr<scalar_t>(),
                   *var_data = norm.var.const_data_ptr<scalar_t>();
    const scalar_t* weight_data = weight.defined() ? weight.const_data_ptr<scalar_t>() : nullptr;
    const scalar_t* bias_data = bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr;
    scalar_t *rstd_data = norm.rstd.mutable_data_ptr<scalar_t>(),
             *scale_data = norm.scale.mutable_data_ptr<scalar_t>(),
             *shift_data = norm.shift.mutable_data_ptr<scalar_t>();
    for (int64_t c = 0; c < mean.numel(); ++c) {
      rstd_data[c] = scalar_t(1) / std::sqrt(var_data[c] + static_cast<scalar_t>(norm.eps));
      scale_data[c] = weight_data == nullptr ? rstd_data[c] : rstd_data[c] * weight_data[c];
      shift_data[c] = (bias_data == nullptr ? scalar_t(0) : bias_data[c]) - mean_data[c] * scale_data[c];
    }
  });
}

void copy_vector(const Tensor& to, const Tensor& from) {
  if (from.scalar_type() == to.scalar_type() && from.is_contiguous() && from.sizes() == to.sizes())
    std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), to.nbytes());
  else
    to.copy_(from);
}

void fold_all(at::ArrayRef<FoldOf> norms) {
  for (const FoldOf& norm : norms) {
    if (norm.running_mean.defined()) {
      copy_vector(norm.mean, norm.running_mean);
      copy_vector(norm.var, norm.running_var);
    }
    fold(norm, norm_parameter("fold", "weight", given(norm.weight), norm.mean),
         norm_parameter("fold", "bias", given(norm.bias), norm.mean));
  }
}

std::tuple<Tensor, Tensor, Tensor> fold(const Tensor& mean, const Tensor& var,
                                        const std::optional<Tensor>& weight,
                                        const std::optional<Tensor>& bias, double eps) {
  constexpr const char* op = "fold";
  check_per_channel(op, "mean", mean, mean, mean.numel());
  check_per_channel(op, "var", var, mean, mean.numel());
  const Tensor w = norm_parameter(op, "weight", weight, mean), b = norm_parameter(op, "bias", bias, mean);
  const FoldOf norm{mean, var, w, b, eps, at::empty_like(mean), at::empty_like(mean), at::empty_like(mean)};
  fold(norm, w, b);
  return {norm.rstd, norm.scale, norm.shift};
}

}  // namespace

void accumulate_correction(const Tensor& sum_d, const Tensor& sum_dx, const Tensor& rstd, const Tensor& scale,
                           int64_t count, Tensor& a, Tensor& b) {
  constexpr const char* op = "accumulate_correction";
  const int64_t channels = sum_d.numel();
  check_accumulate_correction(op, sum_d, sum_dx, rstd, scale, a, b);
  AT_DISPATCH_FLOATING_TYPES(sum_d.scalar_type(), op, [&] {
    const scalar_t *d = sum_d.const_data_ptr<scalar_t>(), *dx = sum_dx.const_data_ptr<scalar_t>();
    const scalar_t *r = rstd.const_data_ptr<scalar_t>(), *s = scale.const_data_ptr<scalar_t>();
    scalar_t *to_a = a.mutable_data_ptr<scalar_t>(), *to_b = b.mutable_data_ptr<scalar_t>();
    const scalar_t share = scalar_t(1) / static_cast<scalar_t>(std::max<int64_t>(count, 1));
    for (int64_t c = 0; c < channels; ++c) {
      to_a[c] += share * s[c] * d[c];
      to_b[c] += share * s[c] * r[c] * r[c] * dx[c];
    }
  });
}

namespace {

// What moves statistics makes no tensor: out of memory, some would have moved and others not.
void count_batch(const Tensor& counter) {
  if (counter.is_cpu() && counter.scalar_type() == at::kLong && counter.numel() == 1)
    ++*counter.mutable_data_ptr<int64_t>();
  else
    counter.add_(1);
}

void count_batches(TensorList counters) {
  for (const Tensor& counter : counters) count_batch(counter);
}

void update_running_statistics(const Tensor& to, const Tensor& batch, double running_factor,
                               double batch_factor) {
  const bool plain = to.is_cpu() && batch.is_cpu() && to.is_contiguous() && batch.is_contiguous();
  if (!plain || batch.scalar_type() != accumulate_type(to.scalar_type())) {
    to.mul_(running_factor).add_(batch, batch_factor);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, to.scalar_type(), "update_running_statistics", [&] {
        using A = at::opmath_type<scalar_t>;
        scalar_t* to_data = to.mutable_data_ptr<scalar_t>();
        const A* from = batch.const_data_ptr<A>();
        const A old_factor = static_cast<A>(running_factor), new_factor = static_cast<A>(batch_factor);
        for (int64_t c = 0; c < to.numel(); ++c)
          to_data[c] = static_cast<scalar_t>(old_factor * static_cast<A>(to_data[c]) + new_factor * from[c]);
      });
}

// running <- running_factor * running + batch_factor * batch for every pair; schema in
// effdense/ops/schemas.py, as plain PyTorch needs it too.
void update_running_statistics(TensorList running, TensorList batch, at::ArrayRef<double> running_factors,
                               at::ArrayRef<double> batch_factors) {
  constexpr const char* op = "update_running_statistics";
  const size_t count = running.size();
  TORCH_CHECK_VALUE(batch.size() == count && running_factors.size() == count && batch_factors.size() == count,
                    op, ": batch, running_factors and batch_factors must have ", count,
                    " elements (one per running statistic), got ", batch.size(), ", ", running_factors.size(),
                    " and ", batch_factors.size());
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(batch[i].sizes() == running[i].sizes(), op, ": batch[", i, "] must have shape ",
                      running[i].sizes(), ", got ", batch[i].sizes());
    update_running_statistics(running[i], batch[i], running_factors[i], batch_factors[i]);
  }
}

// The same from a stage's vectors, where each statistic's batch starts at its place; the counters count a
// batch.
void update_from_vectors(const Tensor& vectors, at::IntArrayRef starts, TensorList running,
                         at::ArrayRef<double> running_factors, at::ArrayRef<double> batch_factors,
                         TensorList counters, bool any) {
  constexpr const char* op = "update_from_vectors";
  if (!any) return count_batches(counters);
  TORCH_CHECK_VALUE(starts.size() == running.size() && running_factors.size() == running.size() &&
                        batch_factors.size() == running.size(),
                    op, ": starts, running_factors and batch_factors must have ", running.size(),
                    " elements (one per running statistic), got ", starts.size(), ", ",
                    running_factors.size(), " and ", batch_factors.size());
  std::vector<Tensor> batch(running.size());  // all of them before anything moves: memory may run out
  for (size_t i = 0; i < running.size(); ++i) batch[i] = vectors.narrow(0, starts[i], running[i].numel());
  count_batches(counters);
  for (size_t i = 0; i < running.size(); ++i)
    update_running_statistics(running[i], batch[i], running_factors[i], batch_factors[i]);
}

}  // namespace

TORCH_LIBRARY_IMPL(effdense, CPU, m) {
  m.impl("count_batches", count_batches);
  m.impl("update_from_vectors", update_from_vectors);
  m.impl("fold", static_cast<ThreeTensors (*)(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                              const std::optional<Tensor>&, double)>(fold));
  cpu_backend.fold = fold_all;
  m.impl("accumulate_correction", accumulate_correction);
  m.impl("update_running_statistics",
         static_cast<void (*)(TensorList, TensorList, at::ArrayRef<double>, at::ArrayRef<double>)>(
             update_running_statistics));
}

}  // namespace effdense
