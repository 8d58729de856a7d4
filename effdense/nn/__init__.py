"""Drop-in modules with torchvision's constructors and parameter names.

They hold ordinary submodules (norm1, relu1, conv1, …) and run them fused: a layer, a whole block, a block with the
transition behind it, a stem, a head. Before every forward they look at their submodules. Where one has a hook, is wrapped,
replaced or changed, the submodules are called one by one instead (obstacles.py).
"""

from effdense.nn.blocks import DenseBlock, Transition
from effdense.nn.layers import DenseLayer, PlainDenseLayer
from effdense.nn.network import DenseFeatures, DenseNet

__all__ = ["DenseBlock", "DenseFeatures", "DenseLayer", "DenseNet", "PlainDenseLayer", "Transition"]
