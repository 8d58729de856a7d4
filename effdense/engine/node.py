"""A whole dense stage (passes.py) as one node of autograd.

`dense_stage` and `dense_stage_backward` are the engine's forward and backward as opaque operators, so that torch.compile sees
one node each way. Modules call `run`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effdense.engine import workspace
from effdense.engine.autograd import (
    At,
    Place,
    dropout_scale,
    empty_channels_last,
    gradients,
)
from effdense.engine.batch_norm import plain_bn_relu, refuse_group
from effdense.engine.convolution import convolve, plain_bn_relu_convolve
from effdense.engine.passes import backward, empty_buffer, forward
from effdense.engine.pool import plain_avg_pool
from effdense.engine.stage import (
    BackwardInputs,
    ForwardInputs,
    Parameters,
    PoolParameters,
    Stage,
    StageConfig,
    split_arguments,
)
from effdense.ops.dispatch import operators
from effdense.ops.reference import accumulate_dtype
from effdense.ops.schemas import library


@torch.library.impl(library, "dense_stage", "CompositeExplicitAutograd")
def _dense_stage(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, settings = split_arguments(ForwardInputs, arguments)
    ops = operators(given.x)
    with torch.no_grad():
        implementation = compiled_forward if _is_compiled(ops, settings) else forward
        return implementation(ops, settings, given)


@torch.library.impl(library, "dense_stage_backward", "CompositeExplicitAutograd")
def _dense_stage_backward(*arguments: Any) -> list[Tensor]:
    """Without the gradients that are not needed: an operator cannot return None."""
    given, settings = split_arguments(BackwardInputs, arguments)
    ops = operators(given.features)
    with torch.no_grad():
        implementation = compiled_backward if _is_compiled(ops, settings) else backward
        grads = implementation(ops, settings, given)
    return [g for g in grads if g is not None]


def _is_compiled(ops: Any, settings: StageConfig) -> bool:
    """Whether the stage in C++ (csrc/stage.h) runs on these operators: it knows no other processes."""
    return not settings.group and hasattr(ops, "stage_forward")


def compiled_forward(
    ops: Any, settings: StageConfig, given: ForwardInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As passes.forward, in csrc/stage_forward.cpp."""
    x, flat = given.x, settings[:-1]
    size = ops.stage_scratch(x, x.shape[1], given.parameters, given.masks, *flat, False)
    with workspace.lease(x.device, size) as scratch:
        made: tuple[Tensor, Tensor, Tensor, Tensor] = ops.stage_forward(*given, *flat, scratch.block)
    return made


def compiled_backward(ops: Any, settings: StageConfig, given: BackwardInputs) -> list[Tensor | None]:
    """As passes.backward, in csrc/stage_backward.cpp, without the gradients that are not needed."""
    grad, channels, features, saved, vectors, parameters, masks, needs = given
    flat, end = settings[:-1], len(parameters) - (len(PoolParameters._fields) if settings.pool else 0)
    pool = parameters[end:], needs[1 + end :], settings.eps[-1], settings.batch_statistics[-1], settings.pool
    made = ops.stage_start_backward(grad, features, vectors, *pool)
    started, of_pool = made[:3], made[3:]
    size = ops.stage_scratch(features, channels, parameters, masks, *flat, True)
    with workspace.lease(features.device, size) as scratch:
        kept = features, saved, vectors, parameters, masks
        grads = ops.stage_backward(*started, channels, *kept, needs, *flat, scratch.block)
    return [*grads, *of_pool]


@torch.library.register_fake("effdense::dense_stage")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (x, parameters, _, masks), settings = split_arguments(ForwardInputs, arguments)
    stage = Stage(settings, x.shape[1], parameters, masks)
    features, pool = empty_buffer(x, stage.channels), settings.pool
    out = x.new_empty(0)
    if pool:
        spatial = [n // k for n, k in zip(x.shape[2:], pool, strict=True)]
        weight = stage.pool_parameters.conv_weight
        channels = stage.channels if weight is None else weight.shape[0]
        out = x.new_empty(x.shape[0], *spatial, channels).movedim(-1, 1)
    vectors = x.new_empty(stage.vector_size(), dtype=accumulate_dtype(x.dtype))
    return out, features, x.new_empty(stage.saved_size(x)), vectors


@torch.library.register_fake("effdense::dense_stage_backward")
def _(*arguments: Any) -> list[Tensor]:
    given, _ = split_arguments(BackwardInputs, arguments)
    need_x, *needs = given.needs
    of_x = [empty_channels_last(given.features, given.channels)] if need_x else []
    wanted = (p for p, need in zip(given.parameters, needs, strict=True) if need and p is not None)
    return of_x + [torch.empty_like(p, memory_format=torch.contiguous_format) for p in wanted]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dense_stage": _dense_stage,
    "dense_stage_backward": _dense_stage_backward,
}


def _call(name: str, *arguments: Any) -> Any:
    """The operator; as a plain function, where nobody looks on who would see an operator: lists of hundreds of tensors are dear."""
    if torch.compiler.is_compiling() or _is_watched():
        return getattr(torch.ops.effdense, name)(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _FUNCTIONS[name](*arguments)


def _is_watched() -> bool:
    """Whether a mode of PyTorch's sees every operator."""
    return torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack() > 0


class StageNode(torch.autograd.Function):
    """The stage for autograd: returns what `dense_stage` does, without a pool's output where there is no pool."""

    @staticmethod
    def forward(
        settings: tuple[Any, ...], norms: int, masks: int, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        parameters, running, drops = _parts(norms, masks, tensors)
        made = _call("dense_stage", x, parameters, running, drops, *settings)
        return tuple(made if StageConfig(*settings).pool else made[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, norms, masks, x, *tensors = inputs
        parameters, _, drops = _parts(norms, masks, tensors)
        ctx.channels, ctx.count, ctx.place = x.shape[1], len(parameters), None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[-3:], *parameters, *drops)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = list(ctx.needs_input_grad[3 : 4 + ctx.count])
        features, saved, vectors, *tensors = _saved(ctx, grad)
        parameters, masks = tensors[: ctx.count], tensors[ctx.count :]

        def once(grad: Tensor) -> list[Tensor | None]:
            kept = features, saved, vectors, parameters, masks
            made = iter(_call("dense_stage_backward", grad, ctx.channels, *kept, needs, *ctx.settings))
            return [next(made) if need else None for need in needs]

        def inputs() -> list[Tensor | None]:
            stage = Stage(StageConfig(*ctx.settings), ctx.channels, parameters, masks)
            x = features.detach()[:, stage.at(0, ctx.channels)]
            return [x if ctx.place is None else At.apply(ctx.place, x), *parameters, vectors, *masks]

        plain = functools.partial(_plain, ctx.settings, ctx.count)
        result = gradients("DenseBlock", once, plain, grad, inputs, needs)
        rest = len(ctx.needs_input_grad) - 3 - len(result)
        return (None,) * 3 + result + (None,) * rest


def _saved(ctx: Any, grad: Tensor) -> Any:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "output 0 of StageNode" not in str(error):
            raise
        layers = ctx.count // StageConfig(*ctx.settings).parameters_per_layer
        raise RuntimeError(
            f"DenseBlock ({layers} layers, from {ctx.channels} to {grad.shape[1]} channels): its output, which its backward "
            "needs, was changed in place, as by nn.ReLU(inplace=True), y.relu_() or y += z right behind the block; write "
            f"nn.ReLU(), y.relu() or y = y + z there ({error})"
        ) from error


def is_kept(x: Tensor) -> bool:
    """Whether x is a block's output, or a view of one, that the block's backward will read."""
    node: Any = (x if x._base is None else x._base).grad_fn
    return isinstance(node, StageNode._backward_cls) and not StageConfig(*node.settings).pool  # type: ignore[attr-defined]


def _plain(settings: tuple[Any, ...], count: int, x: Tensor, *tensors: Tensor | None) -> Tensor:
    """The stage by PyTorch's own operators; `tensors`: `count` parameters, the norms' vectors, masks."""
    s, wide = StageConfig(*settings), accumulate_dtype(x.dtype)
    refuse_group("DenseBlock", [s.group])
    parameters = [None if p is None else p.to(wide) for p in tensors[:count]]
    stage = Stage(s, x.shape[1], parameters, tensors[count + 1 :])
    vectors: Any = tensors[count]
    norms = stage.split_vectors(vectors)[1]

    fixed = [None if batch else own for batch, own in zip(s.batch_statistics, norms, strict=True)]

    def drop(x: Tensor, mask: Tensor | None, keep: float) -> Tensor:
        return x if mask is None else x * mask * dropout_scale(keep)

    features = x.to(wide)
    for n in stage.layers:
        own = n.parameters
        y, norm, affine = features, n.norm1, (own.norm1_weight, own.norm1_bias)
        if n.width:
            conv1 = own.conv1_weight, own.conv1_bias
            y = plain_bn_relu_convolve(y, fixed[norm], s.eps[norm], *affine, *conv1)
            y, norm, affine = drop(y, n.masks[0], n.keep[0]), n.norm1 + 1, (own.norm2_weight, own.norm2_bias)
        conv2 = own.conv2_weight, own.conv2_bias
        new = plain_bn_relu_convolve(y, fixed[norm], s.eps[norm], *affine, *conv2, n.dilation)
        both = [features, drop(new, n.masks[1], n.keep[1])]
        features = torch.cat(both[::-1] if s.newest_first else both, 1)
    if s.pool:
        norm_weight, norm_bias, weight, bias = stage.pool_parameters
        z = plain_bn_relu(features, fixed[-1], s.eps[-1], norm_weight, norm_bias)
        features = plain_avg_pool(z, s.pool)
        features = features if weight is None else convolve(features, weight, bias)
    return features.to(x.dtype)


def _parts(
    norms: int, masks: int, tensors: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Parameters, running statistics, masks."""
    end = len(tensors) - masks
    start = end - 2 * norms
    return list(tensors[:start]), list(tensors[start:end]), list(tensors[end:])


def run(
    settings: StageConfig,
    x: Tensor,
    parameters: Parameters,
    running: Parameters,
    masks: Parameters,
) -> tuple[Tensor, Tensor]:
    """Runs a stage whose arguments have been checked, in x's dtype; `settings.lowest` and "inference" are set here.

    Returns its output (the pool's, or the feature buffer) and its vectors (see `Stage.split_vectors`).
    """
    needs = [p is not None and p.requires_grad for p in parameters] if torch.is_grad_enabled() else []
    if torch.is_grad_enabled() and (x.requires_grad or any(needs)):
        lowest = -1 if x.requires_grad else needs.index(True) // settings.parameters_per_layer
        settings = settings._replace(lowest=lowest)
        out, *_, vectors = StageNode.apply(
            tuple(settings), len(settings.eps), len(masks), x, *parameters, *running, *masks
        )
        if x.requires_grad and not torch.compiler.is_compiling():
            # Of x the stage keeps no more than its values in the buffer; a second derivative goes to x itself.
            out.grad_fn.place = Place.apply(x)
    else:
        settings = settings._replace(memory="inference")
        out, features, _, vectors = _call("dense_stage", x, parameters, running, masks, *settings)
        out = out if settings.pool else features
    return out, vectors
