"""The files that atheris has kept (by_coverage.py): on each a reader takes lines, or takes them as often, as on no other one."""

from __future__ import annotations

import tarfile
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus.tar.xz")


def kept(reader: str) -> list[bytes]:
    """Those of one reader."""
    with tarfile.open(CORPUS) as archive:
        entries = [e for e in archive if e.isfile() and Path(e.name).parent.name == reader]
        return [file.read() for e in entries if (file := archive.extractfile(e)) is not None]
