// A whole dense stage, forward and backward, over one backend's operators. It is effdense/engine/passes.py in
// C++, operator by operator, without the dispatcher and Python in between. That file says what is computed
// and why; both give the same bits (tests/engine/test_dense_block.py). Norms that are synchronised over
// processes stay in Python.
#pragma once

#include <string_view>
#include <vector>

#include "backend.h"

namespace effdense {

// The schemas' types for lists of tensors, in which undefined stands for None, and of truth values.
using OptionalTensors = c10::List<std::optional<Tensor>>;

// stage.py's StageConfig without the group.
struct StageSettings {
  bool bottleneck;
  std::string_view memory;
  int64_t lowest;
  at::ArrayRef<double> eps;
  c10::List<bool> batch_statistics;
  at::ArrayRef<double> drop;
  at::IntArrayRef pool, dilation;
  bool newest_first;
};

// The settings as a schema has them, as parameters, and as a StageSettings of those.
#define EFFDENSE_STAGE_SCHEMA                                                                                \
  "bool bottleneck, str memory, int lowest, float[] eps, bool[] batch_statistics, float[] drop, int[] pool," \
  " int[] dilation, bool newest_first"
#define EFFDENSE_STAGE_PARAMETERS                                                        \
  bool bottleneck, std::string_view memory, int64_t lowest, at::ArrayRef<double> eps,    \
      c10::List<bool> batch_statistics, at::ArrayRef<double> drop, at::IntArrayRef pool, \
      at::IntArrayRef dilation, bool newest_first
#define EFFDENSE_STAGE_SETTINGS                                                           \
  effdense::StageSettings {                                                               \
    bottleneck, memory, lowest, eps, batch_statistics, drop, pool, dilation, newest_first \
  }

// Bytes of the scratch memory that one way needs for a batch and images like those of `like`.
int64_t stage_scratch(const Backend& backend, const Tensor& like, int64_t channels,
                      const OptionalTensors& parameters, const OptionalTensors& masks,
                      const StageSettings& settings, bool backward);

// The pool's output (or nothing), the feature buffer, every y that is kept, the norms' vectors.
std::tuple<Tensor, Tensor, Tensor, Tensor> stage_forward(const Backend& backend, const Tensor& x,
                                                         const OptionalTensors& parameters,
                                                         const OptionalTensors& running,
                                                         const OptionalTensors& masks,
                                                         const StageSettings& settings,
                                                         const Tensor& scratch);

// Starts the backward: the gradient of the feature buffer, from the pool's (or the buffer's own), the
// coefficients a and b of the corrections to come, and the gradients of the pool's norm and convolution, as
// far as `needs` asks for them. By itself, since it has maps of its own, and the layers' scratch memory is
// not there yet.
std::vector<Tensor> stage_start_backward(const Backend& backend, const Tensor& grad, const Tensor& features,
                                         const Tensor& vectors, const OptionalTensors& parameters,
                                         const c10::List<bool>& needs, double eps, bool batch_statistics,
                                         at::IntArrayRef pool);

// Gradients of the input, of `channels` channels, and of the layers' parameters, as far as `needs` asks for
// them; grad_features, a and b are used up.
std::vector<Tensor> stage_backward(const Backend& backend, const Tensor& grad_features, const Tensor& a,
                                   const Tensor& b, int64_t channels, const Tensor& features,
                                   const Tensor& saved, const Tensor& vectors,
                                   const OptionalTensors& parameters, const OptionalTensors& masks,
                                   const c10::List<bool>& needs, const StageSettings& settings,
                                   const Tensor& scratch);

inline void define_stage(torch::Library& m) {
  m.def(
      "stage_scratch(Tensor like, int channels, Tensor?[] parameters, Tensor?[] masks, " EFFDENSE_STAGE_SCHEMA
      ", bool backward) -> int");
  m.def(
      "stage_forward(Tensor x, Tensor?[] parameters, Tensor?[] running, Tensor?[] "
      "masks, " EFFDENSE_STAGE_SCHEMA
      ", Tensor(a!) scratch) -> (Tensor out, Tensor features, Tensor saved, Tensor vectors)");
  m.def(
      "stage_start_backward(Tensor grad, Tensor features, Tensor vectors, Tensor?[] parameters, bool[] needs,"
      " float eps, bool batch_statistics, int[] pool) -> Tensor[]");
  m.def(
      "stage_backward(Tensor(a!) grad_features, Tensor(b!) a, Tensor(c!) b, int channels, Tensor features,"
      " Tensor saved, Tensor vectors, Tensor?[] parameters, Tensor?[] masks, bool[] "
      "needs, " EFFDENSE_STAGE_SCHEMA ", Tensor(d!) scratch) -> Tensor[]");
}

template <const Backend& backend>
void implement_stage(torch::Library& m) {
  m.impl("stage_scratch", [](const Tensor& like, int64_t channels, const OptionalTensors& parameters,
                             const OptionalTensors& masks, EFFDENSE_STAGE_PARAMETERS, bool backward) {
    return stage_scratch(backend, like, channels, parameters, masks, EFFDENSE_STAGE_SETTINGS, backward);
  });
  m.impl("stage_forward",
         [](const Tensor& x, const OptionalTensors& parameters, const OptionalTensors& running,
            const OptionalTensors& masks, EFFDENSE_STAGE_PARAMETERS, const Tensor& scratch) {
           return stage_forward(backend, x, parameters, running, masks, EFFDENSE_STAGE_SETTINGS, scratch);
         });
  m.impl("stage_start_backward", [](const Tensor& grad, const Tensor& features, const Tensor& vectors,
                                    const OptionalTensors& parameters, const c10::List<bool>& needs,
                                    double eps, bool batch_statistics, at::IntArrayRef pool) {
    return stage_start_backward(backend, grad, features, vectors, parameters, needs, eps, batch_statistics,
                                pool);
  });
  m.impl("stage_backward",
         [](const Tensor& grad_features, const Tensor& a, const Tensor& b, int64_t channels,
            const Tensor& features, const Tensor& saved, const Tensor& vectors,
            const OptionalTensors& parameters, const OptionalTensors& masks, const c10::List<bool>& needs,
            EFFDENSE_STAGE_PARAMETERS, const Tensor& scratch) {
           return stage_backward(backend, grad_features, a, b, channels, features, saved, vectors, parameters,
                                 masks, needs, EFFDENSE_STAGE_SETTINGS, scratch);
         });
}

}  // namespace effdense
