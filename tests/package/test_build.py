"""The build's decisions, and the loader of the compiled module: what it finds and what it says."""

import importlib
import json
import os
import platform
import re
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import effdense
from effdense._torch_range import NEWEST_TESTED, OLDEST, TORCH, why_unsupported, why_untested
from effdense.ops.extension import extension

pytestmark = pytest.mark.tools

ROOT = Path(__file__).parents[2]
MINOR = ".".join(torch.__version__.split(".")[:2])

REPORT_IMPORT = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    caught.clear()
    import effdense
messages = [f"{w.category.__name__}: {w.message}" for w in caught]
print(json.dumps({"warnings": messages, **effdense.build_info()}))
"""


def run_python(code, *arguments, **environment):
    """Run code in the repository's root and return the finished process."""
    environment = {**os.environ, "EFFDENSE_FORCE_REFERENCE": "", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def import_effdense(before="", first="", **environment):
    """Import effdense in a process of its own, with the folder `first` before all others.

    Returns its build_info and the warnings of the import.
    """
    code = f"import sys; sys.path.insert(0, {str(first)!r}); {before}\n{REPORT_IMPORT}"
    process = run_python(code, **environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def fake_module(folder, built_for):
    """A file that is found as the compiled module, says what it was built for, and cannot be loaded."""
    file = folder / f"_effdense{sysconfig.get_config_var('EXT_SUFFIX')}"
    file.write_bytes(b"\0not a library\0effdense was built for torch " + built_for.encode() + b"\0")
    return file


@pytest.mark.core
def test_build_info_says_what_runs():
    info = effdense.build_info()
    assert info["effdense"] == effdense.__version__
    assert info["torch"] == torch.__version__
    assert info["python"] == platform.python_version()
    assert info["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert info["compiled"] == (extension is not None) == (info["reason"] is None)
    assert info["implementation"] == ("compiled" if info["compiled"] else "fallback")
    assert {"torch_built_for", "compiler", "openmp", "cuda", "arch_list"} <= info.keys()


@pytest.mark.core
@pytest.mark.skipif(extension is None, reason="no compiled module")
def test_the_file_and_the_compiled_module_name_the_same_torch():
    info = effdense.build_info()
    assert info["torch_built_for"] == extension.build_info()["torch"]
    assert info["torch_built_for"].startswith(MINOR + ".")


def test_a_module_for_another_torch_is_not_loaded(tmp_path):
    file = fake_module(tmp_path, "1.99.3+cpu")
    report = import_effdense(first=tmp_path)
    (warning,) = report["warnings"]
    assert warning.startswith("RuntimeWarning: effdense runs on plain PyTorch")
    assert f"{file} was built for torch 1.99.3+cpu, and this is torch {torch.__version__}" in warning
    assert "run `pip install --force-reinstall --no-deps --no-cache-dir .` in effdense's source" in warning
    assert (report["implementation"], report["torch_built_for"]) == ("fallback", "1.99.3+cpu")
    assert report["reason"] in warning


def test_a_module_in_a_source_tree_is_fixed_by_an_editable_install(tmp_path):
    fake_module(tmp_path, "1.99.3")
    (tmp_path / "setup.py").touch()
    (warning,) = import_effdense(first=tmp_path)["warnings"]
    assert "--no-cache-dir -e .`" in warning


def test_a_module_that_does_not_load(tmp_path):
    file = fake_module(tmp_path, torch.__version__)
    report = import_effdense(first=tmp_path)
    (warning,) = report["warnings"]
    assert f"because {file} does not load (" in warning
    assert report["implementation"] == "fallback"


def test_no_module():
    report = import_effdense(before="sys.modules['_effdense'] = None")
    (warning,) = report["warnings"]
    assert "there is no compiled module _effdense" in warning
    assert warning.endswith("with a C++ compiler installed")
    assert (report["compiled"], report["torch_built_for"], report["openmp"]) == (False, None, False)


def test_the_fallback_that_the_user_asks_for_needs_no_warning():
    report = import_effdense(EFFDENSE_FORCE_REFERENCE="1")
    assert report["warnings"] == []
    assert (report["implementation"], report["reason"]) == ("fallback", "EFFDENSE_FORCE_REFERENCE is set")


@pytest.fixture
def backend(monkeypatch):
    """The build backend, imported as pip does, in this process."""
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(ROOT / "build_backend")
    monkeypatch.delitem(sys.modules, "effdense_build", raising=False)
    return importlib.import_module("effdense_build")


def test_the_backend_finds_the_torch_that_isolation_hides(backend, monkeypatch):
    folder = Path(torch.__file__).parent
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p) != folder.parent])
    isolated = list(sys.path)
    assert backend.find_torch() == folder
    assert backend.requirements() == []
    backend.show_installed_torch()
    assert sys.path[: len(isolated)] == isolated, "what is isolated must come first"
    assert str(folder.parent) in sys.path[len(isolated) :]


def test_the_backend_asks_for_torch_where_there_is_none(backend, monkeypatch, tmp_path):
    (leftover,) = site.getsitepackages([str(tmp_path)])[:1]
    (Path(leftover) / "torch" / "lib").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(site, "PREFIXES", [str(tmp_path)])
    monkeypatch.delenv("CXX", raising=False)
    assert backend.find_torch() is None
    assert backend.requirements() == [TORCH]
    monkeypatch.setenv("CXX", "/nonexistent/c++ -m64")
    assert backend.requirements() == [], "a wheel without compiled code is built without torch"


def test_the_backend_sees_the_system_packages_that_the_environment_sees(backend, monkeypatch, tmp_path):
    system = tmp_path / "system"
    (packages,) = site.getsitepackages([str(system)])[:1]
    torch_folder = Path(packages) / "torch"
    torch_folder.mkdir(parents=True)
    (torch_folder / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "base_prefix", str(system))
    monkeypatch.setattr(site, "PREFIXES", [str(tmp_path / "venv")])
    assert backend.find_torch() is None
    monkeypatch.setattr(site, "PREFIXES", [str(tmp_path / "venv"), str(system)])
    assert backend.find_torch() == torch_folder


def setup_py(before, *arguments, **environment):
    """Run setup.py as the backend does."""
    pytest.importorskip("setuptools")
    run = "sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
    return run_python(f"import runpy, sys; {before}; {run}", *arguments, **environment)


def required_torch(folder: Path) -> set[str]:
    """The bounds in the metadata, in whatever order setuptools wrote them."""
    (metadata,) = [*folder.rglob("METADATA"), *folder.rglob("requires.txt")]
    (versions,) = re.findall(r"^(?:Requires-Dist: )?torch([<>].*)$", metadata.read_text(), re.MULTILINE)
    return set(versions.split(","))


SUPPORTED = set(TORCH.removeprefix("torch").split(","))


NO_TORCH = "sys.modules['torch'] = None"


def test_an_sdist_needs_no_torch(tmp_path):
    process = setup_py(NO_TORCH, "egg_info", "--egg-base", str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert required_torch(tmp_path) == SUPPORTED


@pytest.mark.core
def test_a_compiled_wheel_requires_the_torch_it_was_built_for(tmp_path):
    process = setup_py("pass", "dist_info", "--output-dir", str(tmp_path), CXX=sys.executable)
    assert process.returncode == 0, process.stderr
    major, minor = MINOR.split(".")
    assert required_torch(tmp_path) == {f">={MINOR}", f"<{major}.{int(minor) + 1}"}


def test_without_a_compiler_setup_says_so_and_any_torch_will_do(tmp_path):
    process = setup_py(NO_TORCH, "dist_info", "--output-dir", str(tmp_path), CXX="/nonexistent/c++")
    assert process.returncode == 0, process.stderr
    assert "effdense: no C++ compiler was found (/nonexistent/c++ cannot be run)" in process.stderr
    assert required_torch(tmp_path) == SUPPORTED


def fake_torch(version):
    return f"types.SimpleNamespace(__version__={version!r}, __file__='/there/torch/__init__.py', version=types.SimpleNamespace(cuda=None))"


BEFORE_OLDEST = f"{OLDEST[0]}.{OLDEST[1] - 1}.1+cpu"
AFTER_NEWEST = f"{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}.0"
NEXT = f"{OLDEST[0] + 1}.0.0"


@pytest.mark.parametrize(
    "torch_module, message",
    [
        ("None", f"effdense: the build needs {TORCH} but cannot import it"),
        (
            fake_torch(BEFORE_OLDEST),
            f"effdense needs {TORCH}, but /there/torch is torch {BEFORE_OLDEST}; run: pip install --upgrade '{TORCH}'\n",
        ),
        (
            fake_torch(NEXT),
            f"effdense needs {TORCH}, but /there/torch is torch {NEXT}; run: pip install '{TORCH}'\n",
        ),
    ],
    ids=["none", BEFORE_OLDEST, NEXT],
)
def test_a_build_without_a_usable_torch_is_an_error(tmp_path, torch_module, message):
    before = f"import types; sys.modules['torch'] = {torch_module}"
    process = setup_py(before, "dist_info", "--output-dir", str(tmp_path), CXX=sys.executable)
    assert process.returncode != 0
    assert process.stderr.startswith(message)
    assert process.stderr.count("\n") == 1


def test_a_newer_minor_version_of_torch_is_built_for_and_pinned(tmp_path):
    """What PyTorch releases next is tried, and said not to have been tested."""
    before = f"import torch; torch.__version__ = {AFTER_NEWEST!r}"
    process = setup_py(before, "dist_info", "--output-dir", str(tmp_path), CXX=sys.executable, FORCE_CUDA="0")
    assert process.returncode == 0, process.stderr
    assert "effdense has been tested with torch" in process.stderr
    assert f"this is torch {AFTER_NEWEST}; should the build" in process.stderr
    major, minor = AFTER_NEWEST.split(".")[:2]
    assert required_torch(tmp_path) == {f">={major}.{minor}", f"<{major}.{int(minor) + 1}"}


@pytest.mark.core
@pytest.mark.parametrize("version, fix", [(BEFORE_OLDEST, "--upgrade "), (NEXT, "")])
def test_an_unsupported_torch_is_refused_by_the_import(version, fix):
    process = run_python(f"import torch; torch.__version__ = {version!r}; import effdense")
    assert process.returncode != 0
    folder = Path(torch.__file__).parent
    assert process.stderr.splitlines()[-1] == (
        f"ImportError: effdense needs {TORCH}, but {folder} is torch {version}; run: pip install {fix}'{TORCH}'"
    )


@pytest.mark.core
def test_this_torch_is_one_that_has_been_tested():
    assert why_unsupported(torch.__version__, "") is None and why_untested(torch.__version__) is None


# ---- The CUDA kernels


@pytest.fixture
def cuda_build(backend):
    """What the build decides about CUDA; `backend` has put its folder on the path."""
    sys.modules.pop("effdense_cuda", None)
    return importlib.import_module("effdense_cuda")


def make_nvcc(folder, release="13.0"):
    """A toolkit under `folder`/toolkit, and an nvcc in `folder`/bin that is a script outside of it."""
    toolkit = folder / "toolkit"
    script = folder / "bin" / "nvcc"
    (toolkit / "bin").mkdir(parents=True)
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.48"\n'
        f'[ "$1" = --dryrun ] && echo "#\\$ TOP={toolkit}/bin/.." >&2\nexit 0\n'
    )
    script.chmod(0o755)
    return toolkit, script.parent


def test_the_toolkit_is_found_behind_a_script(cuda_build, monkeypatch, tmp_path):
    toolkit, path = make_nvcc(tmp_path)
    for name in ("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{path}:/bin")
    assert cuda_build.cuda_toolkit("13.0") == str(toolkit)
    assert cuda_build.cuda_toolkit("13.2") == str(toolkit), "the same major version"
    assert cuda_build.cuda_toolkit(None) is None, "torch is without CUDA"
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert cuda_build.cuda_toolkit("13.0") is None
    monkeypatch.delenv("FORCE_CUDA")
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("CUDA_HOME", str(path.parent))
    assert cuda_build.cuda_toolkit("13.0") == str(toolkit)


@pytest.mark.parametrize(
    "release, reason, fix",
    [
        ("12.8", "nvcc is of CUDA 12", ", or install a torch that is built for CUDA 12"),
        ("what", "nvcc is of an unknown version", ""),
        (None, "nvcc was not found", ""),
    ],
    ids=str,
)
def test_without_a_toolkit_for_this_torch_there_are_no_kernels(
    cuda_build, monkeypatch, tmp_path, capsys, release, reason, fix
):
    path = make_nvcc(tmp_path, release)[1] if release else tmp_path
    for name in ("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{path}:/bin" if release else str(path))
    assert cuda_build.cuda_toolkit("13.2") is None
    told = capsys.readouterr().err
    assert told.startswith("effdense: torch is built for CUDA 13.2, but ") and reason in told
    fix = f"install CUDA 13's toolkit with its nvcc on the PATH, or name its folder in CUDA_HOME{fix}"
    assert told.endswith(
        f"CUDA kernels are left out, on a GPU plain PyTorch will run; to have them, {fix}.\n"
    )
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=f"FORCE_CUDA is set, so nothing was built: {fix}$"):
        cuda_build.cuda_toolkit("13.2")


@pytest.mark.parametrize(
    "asked, built",
    [
        (None, "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("", "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("9.0", "9.0"),
        ("8.0 9.0a+PTX", "8.0;9.0a+PTX"),
        ("7.5", "7.5"),
        ("7.0;7.5", "7.5"),
        ("7.5+PTX", "7.5"),
        ("5.2,6.1", ""),
    ],
)
def test_the_cards_that_are_built_for(cuda_build, monkeypatch, asked, built):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if asked is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert ";".join(cuda_build.architectures()) == built


def test_what_is_built_for_turing_is_for_no_later_card(cuda_build, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5+PTX")
    cuda_build.architectures()
    told = "effdense: code for 7.5 runs on 7.5 alone: 7.5+PTX is built as 7.5.\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    "asked, named",
    [
        ("7.5;9.0", None),
        ("7.0;8.0", "7.0 (Volta)"),
        ("6.1 7.2+PTX 8.0", "6.1 (Pascal), 7.2+PTX (Volta)"),
        ("5.2", "5.2 (Maxwell)"),
    ],
)
def test_cards_that_are_too_old_are_named(cuda_build, monkeypatch, capsys, asked, named):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    cuda_build.architectures()
    told = f"effdense: no CUDA kernels are built for {named}, where plain PyTorch will run: "
    told += "they need compute capability 7.5 (Turing) at least.\n"
    assert capsys.readouterr().err == (told if named else "")


def test_cards_that_nobody_can_name(cuda_build, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(
        SystemExit, match=r"a list of compute capabilities such as 8\.0;9\.0\+PTX, got '8\.0;Hopper'"
    ):
        cuda_build.architectures()
