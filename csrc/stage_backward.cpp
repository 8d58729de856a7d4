// A dense stage's backward over one device's operators; see stage.h.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "stage.h"
#include "stage_layout.h"
#include "stage_parts.h"

namespace effdense {
namespace {

// The gradient of the whole feature buffer, and the coefficients of the corrections to come.
struct GradientBuffer {
  Tensor grad_features, a, b;
};

// Where a norm's two sums go: they become the gradients of its parameters, and, where it uses the batch's
// statistics, a part of the correction.
SumsTo sums_of(const Norm& norm, SumsTo::Coefficients coefficients, int64_t count) {
  SumsTo to;
  to.rstd = norm.rstd;
  to.scale = norm.scale;
  to.coefficients = norm.batch_statistics ? coefficients : SumsTo::Coefficients::none;
  to.count = count;
  return to;
}

// From the pool behind the block, or from the block's own gradient; and the gradients of the pool's
// parameters.
std::pair<GradientBuffer, PoolParameters<Tensor>> start_backward(
    const Backend& ops, Tensor grad, const Tensor& features, const Tensor& vectors,
    const PoolParameters<Tensor>& parameters, const PoolParameters<bool>& needs, double eps,
    bool batch_statistics, at::IntArrayRef kernel) {
  const int64_t channels = features.size(1), end = vectors.numel();
  const Statistics of_buffer{part_of(vectors, 0, 0, channels), part_of(vectors, 0, channels, channels)};
  const Tensor zeros = at::zeros({2 * channels}, vectors.options());
  GradientBuffer grad_buffer{empty_buffer(features, channels), part_of(zeros, 0, 0, channels),
                             part_of(zeros, 0, channels, channels)};
  PoolParameters<Tensor> grads;
  if (kernel.empty()) {
    grad_buffer.grad_features.copy_(grad);
    return {grad_buffer, grads};
  }
  // Running statistics are the vectors' last.
  const Statistics own{part_of(vectors, 0, end - 2 * channels, channels),
                       part_of(vectors, 0, end - channels, channels)};
  const Tensor vectors_of_norm = at::empty({3, padded(channels)}, vectors.options());
  const auto vector = [&](int64_t i) { return part_of(vectors_of_norm.select(0, i), 0, 0, channels); };
  const Statistics& of_norm = batch_statistics ? of_buffer : own;
  const FoldOf fold{of_norm.mean, of_norm.var, parameters.norm_weight, parameters.norm_bias, eps, vector(0),
                    vector(1),    vector(2)};
  ops.fold(fold);
  const Norm norm = folded(fold, batch_statistics);
  const Tensor& weight = parameters.conv_weight;
  if (weight.defined()) {  // what went into the convolution is made again: one read of the features
    const Tensor pooled = ops.bn_relu_avg_pool(features, norm.scale, norm.shift, kernel);
    std::tie(grad, grads.conv_weight, grads.conv_bias) = convolve_backward(
        grad, pooled, weight, parameters.conv_bias, {true, needs.conv_weight, needs.conv_bias});
  }
  SumsTo to = sums_of(norm, SumsTo::Coefficients::added, features.size(0) * count_pixels(features));
  to.a = grad_buffer.a;
  to.b = grad_buffer.b;
  ops.bn_relu_avg_pool_backward(to, channels_last(grad), features, norm.scale, norm.shift, norm.mean, kernel,
                                grad_buffer.grad_features);
  grads.norm_weight = to.sum_dx;
  grads.norm_bias = to.sum_d;
  return {grad_buffer, grads};
}

// Of what is needed, and never two of all gradients.
template <typename Likes, typename Needs, typename Grads>
void collect(const Likes& likes, const Needs& needs, const Grads& grads, std::vector<Tensor>& result) {
  for (size_t i = 0; i < likes.size(); ++i)
    if (*needs[i] && likes[i]->defined())
      result.push_back(shaped(*likes[i], std::exchange(*grads[i], Tensor())).contiguous());
}

class Backward {
 public:
  Backward(const Backend& backend, Stage& stage, const GradientBuffer& grad_buffer, const Tensor& features,
           const Tensor& saved, const Tensor& vectors, const c10::List<bool>& needs, const Tensor& scratch)
      : ops_(backend),
        stage_(stage),
        grad_buffer_(grad_buffer),
        features_(features),
        scratch_(scratch, features.scalar_type()),
        count_(stage.pixels()) {
    stage_.split_vectors(vectors);
    stage_.make_folds();
    counters_ = make_counters(ops_, features);
    kept_ = stage_.split_saved(saved);
    Reader wanted(needs);
    needs_input_ = wanted.next();
    for (size_t i = 0; i < stage.layers.size(); ++i) {
      needs_.emplace_back();
      for (bool* need : needs_.back().in_order(stage.settings.bottleneck)) *need = wanted.next();
    }
  }

  // Of what is needed: the input's gradient, then the layers' parameters'.
  std::vector<Tensor> run(int64_t input_channels) {
    grads_.resize(stage_.layers.size());
    const int64_t lowest = lowest_layer();
    if (lowest < static_cast<int64_t>(stage_.layers.size())) {  // of all layers that come, at once
      const int64_t step = stage_.settings.bottleneck ? 2 : 1, first = step * std::max<int64_t>(lowest, 0);
      const int64_t end = step * static_cast<int64_t>(stage_.layers.size());
      ops_.fold(at::ArrayRef<FoldOf>(stage_.folds).slice(first, end - first));
    }
    for (auto layer = stage_.layers.rbegin(); layer != stage_.layers.rend(); ++layer) {
      if (layer->position < lowest) break;
      scratch_.start_again();
      run(*layer, layer->position > lowest);
    }
    std::vector<Tensor> result;
    if (needs_input_) {
      Tensor out = empty_rows(features_, input_channels, input_channels);
      finish_gradient(stage_.at(0, input_channels), out);
      result.push_back(std::move(out));
    }
    const bool bottleneck = stage_.settings.bottleneck;
    for (size_t i = 0; i < stage_.layers.size(); ++i)
      collect(stage_.layers[i].parameters.in_order(bottleneck), needs_[i].in_order(bottleneck),
              grads_[i].in_order(bottleneck), result);
    return result;
  }

 private:
  // The first layer whose backward is needed; -1: the input's gradient is.
  int64_t lowest_layer() {
    if (needs_input_) return -1;
    for (size_t i = 0; i < needs_.size(); ++i)
      for (const bool* need : needs_[i].in_order(stage_.settings.bottleneck))
        if (*need) return static_cast<int64_t>(i);
    return static_cast<int64_t>(needs_.size());
  }

  // Corrects the gradient of a range of channels, which is then whole.
  void finish_gradient(const Range& range, Tensor& out) {
    const Tensor mean = range.of(stage_.of_buffer).mean;
    ops_.apply_correction(range.of(features_), mean, part_of(grad_buffer_.a, 0, range.start, range.count),
                          part_of(grad_buffer_.b, 0, range.start, range.count),
                          range.of(grad_buffer_.grad_features), out);
  }

  // Where the sums of a norm that reads the buffer go.
  SumsTo sums_of_reader(const Norm& norm, const Range& range) const {
    SumsTo to = sums_of(norm, SumsTo::Coefficients::added, count_);
    to.a = part_of(grad_buffer_.a, 0, range.start, range.count);
    to.b = part_of(grad_buffer_.b, 0, range.start, range.count);
    to.counters = counters_;
    return to;
  }

  // `need_inputs`: whether what the layer reads needs a gradient.
  void run(const Layer& layer, bool need_inputs) {
    const LayerParameters<bool>& needs = needs_[layer.position];
    LayerParameters<Tensor>& grads = grads_[layer.position];
    const Range range = stage_.read_by(layer);
    const Tensor earlier = range.of(features_);
    Tensor grad_earlier = range.of(grad_buffer_.grad_features);
    const Norm norm1 = stage_.norm1(layer);
    Tensor g = scratch_.map(features_, layer.growth);
    finish_gradient(stage_.made_by(layer), g);
    drop_(g, layer.new_mask, layer.new_keep);
    SumsTo of_norm1 = sums_of_reader(norm1, range);
    if (layer.width == 0) {
      const bool need_x = need_inputs || needs.norm1_weight || needs.norm1_bias;
      convolution_backward(of_norm1, layer, g, earlier, norm1, need_x, &grad_earlier, false);
      grads.norm1_weight = of_norm1.sum_dx;
      grads.norm1_bias = of_norm1.sum_d;
      return;
    }
    const Tensor y = make_y(layer, norm1, earlier);
    const Norm norm2 = stage_.norm2(layer);
    const bool need_features = need_inputs || needs.norm1_weight || needs.norm1_bias;
    const bool need_y = need_features || needs.conv1_weight || needs.conv1_bias;
    // y's gradient is wanted whole where it goes through dropout or is summed up.
    const bool corrects_later = !layer.y_mask.defined() && !needs.conv1_bias;
    SumsTo of_norm2 = sums_of(norm2, SumsTo::Coefficients::made, count_);
    of_norm2.counters = counters_;
    AfterConvolution after =
        convolution_backward(of_norm2, layer, g, y, norm2, need_y || needs.norm2_weight || needs.norm2_bias,
                             nullptr, corrects_later);
    if (!after.x.defined()) return;
    grads.norm2_weight = of_norm2.sum_dx;
    grads.norm2_bias = of_norm2.sum_d;
    if (!need_y) return;
    const Correction correction = grad_of_y(layer, after, of_norm2, y, norm2, corrects_later);
    if (needs.conv1_bias) grads.conv1_bias = sum_per_channel(after.x);
    grads.conv1_weight =
        ops_.bottleneck_backward(of_norm1, {earlier}, after.x, norm1.scale, norm1.shift, norm1.mean,
                                 matrix(layer.parameters.conv1_weight), {grad_earlier}, true, need_features,
                                 needs.conv1_weight, correction.tensors());
    grads.norm1_weight = of_norm1.sum_dx;
    grads.norm1_bias = of_norm1.sum_d;
  }

  // A bottleneck's output, kept or made again.
  Tensor make_y(const Layer& layer, const Norm& norm1, const Tensor& earlier) {
    Tensor y = kept_[layer.position];
    if (y.defined()) return y;
    y = scratch_.map(features_, layer.width);
    StatisticsTo nowhere;
    ops_.bottleneck(nowhere, {earlier}, norm1.scale, norm1.shift, matrix(layer.parameters.conv1_weight),
                    bias_of(layer.parameters.conv1_bias, norm1.mean.scalar_type()), std::nullopt,
                    std::nullopt, false, y);
    drop_(y, layer.y_mask, layer.y_keep);
    return y;
  }

  // What the backward of conv2(relu(norm(x))) makes beside its parameters' gradients.
  struct AfterConvolution {
    Tensor x;  // scale * d; not masked: the gradient of relu(norm(x)); undefined where it was not needed
    bool masked = true;
  };

  AfterConvolution convolution_backward(SumsTo& to, const Layer& layer, const Tensor& grad, const Tensor& x,
                                        const Norm& norm, bool need_x, Tensor* add_to, bool masks_later) {
    const bool need_weight = needs_[layer.position].conv2_weight,
               need_bias = needs_[layer.position].conv2_bias;
    LayerParameters<Tensor>& grads = grads_[layer.position];
    const Tensor &weight = layer.parameters.conv2_weight, &bias = layer.parameters.conv2_bias;
    if (!need_x) to.coefficients = SumsTo::Coefficients::none;
    const auto& [mean, rstd, scale, shift, batch] = norm;
    AfterConvolution after;
    if (stage_.fuses(layer)) {
      if (need_bias) grads.conv2_bias = sum_per_channel(grad);
      if (!need_x && !need_weight) return after;
      Tensor grad_x = !need_x             ? at::empty({0}, x.options())
                      : add_to == nullptr ? scratch_.map(x, x.size(1))
                                          : *add_to;
      grads.conv2_weight = ops_.bn_relu_conv3x3_backward(to, grad, x, scale, shift, mean, weight, grad_x,
                                                         add_to != nullptr, need_x, need_weight);
      if (need_x) after.x = grad_x;
      return after;
    }
    Tensor z = scratch_.map(x, x.size(1));
    if (need_x && masks_later) {  // one pass makes z and takes the sums
      after.x = channels_last(
          std::get<0>(convolve_backward(grad, z, weight, bias, {true, false, false}, layer.dilation)));
      ops_.bn_relu_backward_sums(to, after.x, x, scale, shift, mean, z);
      std::tie(std::ignore, grads.conv2_weight, grads.conv2_bias) =
          convolve_backward(grad, z, weight, bias, {false, need_weight, need_bias}, layer.dilation);
      after.masked = false;
      return after;
    }
    ops_.bn_relu(x, scale, shift, z);
    Tensor grad_z;
    std::tie(grad_z, grads.conv2_weight, grads.conv2_bias) =
        convolve_backward(grad, z, weight, bias, {need_x, need_weight, need_bias}, layer.dilation);
    if (!need_x) return after;
    after.x = channels_last(grad_z);
    if (add_to == nullptr)
      ops_.bn_relu_backward(to, after.x, x, scale, shift, mean, rstd, false);
    else
      ops_.bn_relu_backward_accumulate(to, after.x, x, scale, shift, mean, *add_to);
    return after;
  }

  // Makes y's gradient of what came through conv2; returns what bottleneck_backward is to do of that.
  Correction grad_of_y(const Layer& layer, AfterConvolution& after, const SumsTo& sums, const Tensor& y,
                       const Norm& norm2, bool corrects_later) {
    Correction correction;
    if (norm2.batch_statistics) {
      correction = {y, norm2.mean, sums.a, sums.b, {}, {}};
    } else if (!after.masked) {
      const Tensor nothing = at::zeros_like(norm2.mean);
      correction = {y, norm2.mean, nothing, nothing, {}, {}};
    }
    if (!after.masked) {
      correction.scale = norm2.scale;
      correction.shift = norm2.shift;
    }
    if (corrects_later) return correction;
    if (correction.any())
      ops_.apply_correction(y, correction.mean, correction.a, correction.b, after.x, after.x);
    drop_(after.x, layer.y_mask, layer.y_keep);
    return {};
  }

  const Backend& ops_;
  Stage& stage_;
  const GradientBuffer& grad_buffer_;
  const Tensor& features_;
  Scratch scratch_;
  const int64_t count_;
  std::vector<Tensor> kept_;
  Tensor counters_;
  bool needs_input_;
  std::vector<LayerParameters<bool>> needs_;
  std::vector<LayerParameters<Tensor>> grads_;
};

}  // namespace

std::vector<Tensor> stage_start_backward(const Backend& backend, const Tensor& grad, const Tensor& features,
                                         const Tensor& vectors, const OptionalTensors& parameters,
                                         const c10::List<bool>& needs, double eps, bool batch_statistics,
                                         at::IntArrayRef pool) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  PoolParameters<Tensor> own;
  PoolParameters<bool> wanted;
  if (!pool.empty()) {
    TORCH_CHECK_VALUE(parameters.size() == kPoolParameters && needs.size() == kPoolParameters,
                      "dense_stage_backward: parameters and needs of the pool must hold ", kPoolParameters,
                      " elements, got ", parameters.size(), " and ", needs.size());
    Reader values(parameters);
    Reader truths(needs);
    for (Tensor* value : own.in_order()) *value = next_tensor(values);
    for (bool* need : wanted.in_order()) *need = truths.next();
  }
  auto [grad_buffer, grads] =
      start_backward(backend, grad, features, vectors, own, wanted, eps, batch_statistics, pool);
  std::vector<Tensor> result{grad_buffer.grad_features, grad_buffer.a, grad_buffer.b};
  collect(own.in_order(), wanted.in_order(), grads.in_order(), result);
  return result;
}

std::vector<Tensor> stage_backward(const Backend& backend, const Tensor& grad_features, const Tensor& a,
                                   const Tensor& b, int64_t channels, const Tensor& features,
                                   const Tensor& saved, const Tensor& vectors,
                                   const OptionalTensors& parameters, const OptionalTensors& masks,
                                   const c10::List<bool>& needs, const StageSettings& settings,
                                   const Tensor& scratch) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  Stage stage("dense_stage_backward", backend, settings, features, channels, parameters, masks);
  TORCH_CHECK_VALUE(needs.size() == 1 + parameters.size(), "dense_stage_backward: needs must hold ",
                    1 + parameters.size(), " elements, got ", needs.size());
  const GradientBuffer grad_buffer{grad_features, a, b};
  return Backward(backend, stage, grad_buffer, features, saved, vectors, needs, scratch).run(channels);
}

}  // namespace effdense
