"""The schemas of the operators that run without the extension too; those of kernels alone are in csrc/schemas.h and csrc/stage.h.

The rule: torch.ops must know an operator whenever Python calls it. So what is called with the extension and without is defined
here, and registered in Python by the file that is named above it; C++ may register a faster kernel all the same.
"""

from __future__ import annotations

import torch

# What a stage is made of beside its tensors: engine/stage.py's StageConfig, in its order.
_STAGE = (
    "bool bottleneck, str memory, int lowest, float[] eps, bool[] batch_statistics, float[] drop, int[] pool,"
    " int[] dilation, bool newest_first, str group"
)
# The same of a stem: engine/stem.py's Parameters and StemConfig.
_STEM_TENSORS = "Tensor conv_weight, Tensor? conv_bias, Tensor? norm_weight, Tensor? norm_bias"
_STEM = (
    "int[] stride, int[] padding, int[] dilation, int groups, int[] kernel_size, int[] pool_stride, int[] pool_padding,"
    " float eps, bool batch_statistics, str group"
)
SCHEMAS = (
    # engine/node.py
    f"dense_stage(Tensor x, Tensor?[] parameters, Tensor?[] running, Tensor?[] masks, {_STAGE})"
    " -> (Tensor out, Tensor features, Tensor saved, Tensor vectors)",
    "dense_stage_backward(Tensor grad, int channels, Tensor features, Tensor saved, Tensor vectors,"
    f" Tensor?[] parameters, Tensor?[] masks, bool[] needs, {_STAGE}) -> Tensor[]",
    # engine/stem.py
    f"stem(Tensor x, {_STEM_TENSORS}, Tensor? running_mean, Tensor? running_var, {_STEM})"
    " -> (Tensor out, Tensor where, Tensor mean, Tensor var)",
    f"stem_backward(Tensor grad, Tensor where, Tensor mean, Tensor var, Tensor x, {_STEM_TENSORS}, bool[] needs, {_STEM})"
    " -> Tensor[]",
    # engine/batch_norm.py
    "move_running_statistics(Tensor(a!)[] running, Tensor[] batch, float[] momentum, bool[] unbiased, SymInt count,"
    " str group) -> ()",
    # engine/batch_norm.py, of reference.py; a kernel of the CPU's
    "update_running_statistics(Tensor(a!)[] running, Tensor[] batch, float[] running_factors,"
    " float[] batch_factors) -> ()",
    # engine/batch_norm.py; kernels of the CPU's
    "count_batches(Tensor(a!)[] counters) -> ()",
    # The same two from a stage's vectors: each running statistic by what starts at its place in there; `any`: not of an
    # empty batch.
    "update_from_vectors(Tensor vectors, int[] starts, Tensor(a!)[] running, float[] running_factors,"
    " float[] batch_factors, Tensor(b!)[] counters, bool any) -> ()",
    # engine/synchronize.py
    "join_statistics(Tensor mean, Tensor var, SymInt count, str group) -> (Tensor, Tensor)",
    "join_coefficients(Tensor a, Tensor b, SymInt count, str group) -> (Tensor, Tensor)",
)

library = torch.library.Library("effdense", "FRAGMENT")
for _schema in SCHEMAS:
    library.define(_schema)
