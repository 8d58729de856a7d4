// What is done with one number per channel: fold, defer. As operators of their own because a deep net has
// hundreds of norms, and a handful of tensor operations for each would cost more than its pixels.
#include <ATen/OpMathType.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "backend.h"
#include "cpu/tiles.h"

namespace effdense {
namespace {

std::tuple<Tensor, Tensor, Tensor> fold(const Tensor& mean, const Tensor& var,
                                        const std::optional<Tensor>& weight,
                                        const std::optional<Tensor>& bias, double eps) {
  constexpr const char* op = "fold";
  check_per_channel(op, "mean", mean, mean, mean.numel());
  check_per_channel(op, "var", var, mean, mean.numel());
  const Tensor w = norm_parameter(op, "weight", weight, mean), b = norm_parameter(op, "bias", bias, mean);
  Tensor rstd = at::empty_like(mean), scale = at::empty_like(mean), shift = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), op, [&] {
    const scalar_t *mean_data = mean.const_data_ptr<scalar_t>(), *var_data = var.const_data_ptr<scalar_t>();
    const scalar_t* weight_data = w.defined() ? w.const_data_ptr<scalar_t>() : nullptr;
    const scalar_t* bias_data = b.defined() ? b.const_data_ptr<scalar_t>() : nullptr;
    scalar_t *rstd_data = rstd.mutable_data_ptr<scalar_t>(), *scale_data = scale.mutable_data_ptr<scalar_t>(),
             *shift_data = shift.mutable_data_ptr<scalar_t>();
    for (int64_t c = 0; c < mean.numel(); ++c) {
      rstd_data[c] = scalar_t(1) / std::sqrt(var_data[c] + static_cast<scalar_t>(eps));
      scale_data[c] = weight_data == nullptr ? rstd_data[c] : rstd_data[c] * weight_data[c];
      shift_data[c] = (bias_data == nullptr ? scalar_t(0) : bias_data[c]) - mean_data[c] * scale_data[c];
    }
  });
  return {rstd, scale, shift};
}

void defer(const Tensor& sum_d, const Tensor& sum_dx, const Tensor& rstd, const Tensor& scale, int64_t count,
           Tensor& a, Tensor& b) {
  constexpr const char* op = "defer";
  const int64_t channels = sum_d.numel();
  check_defer(op, sum_d, sum_dx, rstd, scale, a, b);
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

void update_running_statistics(const Tensor& to, const Tensor& batch, double keep, double take) {
  const bool plain = to.is_cpu() && batch.is_cpu() && to.is_contiguous() && batch.is_contiguous();
  if (!plain || batch.scalar_type() != accumulate_type(to.scalar_type())) {
    to.mul_(keep).add_(batch, take);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, to.scalar_type(), "update_running_statistics", [&] {
        using A = at::opmath_type<scalar_t>;
        scalar_t* to_data = to.mutable_data_ptr<scalar_t>();
        const A* from = batch.const_data_ptr<A>();
        const A kept = static_cast<A>(keep), taken = static_cast<A>(take);
        for (int64_t c = 0; c < to.numel(); ++c)
          to_data[c] = static_cast<scalar_t>(kept * static_cast<A>(to_data[c]) + taken * from[c]);
      });
}

// running <- keep * running + take * batch for every pair; schema in effdense/batch_norm.py, as plain PyTorch
// needs it too.
void update_running_statistics(TensorList running, TensorList batch, at::ArrayRef<double> keep,
                               at::ArrayRef<double> take) {
  constexpr const char* op = "update_running_statistics";
  const size_t count = running.size();
  TORCH_CHECK_VALUE(batch.size() == count && keep.size() == count && take.size() == count, op,
                    ": batch, keep and take must have ", count, " elements (one per running statistic), got ",
                    batch.size(), ", ", keep.size(), " and ", take.size());
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(batch[i].sizes() == running[i].sizes(), op, ": batch[", i, "] must have shape ",
                      running[i].sizes(), ", got ", batch[i].sizes());
    update_running_statistics(running[i], batch[i], keep[i], take[i]);
  }
}

// The same from a stage's vectors, where each statistic's batch starts at its place; the counters count a
// batch.
void update_from_vectors(const Tensor& vectors, at::IntArrayRef starts, TensorList running,
                         at::ArrayRef<double> keep, at::ArrayRef<double> take, TensorList counters,
                         bool any) {
  constexpr const char* op = "update_from_vectors";
  count_batches(counters);
  if (!any) return;
  TORCH_CHECK_VALUE(
      starts.size() == running.size() && keep.size() == running.size() && take.size() == running.size(), op,
      ": starts, keep and take must have ", running.size(), " elements (one per running statistic), got ",
      starts.size(), ", ", keep.size(), " and ", take.size());
  for (size_t i = 0; i < running.size(); ++i) {
    const Tensor batch = vectors.narrow(0, starts[i], running[i].numel());
    update_running_statistics(running[i], batch, keep[i], take[i]);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(effdense, CPU, m) {
  m.impl("count_batches", count_batches);
  m.impl("update_from_vectors", update_from_vectors);
  EFFDENSE_IMPLEMENT(m, cpu_backend, fold);
  EFFDENSE_IMPLEMENT(m, cpu_backend, defer);
  m.impl("update_running_statistics",
         static_cast<void (*)(TensorList, TensorList, at::ArrayRef<double>, at::ArrayRef<double>)>(
             update_running_statistics));
}

}  // namespace effdense
