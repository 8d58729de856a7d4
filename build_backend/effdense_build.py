"""The PEP 517/660 backend: setuptools', building against the torch that is installed, where there is one.

Build isolation hides the packages of the environment that is installed into, torch too. Left alone, pip
would fetch a second torch of several GB, and compile for that one, not for the one that will run.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import site
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# Without importing effdense, which imports torch.
torch_range = runpy.run_path(str(Path(__file__).parents[1] / "effdense" / "_torch_range.py"))
TORCH: str = torch_range["TORCH"]

Config = dict[str, Any] | None


def site_directories() -> list[str]:
    """Where the environment that is installed into looks for packages, also where isolation hides that.

    In pip's isolation `sys.prefix` stays that environment's. `site.PREFIXES` has the base interpreter's
    prefix too, unless it is a virtual environment without system packages (and so without user packages).
    """
    directories = site.getsitepackages([sys.prefix])
    if sys.base_prefix in site.PREFIXES:
        directories += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
    return list(dict.fromkeys(directories))


def find_torch() -> Path | None:
    """The folder of the torch to build against, or None: pip then has to fetch one."""
    spec = PathFinder.find_spec("torch", sys.path + site_directories())
    # Without an origin it is a namespace package: a folder that an uninstalled torch left behind.
    return Path(spec.origin).parent if spec and spec.origin else None


def find_compiler() -> str | None:
    """The command of the C++ compiler, `$CXX` or the first usual one, or None if it cannot be run."""
    commands = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((command for command in commands if shutil.which(shlex.split(command)[0])), None)


def requirements() -> list[str]:
    """What a build needs beyond pyproject.toml's list."""
    return [TORCH] if find_compiler() and not find_torch() else []


def show_installed_torch() -> None:
    """Make `import torch` work, with all else behind what is isolated: the setuptools in use is that one."""
    if find_torch():
        sys.path.extend(directory for directory in site_directories() if directory not in sys.path)


def get_requires_for_build_wheel(config_settings: Config = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *requirements()]


def get_requires_for_build_editable(config_settings: Config = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *requirements()]


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Config = None) -> str:
    show_installed_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Config = None) -> str:
    show_installed_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None
) -> str:
    show_installed_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None
) -> str:
    show_installed_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
