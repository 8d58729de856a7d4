"""The public functions. They check, pick the operators, and hand over to autograd."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effdense.engine import single_layer
from effdense.engine.batch_norm import Update, recomputing, update_running_statistics
from effdense.engine.inputs import through
from effdense.engine.norm import Norm
from effdense.engine.validation import check_flag, check_number


def cat_bn_relu_conv1x1(
    features: Sequence[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`conv1x1(relu(batch_norm(cat(features, 1))))` without the concatenation and without storing what lies between.

    The bottleneck of Huang et al., "Densely Connected Convolutional Networks" (arXiv 1608.06993), section 3. Kept for
    the backward: the features as they are, and two numbers per channel. Under `torch.autocast` the result has its dtype;
    features of that dtype are read as they are, wider ones in full; statistics and affine parameters are float32.

    Args:
        features: list of tensors [N, C_i, *spatial] with 1 to 3 spatial dimensions, one floating dtype, one device.
            Channels-last and contiguous images, and channel slices of either, are read where they lie; others are copied.
        norm_weight: batch normalisation's weight [C], C = sum of C_i, or None for 1.
        norm_bias: its bias [C], or None for 0.
        running_mean: [C], updated in place if `training`; may be None then.
        running_var: [C], updated in place with the unbiased variance if `training`; may be None then.
        conv_weight: [O, C, 1, ...], the features' dtype.
        conv_bias: [O], or None.
        training: normalise with the batch's statistics, else with the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.

    Returns:
        [N, O, *spatial] in channels-last layout.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which. Nothing has been changed then.

    Examples:
        >>> features = [torch.rand(2, 16, 8, 8), torch.rand(2, 8, 8, 8)]
        >>> norm, conv = torch.nn.BatchNorm2d(24), torch.nn.Conv2d(24, 48, 1)
        >>> y = effdense.functional.cat_bn_relu_conv1x1(
        ...     features, norm.weight, norm.bias, norm.running_mean, norm.running_var, conv.weight, conv.bias
        ... )
        >>> y.shape
        torch.Size([2, 48, 8, 8])
    """
    op = "cat_bn_relu_conv1x1"
    check_number(op, "momentum", momentum)
    check_number(op, "eps", eps)
    check_flag(op, "training", training)
    norm = Norm(norm_weight, norm_bias, running_mean, running_var, eps, training)

    def fused(features: Sequence[Tensor]) -> Tensor:
        y, mean, var = single_layer.bottleneck(op, _NAMES, features, norm, conv_weight, conv_bias)
        if training and not recomputing():
            update = Update(running_mean, running_var, mean, var, momentum)
            update_running_statistics([update], y.numel() // y.shape[1])
        return y

    return through(features, fused)


# What the parameters are called in messages: the norm's four tensors, the convolution's two.
_NAMES = ("norm_weight", "norm_bias", "running_mean", "running_var", "conv_weight", "conv_bias")

__all__ = ["cat_bn_relu_conv1x1"]
