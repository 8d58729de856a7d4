"""The methods and attributes by which timm's users work with a net: its features, its head, another classifier."""

from __future__ import annotations

from numbers import Integral
from typing import Any, cast

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from effdense.engine.validation import check_probability
from effdense.nn.layers import DenseLayer, PlainDenseLayer


class HeadDropout(nn.Linear):
    """A classifier that drops out what it reads, while training: timm's drop_rate. Its keys are nn.Linear's.

    Args:
        in_features, out_features: nn.Linear's.
        drop_rate: the probability.
        options: nn.Linear's others.
    """

    def __init__(self, in_features: int, out_features: int, drop_rate: float, **options: Any) -> None:
        check_probability("HeadDropout", "drop_rate", drop_rate)
        super().__init__(in_features, out_features, **options)
        self.drop_rate = drop_rate

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_features] -> [N, out_features]."""
        return super().forward(F.dropout(input, self.drop_rate, self.training))


class TimmMethods:
    """Of a net with `features` and a linear `classifier`."""

    features: Any
    classifier: Any
    num_classes: int
    num_features: int  # channels that the classifier reads
    _relu_behind = True  # whether a ReLU stands between the features and their average

    @property
    def head_hidden_size(self) -> int:
        """`num_features`: nothing but the average is between the features and the classifier."""
        return self.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, *spatial] -> the features before their average, [N, num_features, *smaller]."""
        y: Tensor = self.features(x)
        return F.relu(y) if self._relu_behind else y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives -> scores [N, num_classes]; with `pre_logits` what the classifier reads, [N, num_features].

        Raises:
            ValueError: x is something else.
        """
        if not isinstance(x, torch.fx.Proxy) and (
            not isinstance(x, Tensor) or x.dim() < 3 or x.shape[1] != self.num_features
        ):
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"forward_head: x must be what forward_features gives, [N, {self.num_features}, *spatial], got {got}"
            )
        pooled = x.flatten(2).mean(2)
        return pooled if pre_logits else self.classifier(pooled)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """What timm's `--grad-checkpointing` calls: blocks keep less for the backward, memory="minimal", or "balanced" again."""
        for module in cast("nn.Module", self).modules():
            if isinstance(module, (DenseLayer, PlainDenseLayer)):
                module.memory = "minimal" if enable else "balanced"

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Which parameters are at one depth, for timm's layer decay: the stem, and each block with the transition behind it."""
        return {
            "stem": r"^features\.(?:conv|norm|relu|pool|drop)0",
            "blocks": r"^features\.(?:denseblock|transition)(\d+)",
        }

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        classifier: nn.Module = self.classifier
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new classifier in the place of the old one, with its dtype, device and dropout.

        Args:
            num_classes: how many scores; 0: none, the net gives the averages of its features.
            global_pool: None or "avg".

        Raises:
            ValueError: num_classes is negative, or the pool another one.
        """
        if not isinstance(num_classes, Integral) or isinstance(num_classes, bool) or num_classes < 0:
            raise ValueError(f"reset_classifier: num_classes must be 0 or more, got {num_classes!r}")
        if global_pool not in (None, "avg"):
            raise ValueError(f'reset_classifier: global_pool must be "avg" (or None), got {global_pool!r}')
        old, before, like = self.classifier, self.num_classes, next(self.features.parameters())
        new: nn.Module = nn.Identity()
        if num_classes:
            new = self._new_classifier(int(num_classes), device=like.device, dtype=like.dtype)
        new.train(old.training)
        try:
            self.classifier, self.num_classes = new, int(num_classes)
        except BaseException:  # Ctrl-C between the two
            self.classifier, self.num_classes = old, before
            raise

    def _new_classifier(self, num_classes: int, **options: Any) -> nn.Linear:
        rate = getattr(self, "head_drop_rate", 0.0)
        linear = (
            HeadDropout(self.num_features, num_classes, rate, **options)
            if rate
            else nn.Linear(self.num_features, num_classes, **options)
        )
        nn.init.zeros_(linear.bias)
        return linear
