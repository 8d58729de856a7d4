"""The versions of torch that effdense supports, and what it says of the others.

Read by the build too (build_backend/effdense_build.py runs this file), so it imports nothing of torch or effdense.
"""

from __future__ import annotations

import re

OLDEST = 2, 8
NEWEST_TESTED = 2, 15
# Before, torch.compile cannot trace what decides whether a module runs fused, and runs it as PyTorch would.
FUSED_UNDER_COMPILE = 2, 13
NEXT_MAJOR = OLDEST[0] + 1
TORCH = f"torch>={OLDEST[0]}.{OLDEST[1]},<{NEXT_MAJOR}"


def minor_version(version: str) -> tuple[int, int]:
    """The first two numbers of a version: 2.13.0+cpu gives (2, 13)."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def why_unsupported(version: str, folder: str) -> str | None:
    """One sentence about a torch that is too old or of a later major version, and what to do; None for others."""
    found = minor_version(version)
    if OLDEST <= found < (NEXT_MAJOR, 0):
        return None
    fix = f"pip install {'--upgrade ' if found < OLDEST else ''}'{TORCH}'"
    return f"effdense needs {TORCH}, but {folder} is torch {version}; run: {fix}"


def why_untested(version: str) -> str | None:
    """One sentence about a torch that is newer than what effdense has been tested with; None for others."""
    if minor_version(version) <= NEWEST_TESTED:
        return None
    newest = ".".join(map(str, NEWEST_TESTED))
    after = f"{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}"
    return (
        f"effdense has been tested with torch {newest} at most, and this is torch {version}; should the build or "
        f"`python -m effdense check` fail, run: pip install '{TORCH.split(',')[0]},<{after}'"
    )
