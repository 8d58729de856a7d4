// A dense stage forward and backward, over one device's operators; see stage.h.
#include "stage.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <array>

#include "pages.h"
#include "stage_layout.h"

namespace effdense {
namespace {

// ---- Maps and parameters in the forms that the operators want

// An uninitialised [N, channels, *spatial] with `step` elements from pixel to pixel.
Tensor empty_rows(const Tensor& like, int64_t channels, int64_t step) {
  const RowsLayout layout(like, channels, step);
  return at::empty_strided(layout.sizes, layout.strides, like.options());
}

Tensor on_large_pages(Tensor x) {
  constexpr int64_t kLarge = 4 << 20;
  if (static_cast<int64_t>(x.nbytes()) >= kLarge) use_large_pages(x);
  return x;
}

// In rows of whole 16 bytes.
Tensor empty_buffer(const Tensor& like, int64_t channels) {
  const int64_t unit = std::max<int64_t>(1, 16 / static_cast<int64_t>(like.itemsize()));
  return on_large_pages(empty_rows(like, channels, (channels + unit - 1) / unit * unit));
}

Tensor channels_last(const Tensor& x) {
  const Tensor y = x.movedim(1, -1).contiguous().movedim(-1, 1);
  if (y.stride(1) == 1) return y;
  std::vector<int64_t> strides = y.strides().vec();
  strides[1] = 1;
  return y.as_strided(y.sizes(), strides);
}

Tensor matrix(const Tensor& conv_weight) {
  const int64_t rows = conv_weight.size(0), columns = conv_weight.size(1);
  const bool is_one = conv_weight.stride(1) == 1 && conv_weight.stride(0) == columns;
  if (conv_weight.numel() == rows * columns && is_one)
    return view_of(conv_weight, {rows, columns}, {columns, 1}, conv_weight.storage_offset());
  return conv_weight.flatten(1).contiguous();
}

// A convolution's bias in the type that sums are kept in.
std::optional<Tensor> bias_of(const Tensor& conv_bias, at::ScalarType type) {
  return conv_bias.defined() ? std::optional<Tensor>(conv_bias.to(type).contiguous()) : std::nullopt;
}

Tensor sum_per_channel(const Tensor& x) {
  std::vector<int64_t> others{0};
  for (int64_t i = 2; i < x.dim(); ++i) others.push_back(i);
  return x.sum(others);
}

// A gradient in the dtype and shape of its parameter, and a 1x1 convolution's in its strides.
Tensor shaped(const Tensor& like, Tensor grad) {
  if (grad.scalar_type() != like.scalar_type()) grad = grad.to(like.scalar_type());
  const bool one_pixel = like.dim() > 2 && like.numel() == like.size(0) * like.size(1);
  if (one_pixel && like.stride(0) == like.size(1) && like.stride(1) == 1) {
    const Tensor rows = grad.flatten(1).contiguous();
    return view_of(rows, like.sizes(), like.strides(), rows.storage_offset());
  }
  return grad.sizes() == like.sizes() ? grad : grad.view(like.sizes());
}

// ---- Scratch memory

// One block, handed out front to back; a layer starts again at the front.
class Scratch {
 public:
  // `block`: bytes, at a cache line's beginning.
  Scratch(const Tensor& block, at::ScalarType type) : block_(block.view(type)) {}
  void start_again() { used_ = 0; }

  // An uninitialised [N, channels, *spatial] in channels-last layout.
  Tensor map(const Tensor& like, int64_t channels) {
    const int64_t first = used_, size = like.size(0) * count_pixels(like) * channels;
    used_ += padded(size * static_cast<int64_t>(like.itemsize()));
    TORCH_CHECK(used_ <= static_cast<int64_t>(block_.nbytes()), "dense_stage: scratch has ", block_.nbytes(),
                " bytes, too few");
    return as_map(block_, first / static_cast<int64_t>(like.itemsize()), like, channels);
  }

 private:
  Tensor block_;
  int64_t used_ = 0;
};

// ---- PyTorch's convolutions: odd kernel sizes, the image's size is kept

struct Convolution {
  Convolution(const Tensor& weight, int64_t dilation) : one_dimension(weight.dim() == 3) {
    for (int64_t i = 2; i < weight.dim(); ++i) padding.push_back(dilation * (weight.size(i) / 2));
    if (one_dimension) padding.insert(padding.begin(), 0);  // as 2D, which knows channels-last
    ones.assign(padding.size(), 1);
    zeros.assign(padding.size(), 0);
    dilations.assign(padding.size(), dilation);
  }
  Tensor form(const Tensor& x) const { return one_dimension ? x.unsqueeze(2) : x; }
  bool one_dimension;
  std::vector<int64_t> padding, ones, zeros, dilations;
};

Tensor convolve(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t dilation = 1) {
  const Convolution c(weight, dilation);
  const Tensor y = at::convolution(c.form(x), c.form(weight), given(bias), c.ones, c.padding, c.dilations,
                                   false, c.zeros, 1);
  return c.one_dimension ? y.squeeze(2) : y;
}

ThreeTensors convolve_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               std::array<bool, 3> needs, int64_t dilation = 1) {
  const Convolution c(weight, dilation);
  at::OptionalIntArrayRef bias_sizes;
  if (bias.defined()) bias_sizes = bias.sizes();
  auto [grad_x, grad_weight, grad_bias] =
      at::convolution_backward(c.form(grad), c.form(x), c.form(weight), bias_sizes, c.ones, c.padding,
                               c.dilations, false, c.zeros, 1, needs);
  if (c.one_dimension) {
    if (needs[0]) grad_x = grad_x.squeeze(2);
    if (needs[1]) grad_weight = grad_weight.squeeze(2);
  }
  return {grad_x, grad_weight, grad_bias};
}

// ---- The two ways

// Dropout and its backward, in place: zero where the mask is, the rest scaled up.
void drop_(Tensor& x, const Tensor& mask, double keep) {
  if (mask.defined()) x.mul_(mask).mul_(keep > 0 ? 1 / keep : 0.0);
}

// What the backend's kernels count their blocks with, for all calls of a way.
Tensor make_counters(const Backend& backend, const Tensor& like) {
  return backend.counters > 0 ? at::zeros({backend.counters}, like.options().dtype(at::kInt)) : Tensor();
}

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

// What the layers' backward goes on from: the gradient of the whole buffer, and the coefficients of the
// corrections to come.
struct Started {
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
std::pair<Started, PoolParameters<Tensor>> start_backward(const Backend& ops, Tensor grad,
                                                          const Tensor& features, const Tensor& vectors,
                                                          const PoolParameters<Tensor>& parameters,
                                                          const PoolParameters<bool>& needs, double eps,
                                                          bool batch_statistics, at::IntArrayRef kernel) {
  const int64_t channels = features.size(1), end = vectors.numel();
  const Statistics of_buffer{part_of(vectors, 0, 0, channels), part_of(vectors, 0, channels, channels)};
  const Tensor zeros = at::zeros({2 * channels}, vectors.options());
  Started started{empty_buffer(features, channels), part_of(zeros, 0, 0, channels),
                  part_of(zeros, 0, channels, channels)};
  PoolParameters<Tensor> grads;
  if (kernel.empty()) {
    started.grad_features.copy_(grad);
    return {started, grads};
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
  to.a = started.a;
  to.b = started.b;
  ops.bn_relu_avg_pool_backward(to, channels_last(grad), features, norm.scale, norm.shift, norm.mean, kernel,
                                started.grad_features);
  grads.norm_weight = to.sum_dx;
  grads.norm_bias = to.sum_d;
  return {started, grads};
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
  Backward(const Backend& backend, Stage& stage, const Started& started, const Tensor& features,
           const Tensor& saved, const Tensor& vectors, const c10::List<bool>& needs, const Tensor& scratch)
      : ops_(backend),
        stage_(stage),
        started_(started),
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
      take(stage_.at(0, input_channels), out);
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

  // The finished gradient of a range of channels.
  void take(const Range& range, Tensor& out) {
    const Tensor mean = range.of(stage_.of_buffer).mean;
    ops_.apply_correction(range.of(features_), mean, part_of(started_.a, 0, range.start, range.count),
                          part_of(started_.b, 0, range.start, range.count), range.of(started_.grad_features),
                          out);
  }

  // Where the sums of a norm that reads the buffer go.
  SumsTo sums_of_reader(const Norm& norm, const Range& range) const {
    SumsTo to = sums_of(norm, SumsTo::Coefficients::added, count_);
    to.a = part_of(started_.a, 0, range.start, range.count);
    to.b = part_of(started_.b, 0, range.start, range.count);
    to.counters = counters_;
    return to;
  }

  // `below`: whether what the layer reads needs a gradient.
  void run(const Layer& layer, bool below) {
    const LayerParameters<bool>& needs = needs_[layer.position];
    LayerParameters<Tensor>& grads = grads_[layer.position];
    const Range range = stage_.read_by(layer);
    const Tensor earlier = range.of(features_);
    Tensor grad_earlier = range.of(started_.grad_features);
    const Norm norm1 = stage_.norm1(layer);
    Tensor g = scratch_.map(features_, layer.growth);
    take(stage_.made_by(layer), g);
    drop_(g, layer.new_mask, layer.new_keep);
    SumsTo of_norm1 = sums_of_reader(norm1, range);
    if (layer.width == 0) {
      const bool need_x = below || needs.norm1_weight || needs.norm1_bias;
      convolution_backward(of_norm1, layer, g, earlier, norm1, need_x, &grad_earlier, false);
      grads.norm1_weight = of_norm1.sum_dx;
      grads.norm1_bias = of_norm1.sum_d;
      return;
    }
    const Tensor y = make_y(layer, norm1, earlier);
    const Norm norm2 = stage_.norm2(layer);
    const bool need_features = below || needs.norm1_weight || needs.norm1_bias;
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
    const Correction missing = grad_of_y(layer, after, of_norm2, y, norm2, corrects_later);
    if (needs.conv1_bias) grads.conv1_bias = sum_per_channel(after.x);
    grads.conv1_weight =
        ops_.bottleneck_backward(of_norm1, {earlier}, after.x, norm1.scale, norm1.shift, norm1.mean,
                                 matrix(layer.parameters.conv1_weight), {grad_earlier}, true, need_features,
                                 needs.conv1_weight, missing.tensors());
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
    Correction missing;
    if (norm2.batch_statistics) {
      missing = {y, norm2.mean, sums.a, sums.b, {}, {}};
    } else if (!after.masked) {
      const Tensor nothing = at::zeros_like(norm2.mean);
      missing = {y, norm2.mean, nothing, nothing, {}, {}};
    }
    if (!after.masked) {
      missing.scale = norm2.scale;
      missing.shift = norm2.shift;
    }
    if (corrects_later) return missing;
    if (missing.any()) ops_.apply_correction(y, missing.mean, missing.a, missing.b, after.x, after.x);
    drop_(after.x, layer.y_mask, layer.y_keep);
    return {};
  }

  const Backend& ops_;
  Stage& stage_;
  const Started& started_;
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
  auto [started, grads] =
      start_backward(backend, grad, features, vectors, own, wanted, eps, batch_statistics, pool);
  std::vector<Tensor> result{started.grad_features, started.a, started.b};
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
  const Started started{grad_features, a, b};
  return Backward(backend, stage, started, features, saved, vectors, needs, scratch).run(channels);
}

}  // namespace effdense
