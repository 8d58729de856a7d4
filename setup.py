"""Builds the compiled module `_effdense` where there is a C++ compiler. pyproject.toml says all else."""

from __future__ import annotations

import os
import sys
import sysconfig
from glob import glob
from typing import Any

from setuptools import setup
from setuptools.command.egg_info import egg_info

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "build_backend"))
from effdense_build import TORCH, find_compiler, torch_range
from effdense_cuda import architectures, cuda_toolkit

# These say what a wheel needs or what is in it; every other command does without torch.
WHEEL_COMMANDS = {"build", "build_ext", "bdist_wheel", "develop", "dist_info", "editable_wheel", "install"}


def labelled(major: int, minor: int, cuda: str | None) -> type[egg_info]:
    """The command that decides the version; with EFFDENSE_LABEL=1 it says for what a wheel is: +pt213cpu, +pt214cu130."""

    class Labelled(egg_info):
        def finalize_options(self) -> None:
            if os.environ.get("EFFDENSE_LABEL", "0") != "0":
                # Not by an option: the setup.cfg that an sdist has says that there is none.
                self.tag_build = f"+pt{major}{minor}" + (f"cu{cuda}".replace(".", "") if cuda else "cpu")
            super().finalize_options()

    return Labelled


def compiled() -> dict[str, Any]:
    """`setup()`'s arguments for a wheel with the compiled module in it."""
    try:
        import torch
    except ImportError as error:
        sys.exit(
            f"effdense: the build needs {TORCH} but cannot import it ({error}); run: pip install '{TORCH}'"
        )
    if unsupported := torch_range["why_unsupported"](torch.__version__, os.path.dirname(torch.__file__)):
        sys.exit(unsupported)
    if untested := torch_range["why_untested"](torch.__version__):
        print(untested, file=sys.stderr)
    major, minor = torch_range["minor_version"](torch.__version__)
    # The ninja of an environment that is not activated is not on the PATH.
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
    # Python's own flags are before these and often ask for debug information.
    flags = ["-O0", "-g"] if os.environ.get("DEBUG", "0") != "0" else ["-O3", "-g0"]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    options: dict[str, Any] = {
        "include_dirs": [os.path.abspath("csrc")],
        "extra_compile_args": {"cxx": [*flags, *openmp, "-Wall", "-Wextra", "-Wno-unused-parameter"]},
        "extra_link_args": openmp,
    }
    toolkit = cuda_toolkit(torch.version.cuda)
    built_for = ";".join(architectures()) if toolkit else ""
    if toolkit:
        # torch looks for both when its extensions are imported; left alone, it takes the folder above nvcc's, which may
        # be a script's.
        os.environ["CUDA_HOME"] = toolkit
        os.environ["TORCH_CUDA_ARCH_LIST"] = built_for
        sources += sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/kernels/*.cu"))
        options["include_dirs"].append(os.path.abspath("csrc/cuda"))  # kernels name each other from there
        # torch forbids the half types' conversions, which the kernels are written with.
        allow = [f"-U__CUDA_NO_{name}_CONVERSIONS__" for name in ("HALF", "BFLOAT16")]
        # Machine code is kept compressed, to a third, until the driver loads it.
        options["extra_compile_args"]["nvcc"] = ["-O3", "-std=c++20", "-Xfatbin=-compress-all", *allow]
        options["define_macros"] = [
            ("EFFDENSE_CUDA", f'"{torch.version.cuda}"'),
            ("EFFDENSE_CUDA_ARCHITECTURES", f'"{built_for}"'),
        ]
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    extension = (CUDAExtension if built_for else CppExtension)("_effdense", sources, **options)
    return {
        "ext_modules": [extension],
        "cmdclass": {
            "build_ext": BuildExtension,
            "egg_info": labelled(major, minor, torch.version.cuda if built_for else None),
        },
        # ninja knows what is out of date in build/. setuptools would keep a module of another torch.
        "options": {"build_ext": {"force": True}},
        "install_requires": [f"torch>={major}.{minor},<{major}.{minor + 1}"],
    }


def pure() -> dict[str, Any]:
    """`setup()`'s arguments for an sdist, and for a wheel that runs on plain PyTorch."""
    return {"install_requires": [TORCH]}


if not WHEEL_COMMANDS.intersection(sys.argv):
    setup(**pure())
elif compiler := find_compiler():
    os.environ["CXX"] = compiler
    setup(**compiled())
else:
    wanted = os.environ.get("CXX") or "c++"
    print(
        f"effdense: no C++ compiler was found ({wanted} cannot be run), so effdense is built without its "
        "compiled code and will run on plain PyTorch: same results, slower, more memory.",
        file=sys.stderr,
    )
    setup(**pure())
