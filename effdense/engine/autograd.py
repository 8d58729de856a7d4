"""Shared by the autograd nodes: autocast's rule, gradients of gradients, gradients in the parameters' form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from effdense.engine.validation import check_features, check_same_dtype


def autocast_enabled(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of x."""
    kind = x.device.type
    # torch.compile cannot trace is_autocast_available before torch 2.13, and what it compiles for has autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return available and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off where it is on."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def prepare(
    op: str, features: Sequence[Tensor], parameters: Sequence[Tensor | None]
) -> tuple[int, Sequence[Tensor], Sequence[Tensor | None], torch.dtype | None]:
    """Checks the features; returns their channels, features and convolution parameters as they run, the result's dtype.

    Under torch.autocast the widest feature decides, as in torch's own concatenation and batch norm: features of
    autocast's dtype stay as they are, and a float32 one makes all of it run in float32, up to the result (which has
    autocast's dtype; None without autocast). float64 stays out of autocast.
    """
    channels, result = check_features(op, features), None
    if autocast_enabled(features[0]):
        widest = features[0].dtype
        for x in features:
            widest = torch.promote_types(widest, x.dtype)
        features = [x.to(widest) for x in features]
        if widest != torch.float64:
            parameters = [p if p is None or p.dtype == torch.float64 else p.to(widest) for p in parameters]
            result = torch.get_autocast_dtype(features[0].device.type)
    else:
        check_same_dtype(op, features)
    tracing = torch.compiler.is_compiling()  # never of inference tensors
    if not tracing and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        # Inference tensors cannot be saved for a backward.
        features = [x.clone() if x.is_inference() else x for x in features]
    return channels, features, parameters, result


Once = Callable[[Tensor], Sequence[Tensor | None]]


class _GradientNode(torch.autograd.Function):
    """The gradients that a node's backward makes, as a node of their own: they can be differentiated again.

    Forward, `once(grad)` makes them, the ordinary way. Backward, the node's computation is made again by PyTorch's own
    operators, `plain(*inputs)`, and the gradients of that are differentiated. `wanted`: of which inputs there are gradients.
    """

    @staticmethod
    def forward(
        once: Once, plain: Callable[..., Tensor], wanted: Sequence[bool], grad: Tensor, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        with without_autocast(grad):
            return tuple(g for g in once(grad) if g is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.plain, ctx.wanted, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needs, create_graph = ctx.needs_input_grad[3:], torch.is_grad_enabled()
        grad, *inputs = ctx.saved_tensors
        with torch.enable_grad(), without_autocast(grad):
            # Views, so that what is differentiated ends here: one input may have been made of another.
            grad = _view(grad, False)
            inputs = [_view(t, want) for t, want in zip(inputs, ctx.wanted, strict=True)]
            first = torch.autograd.grad(
                ctx.plain(*inputs),
                [t for t, want in zip(inputs, ctx.wanted, strict=True) if want],
                grad,
                create_graph=True,
                allow_unused=True,
            )
            pairs = [
                (f, g)
                for f, g in zip(first, grads, strict=True)
                if f is not None and g is not None and f.requires_grad
            ]
            of = [t for t, need in zip((grad, *inputs), needs, strict=True) if need]
            if not pairs or not of:
                return (None,) * (3 + len(needs))
            firsts, seconds = zip(*pairs, strict=True)
            # Zeros, not nothing: in the naive graph almost every parameter is reached from every gradient.
            second = iter(
                torch.autograd.grad(firsts, of, seconds, create_graph=create_graph, materialize_grads=True)
            )
        return (None,) * 3 + tuple(next(second) if need else None for need in needs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, once: Once, plain: Any, wanted: Any, grad: Tensor, *inputs: Any) -> Any:
        """A batch of incoming gradients, by torch.func.vmap: one after the other."""
        made = _one_by_one(
            lambda g: _GradientNode.apply(once, plain, wanted, g, *inputs), grad.movedim(in_dims[3], 0)
        )
        return made, (0,) * len(made)


def _one_by_one(
    function: Callable[[Tensor], Sequence[Tensor | None]], grads: Tensor
) -> tuple[Tensor | None, ...]:
    """The function's results for every gradient of a batch, stacked."""
    results = zip(*map(function, grads.unbind()), strict=True)
    return tuple(None if r[0] is None else torch.stack(r) for r in results)


def _view(t: Tensor | None, wanted: bool) -> Tensor | None:
    if t is None:
        return None
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_(wanted)


def gradients(
    op: str,
    once: Once,
    plain: Callable[..., Tensor],
    grad: Tensor,
    inputs: Callable[[], Sequence[Tensor | None]],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """What a node's backward returns for its first inputs, as far as `needs` asks: right also where it is differentiated again.

    `once(grad)` makes the gradients. Only where autograd asks for a graph of them (`create_graph=True`) or gives several
    incoming gradients at once (`is_grads_batched=True`): `plain(*inputs())` is what the node has computed, by PyTorch's
    operators; its inputs must be connected to the node's.
    """
    if torch.compiler.is_compiling():
        with torch.no_grad(), without_autocast(grad):
            return tuple(once(grad))
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(grad).tangent is not None:
        raise RuntimeError(
            f"{op}: forward-mode derivatives of its backward need a forward inside of the dual level too"
        )
    if torch._C._functorch.is_legacy_batchedtensor(grad):  # autograd's own vmap
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        every = torch._remove_batch_dim(grad, level, 0, 0)
        made = _one_by_one(lambda g: gradients(op, once, plain, g, inputs, needs), every)
        return tuple(m if m is None else torch._add_batch_dim(m, 0, level) for m in made)
    if not torch.is_grad_enabled() and not torch._C._functorch.is_batchedtensor(grad):
        with without_autocast(grad):
            return tuple(once(grad))
    tensors = inputs()
    wanted = (*needs, *[False] * (len(tensors) - len(needs)))
    results = iter(_GradientNode.apply(once, plain, wanted, grad, *tensors))
    return tuple(next(results) if need else None for need in needs)


class _ContiguousGradient(torch.autograd.Function):
    """x, whose gradient will be contiguous."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def in_its_layout(x: Any) -> Any:
    """A user's input as it runs, so that torch.autograd.grad gives its gradient in the layout that PyTorch gives it.

    Users call `.view(len(x), -1)` on it, as in gradient penalties. Inside a net channels-last gradients are what comes next.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not (x.is_leaf and x.requires_grad):
        return x
    return _ContiguousGradient.apply(x) if torch.is_grad_enabled() and x.is_contiguous() else x


class Place(torch.autograd.Function):
    """A tensor's place in the graph without its values: of its shape, on one element of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty_strided(x.shape, (0,) * x.dim())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class At(torch.autograd.Function):
    """Values at another tensor's place in the graph."""

    @staticmethod
    def forward(place: Tensor, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, place: Tensor, values: Tensor) -> Any:
        """Asked for under torch.func.vmap, called for a batch only: what a node has kept is none."""
        raise NotImplementedError


def matrix(conv_weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight as the operators want it: [O, C], contiguous."""
    return conv_weight.flatten(1).contiguous()


def vector(conv_bias: Tensor | None, like: Tensor) -> Tensor | None:
    """A convolution's bias as the operators want it: in the dtype of the vector `like`, contiguous."""
    return None if conv_bias is None else conv_bias.to(like.dtype).contiguous()


def sum_per_channel(x: Tensor) -> Tensor:
    """[N, C, *spatial] -> [C]."""
    return x.sum([d for d in range(x.dim()) if d != 1])


def shaped(like: Tensor, grad: Tensor) -> Tensor:
    """A gradient in the dtype and shape of its parameter, and a 1x1 convolution's in its strides.

    DistributedDataParallel compares strides also where they mean nothing, and warns.
    """
    grad = grad if grad.dtype == like.dtype else grad.to(like.dtype)
    if like.dim() > 2 and like.shape[2:].numel() == 1 and like.stride()[:2] == (like.shape[1], 1):
        return grad.flatten(1).contiguous().as_strided(like.shape, like.stride())
    return grad if grad.shape == like.shape else grad.view(like.shape)


def empty_channels_last(like: Tensor, channels: int) -> Tensor:
    """An uninitialised [N, channels, *spatial] in channels-last layout, of the batch and spatial sizes of `like`."""
    return empty_rows(like, channels, channels)


def empty_rows(like: Tensor, channels: int, stride: int) -> Tensor:
    """The same with `stride` elements from pixel to pixel. Not a view of anything: it may be the output of a node."""
    strides = [stride]
    for n in reversed(like.shape[3:]):
        strides.insert(0, strides[0] * n)
    image = like.shape[2:].numel() * stride
    return like.new_empty_strided((like.shape[0], channels, *like.shape[2:]), (image, 1, *strides))


def dropout_scale(keep: float) -> float:
    """What dropout multiplies the values with that it keeps with this probability."""
    return 1 / keep if keep > 0 else 0.0
