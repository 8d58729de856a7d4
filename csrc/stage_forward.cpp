// A dense stage's forward over one device's operators; see stage.h.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include "stage.h"
#include "stage_layout.h"
#include "stage_parts.h"

namespace effdense {
namespace {

class Forward {
 public:
  Forward(const Backend& backend, Stage& stage, const Tensor& x, const Tensor& scratch)
      : ops_(backend), stage_(stage), x_(x), scratch_(scratch, x.scalar_type()) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> run(const OptionalTensors& running) {
    features_ = empty_buffer(x_, stage_.channels);
    const Tensor saved = on_large_pages(at::empty({stage_.saved_size()}, x_.options()));
    kept_ = stage_.split_saved(saved);
    const auto wide = x_.options().dtype(accumulate_type(x_.scalar_type()));
    const Tensor vectors = at::empty({stage_.vector_size()}, wide);
    stage_.split_vectors(vectors);
    stage_.make_folds();
    counters_ = make_counters(ops_, x_);
    std::vector<FoldOf> known;
    for (size_t i = 0; i < stage_.of_norms.size(); ++i) {
      if (stage_.batch_statistics(static_cast<int64_t>(i))) continue;
      const std::optional<Tensor> mean = running.get(2 * i), var = running.get(2 * i + 1);
      TORCH_CHECK_VALUE(mean && var, "dense_stage: running must hold mean and variance of norm ", i,
                        ", which does not use the batch's, got None");
      known.push_back(stage_.folds[i]);
      known.back().running_mean = *mean;
      known.back().running_var = *var;
    }
    ops_.fold(known);
    const Range first = stage_.at(0, x_.size(1));
    Tensor to = first.of(features_);
    StatisticsTo statistics = statistics_of(first, 0);
    ops_.append_features(statistics, x_, to);
    for (const Layer& layer : stage_.layers) run(layer);
    return {pool(), features_, saved, vectors};
  }

 private:
  void run(const Layer& layer) {
    const Range own = stage_.made_by(layer);
    const Tensor earlier = stage_.read_by(layer).of(features_);
    Tensor added = own.of(features_);
    const Norm norm1 = stage_.norm1(layer);
    scratch_.start_again();
    StatisticsTo statistics = statistics_of(own, static_cast<size_t>(layer.position) + 1);
    // Of what dropout leaves they are taken after it.
    const bool drops = layer.new_mask.defined();
    StatisticsTo dropped;
    dropped.counters = counters_;
    StatisticsTo& to = drops ? dropped : statistics;
    if (layer.width == 0) {
      convolve_into(to, layer, earlier, &norm1, added);
    } else if (stage_.straight_to_z(layer)) {
      Tensor z = scratch_.map(earlier, layer.width);
      const Norm norm2 = stage_.norm2(layer);
      StatisticsTo none;
      bottleneck(none, layer, norm1, earlier, &norm2, false, z);
      convolve_into(to, layer, z, nullptr, added);
    } else {
      const Tensor y = make_y(layer, norm1, earlier);
      const Norm norm2 = stage_.norm2(layer);
      convolve_into(to, layer, y, &norm2, added);
    }
    if (!drops) return;
    drop_(added, layer.new_mask, layer.new_keep);
    ops_.channel_statistics(statistics, {added});
  }

  // Where the statistics of channels that are new in the buffer go. The norm that reads them first is folded
  // with them: that of the layer at `next`, or the pool's.
  StatisticsTo statistics_of(const Range& own, size_t next) const {
    const Statistics part = own.of(stage_.of_buffer);
    StatisticsTo to{part.mean, part.var};
    to.counters = counters_;
    const bool is_layer = next < stage_.layers.size();
    if (!is_layer && stage_.settings.pool.empty()) return to;
    const int64_t norm = is_layer ? stage_.norm1_of(stage_.layers[next]) : stage_.pool_norm();
    if (!stage_.batch_statistics(norm)) return to;
    const Range read = is_layer ? stage_.read_by(stage_.layers[next]) : stage_.at(0, stage_.channels);
    to.then = &stage_.folds[norm];
    to.first = own.start - read.start;
    return to;
  }

  // y = W1 relu(norm1(earlier)), and its statistics.
  Tensor make_y(const Layer& layer, const Norm& norm1, const Tensor& earlier) {
    Tensor y = kept_[layer.position];
    if (!y.defined()) y = scratch_.map(earlier, layer.width);
    const int64_t norm2 = stage_.norm2_of(layer);
    const bool batch = stage_.batch_statistics(norm2), drops = layer.y_mask.defined();
    StatisticsTo statistics, nowhere;
    if (batch) {
      statistics = {stage_.of_norms[norm2].mean, stage_.of_norms[norm2].var, &stage_.folds[norm2]};
      statistics.counters = counters_;
    }
    const bool at_once = batch && !drops;
    bottleneck(at_once ? statistics : nowhere, layer, norm1, earlier, nullptr, at_once, y);
    if (drops) {
      drop_(y, layer.y_mask, layer.y_keep);
      if (batch) ops_.channel_statistics(statistics, {y});
    }
    return y;
  }

  void bottleneck(StatisticsTo& to, const Layer& layer, const Norm& norm1, const Tensor& earlier,
                  const Norm* then, bool statistics, Tensor& y) {
    ops_.bottleneck(to, {earlier}, norm1.scale, norm1.shift, matrix(layer.parameters.conv1_weight),
                    bias_of(layer.parameters.conv1_bias, norm1.mean.scalar_type()),
                    then == nullptr ? std::nullopt : std::optional<Tensor>(then->scale),
                    then == nullptr ? std::nullopt : std::optional<Tensor>(then->shift), statistics, y);
  }

  // out = conv2(relu(norm(x))), without a norm conv2(x), and its statistics.
  void convolve_into(StatisticsTo& to, const Layer& layer, const Tensor& x, const Norm* norm, Tensor& out) {
    const Tensor &weight = layer.parameters.conv2_weight, &bias = layer.parameters.conv2_bias;
    if (norm != nullptr && stage_.fuses(layer))
      return ops_.bn_relu_conv3x3(to, x, norm->scale, norm->shift, weight,
                                  bias_of(bias, norm->mean.scalar_type()), out);
    Tensor z = x;
    if (norm != nullptr) {
      z = scratch_.map(x, x.size(1));
      ops_.bn_relu(x, norm->scale, norm->shift, z);
    }
    ops_.append_features(to, convolve(z, weight, bias, layer.dilation), out);
  }

  Tensor pool() {
    if (stage_.settings.pool.empty()) return at::empty({0}, x_.options());
    const Norm norm = stage_.norm(stage_.pool_norm());
    const Tensor out = ops_.bn_relu_avg_pool(features_, norm.scale, norm.shift, stage_.settings.pool);
    const Tensor& weight = stage_.pool.conv_weight;
    return weight.defined() ? channels_last(convolve(out, weight, stage_.pool.conv_bias)) : out;
  }

  const Backend& ops_;
  Stage& stage_;
  const Tensor& x_;
  Scratch scratch_;
  Tensor features_, counters_;
  std::vector<Tensor> kept_;  // every y for the backward, by its layer
};

}  // namespace

int64_t stage_scratch(const Backend& backend, const Tensor& like, int64_t channels,
                      const OptionalTensors& parameters, const OptionalTensors& masks,
                      const StageSettings& settings, bool backward) {
  return Stage("dense_stage", backend, settings, like, channels, parameters, masks).scratch_bytes(backward);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> stage_forward(const Backend& backend, const Tensor& x,
                                                         const OptionalTensors& parameters,
                                                         const OptionalTensors& running,
                                                         const OptionalTensors& masks,
                                                         const StageSettings& settings,
                                                         const Tensor& scratch) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  Stage stage("dense_stage", backend, settings, x, x.size(1), parameters, masks);
  return Forward(backend, stage, x, scratch).run(running);
}

}  // namespace effdense
