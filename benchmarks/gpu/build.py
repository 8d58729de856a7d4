"""`make gpu`, stage build: compiles the extension for this GPU alone, in place, with the tools that are installed.

setup.py is run from a folder that has no pyproject.toml: setuptools before 77 refuses that file's licence line. Objects stay under
build/gpu, the module `_effdense` goes into the repository's root, where `python -m …` finds it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu import results

TEMPORARY = results.BUILD / "objects"
SEE = "import effdense, json; print(json.dumps(effdense.build_info()))"


def command(library: Path = results.ROOT, temporary: Path = TEMPORARY) -> list[str]:
    """What is run, in `source_folder()`; `library` is where the module goes."""
    line = [sys.executable, str(results.ROOT / "setup.py"), "build_ext"]
    return [*line, "--build-lib", str(library), "--build-temp", str(temporary)]


def environment(capability: str | None, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The build's environment: for a card of `capability`, with a process for every core. None: without CUDA."""
    cores = str(len(os.sched_getaffinity(0)))
    if capability is None:
        return {**given, "MAX_JOBS": cores, "FORCE_CUDA": "0"}
    return {**given, "MAX_JOBS": cores, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}


def source_folder(folder: Path = results.BUILD / "source") -> Path:
    """A folder that has the sources as setup.py names them, and nothing else that setuptools reads."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "csrc"
    if not link.is_symlink():
        link.symlink_to(results.ROOT / "csrc")
    return folder


def seconds_of_files(log: Path = TEMPORARY / ".ninja_log") -> list[dict[str, object]]:
    """How long each file took in the last build, the slowest first, as ninja notes it; none without ninja."""
    if not log.exists():
        return []
    last: dict[str, float] = {}
    for line in log.read_text().splitlines():
        parts = line.split("\t")
        if len(parts) == 5:
            last[parts[3].partition("/csrc/")[2]] = (int(parts[1]) - int(parts[0])) / 1e3
    return [{"file": f, "seconds": s} for f, s in sorted(last.items(), key=lambda pair: -pair[1])]


def main(given: Sequence[str] | None = None) -> int:
    """Run the stage; return its exit status."""
    options = results.arguments(__doc__, given)
    result = results.Result(options.json)
    import torch

    capability = "{}.{}".format(*torch.cuda.get_device_capability(options.device))
    start = time.monotonic()
    built = subprocess.run(command(), cwd=source_folder(), env=environment(capability))
    took = time.monotonic() - start
    result.save(capability=capability, built_in_s=round(took, 1), command=command())
    if built.returncode:
        return results.fail(f"setup.py build_ext ended with status {built.returncode}")
    result.save(rows=seconds_of_files())
    seen = subprocess.run([sys.executable, "-c", SEE], cwd=results.ROOT, capture_output=True, text=True)
    if seen.returncode:
        return results.fail(f"what was built cannot be imported: {(seen.stderr.splitlines() or [''])[-1]}")
    info = json.loads(seen.stdout.splitlines()[-1])
    result.save(build_info=info)
    if not info["compiled"] or info["arch_list"] != [capability]:
        return results.fail(
            f"built for {info['arch_list']}, compiled: {info['compiled']}; expected [{capability}]: {info['reason']}"
        )
    slowest = result.values["rows"][0] if result.values["rows"] else None
    result.save(
        f"for {capability} with {info['compiler']}, CUDA {info['cuda']}"
        + (
            f"; the slowest file took {slowest['seconds']:.0f} s ({slowest['file']})"
            if slowest
            else "; without ninja"
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
