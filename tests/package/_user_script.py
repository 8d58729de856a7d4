"""A user's script, for type checkers (mypy and pyright, `make lint`) and to be run (test_docstrings.py).

Its name ends where a user's would begin: everything is imported as the pages say, and `assert_type` says what a user may rely on.
What is under TYPE_CHECKING is wrong and would raise: each line must be reported, else its comment is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import assert_type  # torch's dependency

import effdense
from effdense.models import DenseNet


class Classifier(nn.Module):
    """A user's own model."""

    def __init__(self) -> None:
        super().__init__()
        self.block = effdense.nn.DenseBlock(2, 8, bn_size=4, growth_rate=4, drop_rate=0.0, memory="minimal")
        self.transition = effdense.nn.Transition(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 8, height, width] -> scores [N, 3]."""
        y: Tensor = self.transition(self.block(x))
        scores: Tensor = self.head(y.mean((2, 3)))
        return scores

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy."""
        return nn.functional.cross_entropy(self(x), labels)


def main(checkpoint: str | None = None) -> None:
    """Converts, trains a step, looks at the model, and stores it."""
    model = effdense.convert(Classifier(), memory="balanced")
    assert_type(model, Classifier)
    model.loss(torch.rand(2, 8, 8, 8), torch.tensor([0, 2])).backward()
    for entry in effdense.report(model):
        assert_type(entry.reason, str | None)
    assert_type(effdense.plan(model, (2, 8, 8, 8), memory="minimal").total, int)
    assert_type(effdense.revert(model), Classifier)

    net = effdense.models.densenet121(num_classes=3, drop_rate=0.1, memory="minimal")
    assert_type(net, DenseNet)
    assert_type(effdense.models.load_weights(net, net.state_dict()), DenseNet)
    small = effdense.models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=8)
    assert_type(effdense.summary(small, (2, 3, 32, 32)).total.parameters, int)
    y = effdense.functional.cat_bn_relu_conv1x1(
        [torch.rand(2, 4, 3, 3), torch.rand(2, 4, 3, 3)], None, None, None, None, torch.rand(5, 8, 1, 1)
    )
    assert_type(y, Tensor)
    if checkpoint is not None:
        trained = effdense.models.load_checkpoint(checkpoint).eval()
        assert_type(trained.class_names, list[str])
        assert_type(trained.prepare("image.png"), Tensor)

    if TYPE_CHECKING:
        effdense.convert(net, memory="minimum")  # type: ignore[arg-type]
        effdense.convert(net.state_dict())  # type: ignore[type-var]
        effdense.plan(net, (1, 3, 32, 32), memory="tiny")  # type: ignore[arg-type]
        effdense.models.densenet169(num_clases=3)  # type: ignore[call-arg]
        effdense.models.densenet_cifar(memory="none")  # type: ignore[arg-type]
        effdense.nn.DenseLayer(8, 4, 4, 0.0, memory="none")  # type: ignore[arg-type]
        effdense.models.load_weights(net, 3)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
