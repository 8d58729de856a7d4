// The schemas of the operators that are kernels. They are in a header because the tests define them once
// more: as effdense_simt, the CUDA operators on the CPU. effdense/ops/schemas.py has the schemas of what runs
// without this extension too.
#pragma once

#include <torch/library.h>

namespace effdense {

// Shapes: maps are [N, C, *spatial], features are lists of [N, C_i, *spatial] with C = sum of C_i; vectors
// have C elements and the accumulation type: double for double, float for all else. d is the gradient behind
// relu, where relu passes it. (a!) marks what is written; written maps are channels-last.
inline void define_operators(torch::Library& m) {
  // Batch normalisation and relu as relu(scale * x + shift): rstd = 1 / sqrt(var + eps), scale = weight *
  // rstd, shift = bias - mean * scale (weight, bias: any floating type; None: 1, 0)
  m.def(
      "fold(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor rstd, Tensor scale, Tensor shift)");
  // What batch normalisation's backward subtracts, -(a + b (x - mean)), for one reader of the first channels:
  // a += scale * sum_d / count, b += scale * rstd^2 * sum_dx / count
  m.def(
      "accumulate_correction(Tensor sum_d, Tensor sum_dx, Tensor rstd, Tensor scale, int count,"
      " Tensor(a!) a, Tensor(b!) b) -> ()");
  // mean and biased variance of every channel -> 2 x [C]
  m.def("channel_statistics(Tensor[] features) -> (Tensor mean, Tensor var)");
  // out = new_features, with their mean and biased variance
  m.def("append_features(Tensor new_features, Tensor(a!) out) -> (Tensor mean, Tensor var)");
  // y = weight relu(scale * x + shift) + bias, weight [O, C], and with out_scale and out_shift
  // y = relu(out_scale * y + out_shift); with `statistics` y's mean and biased variance, [O] each (else
  // empty)
  m.def(
      "bottleneck(Tensor[] features, Tensor scale, Tensor shift, Tensor weight, Tensor? bias,"
      " Tensor? out_scale, Tensor? out_shift, bool statistics, Tensor(a!) y) -> (Tensor mean, Tensor var)");
  // d = (weight^T grad_y) masked by relu -> grad_weight [O, C] (in the accumulation type), sum d, sum d (x -
  // mean); grad_features[i] becomes scale * d, or with `accumulate` grows by it, unless it is empty.
  // `correction`: nothing, or y, mean_y, a, b where grad_y - a - b * (y - mean_y) is what stands for grad_y,
  // or behind them scale_y, shift_y of a norm and relu over y, whose output's gradient grad_y still is:
  // scale_y * d_y - a - b * (y - mean_y)
  m.def(
      "bottleneck_backward(Tensor[] features, Tensor grad_y, Tensor scale, Tensor shift, Tensor mean,"
      " Tensor weight, Tensor(a!)[] grad_features, bool accumulate, bool need_features, bool need_weight,"
      " Tensor[] correction)"
      " -> (Tensor grad_weight, Tensor sum_d, Tensor sum_dx)");
  // out = grad - a - b * (x - mean): finishes batch normalisation's backward; out may be grad
  m.def("apply_correction(Tensor x, Tensor mean, Tensor a, Tensor b, Tensor grad, Tensor(a!) out) -> ()");
  // out = relu(scale * x + shift)
  m.def("bn_relu(Tensor x, Tensor scale, Tensor shift, Tensor(a!) out) -> ()");
  // the same, and with grad, the gradient of that: sum d, sum d (x - mean)
  m.def(
      "bn_relu_backward_sums(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor mean, Tensor(a!) out)"
      " -> (Tensor sum_d, Tensor sum_dx)");
  // grad: the gradient of relu(bn(x)), becomes the gradient of x -> sum d, sum d (x - mean)
  m.def(
      "bn_relu_backward(Tensor(a!) grad, Tensor x, Tensor scale, Tensor shift, Tensor mean, Tensor rstd,"
      " bool batch_statistics) -> (Tensor sum_d, Tensor sum_dx)");
  // grad_x += scale * d -> sum d, sum d (x - mean)
  m.def(
      "bn_relu_backward_accumulate(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor mean,"
      " Tensor(a!) grad_x) -> (Tensor sum_d, Tensor sum_dx)");
  // the average of relu(scale * x + shift) over windows of kernel_size side by side; the rest is left out
  m.def("bn_relu_avg_pool(Tensor x, Tensor scale, Tensor shift, int[] kernel_size) -> Tensor");
  // grad_x = scale * d -> sum d, sum d (x - mean)
  m.def(
      "bn_relu_avg_pool_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor mean,"
      " int[] kernel_size, Tensor(a!) grad_x) -> (Tensor sum_d, Tensor sum_dx)");
  // the maximum of relu(scale * x + shift) over windows, and which tap of the window it was, in bytes
  m.def(
      "bn_relu_max_pool(Tensor x, Tensor scale, Tensor shift, int[] kernel_size, int[] stride, int[] padding)"
      " -> (Tensor out, Tensor where)");
  // grad_z: the gradient of what bn_relu_max_pool took the maximum of
  m.def(
      "max_pool_backward(Tensor grad, Tensor where, int[] kernel_size, int[] stride, int[] padding,"
      " Tensor(a!) grad_z) -> ()");
}

// Elsewhere cuDNN's convolutions are hard to beat, and the engine takes bn_relu and those.
inline void define_cpu_operators(torch::Library& m) {
  // out = weight * relu(scale * x + shift) + bias, a convolution 3 wide in every direction, with padding 1 ->
  // out's mean and variance
  m.def(
      "bn_relu_conv3x3(Tensor x, Tensor scale, Tensor shift, Tensor weight, Tensor? bias, Tensor(a!) out)"
      " -> (Tensor mean, Tensor var)");
  // d = (gradient of relu(...)) masked by relu -> grad_weight [O, C, 3, ...] (in the accumulation type), sum
  // d, sum d (x - mean); grad_x becomes scale * d, or with `accumulate` grows by it
  m.def(
      "bn_relu_conv3x3_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor mean,"
      " Tensor weight, Tensor(a!) grad_x, bool accumulate, bool need_x, bool need_weight)"
      " -> (Tensor grad_weight, Tensor sum_d, Tensor sum_dx)");
}

}  // namespace effdense
