// The schema of every operator, in one place, and the Python module: build info.
// Kernels register themselves for their device in csrc/<device>/; csrc/checks.h says what they refuse.
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

// Shapes: features are lists of [N, C_i, *spatial], C = sum of C_i; vectors have C elements (or the channels
// of x) and the accumulation type: double for double, float for all else. (a!) marks what is written.
TORCH_LIBRARY(effdense, m) {
  // mean and biased variance of every channel -> 2 x [C]
  m.def("channel_statistics(Tensor[] features) -> (Tensor mean, Tensor var)");
  // y = weight relu(scale * x + shift) + bias, weight [O, C] -> y [N, O, *spatial] and, with `statistics`,
  // y's mean and biased variance, [O] each (else empty)
  m.def(
      "bottleneck(Tensor[] features, Tensor scale, Tensor shift, Tensor weight, Tensor? bias, bool "
      "statistics)"
      " -> (Tensor y, Tensor mean, Tensor var)");
  // d = (weight^T grad_y) masked by relu -> grad_weight [O, C] (in the accumulation type), sum d [C],
  // sum d (x - mean) [C]; writes scale * d into grad_features[i], unless that is empty
  m.def(
      "bottleneck_backward(Tensor[] features, Tensor grad_y, Tensor scale, Tensor shift, Tensor mean, Tensor "
      "weight,"
      " Tensor(a!)[] grad_features, bool need_features, bool need_weight)"
      " -> (Tensor grad_weight, Tensor sum_d, Tensor sum_dx)");
  // grad_features -= a + b * (features - mean): finishes batch normalisation's backward
  m.def(
      "take_gradient(Tensor[] features, Tensor mean, Tensor a, Tensor b, Tensor(a!)[] grad_features) -> ()");
  // out = relu(scale * x + shift)
  m.def("bn_relu(Tensor x, Tensor scale, Tensor shift, Tensor(a!) out) -> ()");
  // grad: the gradient of relu(bn(x)), becomes the gradient of x -> sum d, sum d (x - mean)
  m.def(
      "bn_relu_backward(Tensor(a!) grad, Tensor x, Tensor scale, Tensor shift, Tensor mean, Tensor rstd,"
      " bool batch_statistics) -> (Tensor sum_d, Tensor sum_dx)");
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] =
#if defined(__clang__)
      __VERSION__;
#else
      "GCC " __VERSION__;
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda"] = pybind11::none();
  info["arch_list"] = pybind11::list();
  return info;
}

}  // namespace

PYBIND11_MODULE(_effdense, m) {
  m.doc() = "effdense's compiled operators: importing registers torch.ops.effdense.*";
  m.def("build_info", &build_info, "What this module was built with.");
}
