// The layout of a dense stage in C++: its layers' tensors by name, and the places of its parts in flat
// tensors. It is effdense/engine/stage.py in C++.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "backend.h"
#include "checks.h"
#include "maps.h"
#include "stage.h"

namespace effdense {

// A view without the dispatcher, whose cost counts where layers are small. For dense tensors below autograd.
inline Tensor view_of(const Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset) {
  Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(x.storage()),
                                                         x.key_set(), x.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return view;
}

// x.narrow(dim, start, count).
inline Tensor part_of(const Tensor& x, int64_t dim, int64_t start, int64_t count) {
  c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
  sizes[dim] = count;
  return view_of(x, sizes, x.strides(), x.storage_offset() + start * x.stride(dim));
}

// The sizes and strides of a map with the batch and spatial sizes of `like`, channels side by side and `step`
// elements from pixel to pixel.
struct RowsLayout {
  RowsLayout(const Tensor& like, int64_t channels, int64_t step)
      : sizes(like.sizes().begin(), like.sizes().end()), strides(sizes.size()) {
    sizes[1] = channels;
    strides[1] = 1;
    for (int64_t i = like.dim() - 1; i >= 2; --i) {
      strides[i] = step;
      step *= sizes[i];
    }
    strides[0] = step;
  }
  c10::SmallVector<int64_t, 5> sizes, strides;
};

// A flat tensor's elements from `offset` on as a channels-last map with the batch and spatial sizes of
// `like`.
inline Tensor as_map(const Tensor& flat, int64_t offset, const Tensor& like, int64_t channels) {
  const RowsLayout layout(like, channels, channels);
  return view_of(flat, layout.sizes, layout.strides, flat.storage_offset() + offset);
}

constexpr int64_t kAlignment = 64;  // bytes: a cache line

inline int64_t padded(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Of every parameter of a layer: its value, whether its gradient is needed, its gradient. Plain layers have
// no conv1 and no norm2.
template <typename T>
struct LayerParameters {
  T norm1_weight{}, norm1_bias{}, conv1_weight{}, conv1_bias{};
  T norm2_weight{}, norm2_bias{}, conv2_weight{}, conv2_bias{};

  // In the operators' order.
  std::vector<T*> in_order(bool bottleneck) {
    if (!bottleneck) return {&norm1_weight, &norm1_bias, &conv2_weight, &conv2_bias};
    return {&norm1_weight, &norm1_bias, &conv1_weight, &conv1_bias,
            &norm2_weight, &norm2_bias, &conv2_weight, &conv2_bias};
  }
};

// The pool's norm and the 1x1 convolution behind it.
template <typename T>
struct PoolParameters {
  T norm_weight{}, norm_bias{}, conv_weight{}, conv_bias{};
  std::vector<T*> in_order() { return {&norm_weight, &norm_bias, &conv_weight, &conv_bias}; }
};

// relu(bn(x)) = relu(scale * x + shift).
struct Norm {
  Tensor mean, rstd, scale, shift;
  bool batch_statistics;
};

struct Statistics {
  Tensor mean, var;
};

inline Norm folded(const FoldOf& fold, bool batch_statistics) {
  return {fold.mean, fold.rstd, fold.scale, fold.shift, batch_statistics};
}

struct Range {
  int64_t start, count;
  Tensor of(const Tensor& map) const { return part_of(map, 1, start, count); }
  Statistics of(const Statistics& s) const {
    return {part_of(s.mean, 0, start, count), part_of(s.var, 0, start, count)};
  }
};

struct Layer {
  int64_t position, channels;  // that it reads
  int64_t growth, width;       // that it adds; of the bottleneck, 0: plain
  LayerParameters<Tensor> parameters;
  Tensor y_mask, new_mask;  // of dropout
  double y_keep = 1, new_keep = 1;
  int64_t dilation = 1;
};

// One value after the other of what a schema has as a list.
template <typename T>
class Reader {
 public:
  explicit Reader(const c10::List<T>& list) : list_(list) {}
  T next() { return list_.get(at_++); }

 private:
  const c10::List<T>& list_;
  size_t at_ = 0;
};

inline Tensor next_tensor(Reader<std::optional<Tensor>>& from) { return from.next().value_or(Tensor()); }

constexpr size_t kPoolParameters = 4;

class Stage {
 public:
  Stage(const char* op, const Backend& backend, const StageSettings& settings, const Tensor& like,
        int64_t input_channels, const OptionalTensors& parameters, const OptionalTensors& masks)
      : settings(settings), backend_(backend), like_(like), channels(input_channels) {
    Reader values(parameters), drops(masks);
    const size_t step = settings.bottleneck ? 8 : 4, behind = settings.pool.empty() ? 0 : kPoolParameters;
    TORCH_CHECK_VALUE(parameters.size() >= step + behind && (parameters.size() - behind) % step == 0, op,
                      ": parameters must hold ", step, " tensors per layer and ", behind,
                      " for the pool behind them, got ", parameters.size());
    const size_t count = (parameters.size() - behind) / step, norms = count * step / 4 + (behind > 0 ? 1 : 0);
    const auto check_length = [&](const char* name, size_t length, size_t expected, bool may_be_empty) {
      TORCH_CHECK_VALUE(length == expected || (may_be_empty && length == 0), op, ": ", name, " must hold ",
                        expected, " elements, got ", length);
    };
    check_length("masks", masks.size(), 2 * count, true);
    check_length("drop", settings.drop.size(), masks.size(), false);
    check_length("eps", settings.eps.size(), norms, false);
    check_length("batch_statistics", settings.batch_statistics.size(), norms, false);
    check_length("dilation", settings.dilation.size(), count, true);
    check_map(op, "x", like);
    layers.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      Layer layer{};
      layer.position = static_cast<int64_t>(i);
      layer.channels = channels;
      for (Tensor* value : layer.parameters.in_order(settings.bottleneck)) *value = next_tensor(values);
      if (!masks.empty()) {
        layer.y_mask = next_tensor(drops);
        layer.new_mask = next_tensor(drops);
        layer.y_keep = 1 - settings.drop[2 * i];
        layer.new_keep = 1 - settings.drop[2 * i + 1];
      }
      if (!settings.dilation.empty()) layer.dilation = settings.dilation[i];
      const auto& [n1w, n1b, conv1, c1b, n2w, n2b, conv2, c2b] = layer.parameters;
      layer.width = settings.bottleneck ? check_weights(op, "conv1", i, conv1, channels) : 0;
      layer.growth = check_weights(op, "conv2", i, conv2, layer.width > 0 ? layer.width : channels);
      sizes_.push_back(channels);
      if (settings.bottleneck) sizes_.push_back(layer.width);
      channels += layer.growth;
      layers.push_back(std::move(layer));
    }
    if (behind > 0) {
      for (Tensor* value : pool.in_order()) *value = next_tensor(values);
      sizes_.push_back(channels);
    }
  }

  int64_t norm1_of(const Layer& layer) const { return layer.position * (settings.bottleneck ? 2 : 1); }
  int64_t norm2_of(const Layer& layer) const { return norm1_of(layer) + 1; }
  bool batch_statistics(int64_t norm) const { return settings.batch_statistics.get(norm); }

  // Where in the buffer `count` channels are of which `start` channels came before.
  Range at(int64_t start, int64_t count) const {
    return {settings.newest_first ? channels - start - count : start, count};
  }
  Range read_by(const Layer& layer) const { return at(0, layer.channels); }
  Range made_by(const Layer& layer) const { return at(layer.channels, layer.growth); }

  // The vectors that norms normalise with, one after the other: mean and variance of the buffer's channels,
  // and of every norm whose statistics are not a part of those.
  int64_t vector_size() const {
    int64_t size = channels;
    for (size_t i = 0; i < sizes_.size(); ++i) size += has_own_vectors(i) ? sizes_[i] : 0;
    return 2 * size;
  }
  void split_vectors(const Tensor& vectors) {
    int64_t used = 0;
    const auto next = [&](int64_t size) {
      const Statistics s{part_of(vectors, 0, used, size), part_of(vectors, 0, used + size, size)};
      used += 2 * size;
      return s;
    };
    of_buffer = next(channels);
    for (size_t i = 0; i < sizes_.size(); ++i)
      of_norms.push_back(has_own_vectors(i) ? next(sizes_[i]) : at(0, sizes_[i]).of(of_buffer));
  }

  // Room for what all norms are folded into, rstd, scale and shift of each: beside the maps it is nothing.
  // `folds` says what is to be folded, once the statistics are there.
  void make_folds() {
    int64_t size = 0;
    for (int64_t n : sizes_) size += 3 * padded(n);
    const Tensor all = at::empty({size}, of_buffer.mean.options());
    int64_t used = 0;
    const auto next = [&](int64_t n) {
      used += padded(n);
      return part_of(all, 0, used - padded(n), n);
    };
    folds.reserve(sizes_.size());
    for (size_t i = 0; i < sizes_.size(); ++i) {
      const auto [weight, bias] = parameters_of(i);
      const int64_t n = sizes_[i];
      folds.push_back(
          {of_norms[i].mean, of_norms[i].var, weight, bias, settings.eps[i], next(n), next(n), next(n)});
    }
  }
  Norm norm(int64_t i) const { return folded(folds[i], batch_statistics(i)); }
  Norm norm1(const Layer& layer) const { return norm(norm1_of(layer)); }
  Norm norm2(const Layer& layer) const { return norm(norm2_of(layer)); }
  int64_t pool_norm() const { return static_cast<int64_t>(sizes_.size()) - 1; }

  int64_t pixels() const { return like_.size(0) * count_pixels(like_); }
  bool is_saved(const Layer& layer) const {
    return settings.memory == "balanced" && layer.width > 0 && layer.position >= settings.lowest;
  }
  int64_t saved_size() const {
    int64_t size = 0;
    for (const Layer& layer : layers) size += is_saved(layer) ? pixels() * layer.width : 0;
    return size;
  }
  // Every y that is kept, by its layer; undefined for the others.
  std::vector<Tensor> split_saved(const Tensor& saved) const {
    std::vector<Tensor> kept(layers.size());
    int64_t used = 0;
    for (const Layer& layer : layers) {
      if (!is_saved(layer)) continue;
      kept[layer.position] = as_map(saved, used, like_, layer.width);
      used += pixels() * layer.width;
    }
    return kept;
  }

  bool fuses(const Layer& layer) const {
    const Tensor& weight = layer.parameters.conv2_weight;
    const at::IntArrayRef kernel = weight.sizes().slice(2);
    const bool three = std::all_of(kernel.begin(), kernel.end(), [](int64_t size) { return size == 3; });
    return backend_.bn_relu_conv3x3 != nullptr && three && layer.dilation == 1;
  }
  // Whether relu(norm2(y)) is made without y: nobody wants y, norm2 is known beforehand, the convolution
  // wants z.
  bool straight_to_z(const Layer& layer) const {
    const bool known =
        settings.memory == "inference" && layer.width > 0 && !batch_statistics(norm2_of(layer));
    return known && !layer.y_mask.defined() && !fuses(layer);
  }

  // Bytes of the maps that one way holds of the scratch at once.
  int64_t scratch_bytes(bool backward) const {
    int64_t y = 0, z = 0, grad = 0;
    for (const Layer& layer : layers) {
      const int64_t source = layer.width > 0 ? layer.width : layer.channels;
      if (!is_saved(layer) && (backward || !straight_to_z(layer))) y = std::max(y, layer.width);
      if (!fuses(layer)) z = std::max(z, source);
      if (backward) {
        z = std::max(z, layer.width);  // y's gradient
        grad = std::max(grad, layer.growth);
      }
    }
    const int64_t element = static_cast<int64_t>(like_.itemsize());
    return padded(pixels() * y * element) + padded(pixels() * z * element) +
           padded(pixels() * grad * element);
  }

  const StageSettings& settings;
  std::vector<Layer> layers;
  PoolParameters<Tensor> pool;
  Statistics of_buffer;
  std::vector<Statistics> of_norms;
  std::vector<FoldOf> folds;  // by norm

 private:
  std::pair<Tensor, Tensor> parameters_of(size_t norm) const {
    const size_t step = settings.bottleneck ? 2 : 1;
    if (norm >= step * layers.size()) return {pool.norm_weight, pool.norm_bias};
    const LayerParameters<Tensor>& own = layers[norm / step].parameters;
    if (norm % step == 1) return {own.norm2_weight, own.norm2_bias};
    return {own.norm1_weight, own.norm1_bias};
  }
  // The output channels of a layer's convolution.
  int64_t check_weights(const char* op, const char* name, size_t layer, const Tensor& weight,
                        int64_t in) const {
    TORCH_CHECK_VALUE(weight.defined() && weight.dim() == like_.dim() && weight.size(1) == in, op, ": ", name,
                      "'s weight of layer ", layer, " must have ", in, " input channels and ", like_.dim(),
                      " dimensions, got shape ", weight.defined() ? weight.sizes() : at::IntArrayRef());
    return weight.size(0);
  }
  bool has_own_vectors(size_t norm) const {
    return !batch_statistics(static_cast<int64_t>(norm)) || (settings.bottleneck && is_second(norm));
  }
  bool is_second(size_t norm) const { return norm % 2 == 1 && norm < 2 * layers.size(); }

  const Backend& backend_;
  const Tensor& like_;
  std::vector<int64_t> sizes_;  // of the norms

 public:
  int64_t channels;  // of the buffer
};

}  // namespace effdense
