"""Fuzzes a reader of files with atheris, which follows the lines that run: `python -m tests.fuzz.by_coverage image CORPUS`.

`pip install atheris` first (Linux, Python 3.11 to 3.13). What comes behind the reader's name is libFuzzer's: folders of files to begin
with, which grow, and options such as -max_total_time=600.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Writes whole files into the first folder and fuzzes; a file that fails is left as crash-… in the working folder."""
    import atheris

    with atheris.instrument_imports(
        include=[
            "effdense.tensor_files",
            "effdense.train.idx",
            "effdense.models.checkpoints",
            "effdense.models.weights",
            "effdense.models.preparation",
            "PIL",
            "zipfile",
            "gzip",
        ]
    ):
        from tests.fuzz._readers import READERS, read_damaged

    _, name, corpus, *options = sys.argv
    if name not in READERS:
        sys.exit(f"there is no reader {name}; there are {', '.join(READERS)}")
    Path(corpus).mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(READERS[name].whole()):
        (Path(corpus) / f"whole-{i}").write_bytes(content)

    def one(content: Any) -> None:
        read_damaged(name, bytes(content))

    atheris.Setup([sys.argv[0], corpus, *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
