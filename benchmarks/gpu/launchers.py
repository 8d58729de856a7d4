"""`make gpu`, stage launchers: every kernel in a program without torch (harness/simt/launchers.cpp), alone and under compute-sanitizer.

The kernels' objects are those that the build has made. The tools run side by side: what takes long is on the CPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu import results
from benchmarks.gpu.build import TEMPORARY

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
OBJECTS = TEMPORARY / "csrc" / "cuda" / "kernels"
SOURCE = results.ROOT / "harness" / "simt" / "launchers.cpp"
PROGRAM = results.BUILD / "launchers"


def build_commands(capability: str, objects: Sequence[Path], output: Path = PROGRAM) -> list[list[str]]:
    """nvcc's commands: one compiles the program's main, one links it with the kernels' objects."""
    target, main = f"-arch=sm_{capability.replace('.', '')}", f"{output}.o"
    includes = [f"-I{results.ROOT / folder}" for folder in ("csrc/cuda", "harness")]
    compile_ = ["nvcc", "-std=c++20", target, *includes, "-x", "cu", "-c", str(SOURCE), "-o", main]
    return [compile_, ["nvcc", target, main, *map(str, objects), "-o", str(output)]]


def sanitizer_command(tool: str, program: Path = PROGRAM) -> list[str]:
    """The program under a tool of compute-sanitizer; status 9: it has found something."""
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", str(program)]


def verdict(tool: str, status: int | None, text: str) -> dict[str, str]:
    """What a tool has found, from its exit status (None: it was ended) and output."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    if status is None:
        return {"tool": tool, "outcome": "not finished in the time limit"}
    if status == 0 and summary:
        return {"tool": tool, "outcome": summary[-1]}
    if summary and not re.match(r"0 ", summary[-1]):
        found = re.search(r"========= ((?:Invalid|Error|Race|Barrier|Uninitialized)[^\n]*)", text)
        return {"tool": tool, "outcome": f"FAILED: {summary[-1]}" + (f"; {found[1]}" if found else "")}
    lines = [line.removeprefix("=========").strip() for line in text.splitlines() if line.strip("= \n")]
    return {"tool": tool, "outcome": f"FAILED: status {status}: {lines[-1] if lines else 'no output'}"}


def _run_tools(result: results.Result, end: float, environment: dict[str, str]) -> list[dict[str, Any]]:
    """All tools at once; a row each, in the order in which they end."""
    with tempfile.TemporaryDirectory() as name:
        running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes], float]] = {}
        for tool in TOOLS:
            log: IO[bytes] = (Path(name) / tool).open("w+b")
            process = subprocess.Popen(
                sanitizer_command(tool), stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            running[tool] = process, log, time.monotonic()
        while running:
            for tool, (process, log, start) in list(running.items()):
                late = time.monotonic() > end
                if (status := process.poll()) is None and not late:
                    continue
                process.kill()
                process.wait()
                log.seek(0)
                text = log.read().decode(errors="replace")
                print(f"--- {tool}\n{text[-20_000:]}")
                row = verdict(tool, status, text) | {"seconds": round(time.monotonic() - start, 1)}
                result.add(row, finding(result.values["rows"] + [row]))
                log.close()
                del running[tool]
            time.sleep(0.05)
    return result.values["rows"]


def finding(rows: Sequence[dict[str, Any]]) -> str:
    """All verdicts in a line."""
    return "; ".join(f"{row['tool']}: {row['outcome']}" for row in rows)


def main(given: Sequence[str] | None = None) -> int:
    """Run the stage; return its exit status."""
    start = time.monotonic()
    options = results.arguments(__doc__, given, seconds=40.0)
    result = results.Result(options.json)
    import torch

    capability = "{}.{}".format(*torch.cuda.get_device_capability(options.device))
    objects = sorted(OBJECTS.glob("*.o"))
    if not objects:
        return results.fail(f"the build has left no objects in {OBJECTS}")
    for command in build_commands(capability, objects):
        if status := subprocess.run(command).returncode:
            return results.fail(f"nvcc ended with status {status}")
    environment = dict(os.environ)
    if index := options.device.partition(":")[2]:
        environment["CUDA_VISIBLE_DEVICES"] = index
    alone = subprocess.run([str(PROGRAM)], env=environment, capture_output=True, text=True)
    print(alone.stdout + alone.stderr)
    result.save(by_itself_status=alone.returncode)
    if alone.returncode:
        return results.fail(
            f"the program fails by itself: {(alone.stderr.splitlines() or ['no message'])[-1]}"
        )
    rows = _run_tools(result, start + options.seconds, environment)
    bad = [row for row in rows if row["outcome"].startswith("FAILED")]
    return results.fail(finding(bad)) if bad else 0


if __name__ == "__main__":
    sys.exit(main())
