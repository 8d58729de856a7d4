"""effdense: DenseNets whose training memory is linear in depth, and faster.

`convert(model)` makes an existing model run fused; `nn` has the modules, `functional` the operator.
"""

# First: Ctrl-C while torch is imported; then what refuses a torch on which the others may not even load.
from effdense import _program as _program

# isort: split
from effdense.ops import extension as _extension

# isort: split
from effdense import functional, models, nn
from effdense._version import __version__
from effdense.conversion import convert, report, revert
from effdense.engine.workspace import empty_cache
from effdense.tools.planner import plan
from effdense.tools.summary import summary

build_info = _extension.build_info

__all__ = [
    "__version__",
    "build_info",
    "convert",
    "empty_cache",
    "functional",
    "models",
    "nn",
    "plan",
    "report",
    "revert",
    "summary",
]


def __dir__() -> list[str]:
    """The public names, without the modules that importing them has brought."""
    return sorted(__all__)
