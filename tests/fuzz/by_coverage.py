"""Fuzzes a reader of files with atheris, which follows the lines that run: `python -m tests.fuzz.by_coverage image FOLDER/image`.

`pip install atheris` first (Linux, Python 3.11 to 3.13). What comes behind the reader's name is libFuzzer's: folders of files, which
grow, and options such as -max_total_time=600. It begins with the files in corpus.tar.xz, which the tests read too;
`python -m tests.fuzz.by_coverage keep FOLDER` puts those there that lie in FOLDER/image, FOLDER/idx and so on.
"""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path
from typing import Any

from tests.fuzz._corpus import CORPUS, kept


def keep(folder: Path) -> None:
    """Packs a folder of readers' folders, to the same bytes every time."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime, entry.mode = 0, 0o644
        return entry

    with tarfile.open(CORPUS, "w:xz") as archive:
        for path in sorted(p for p in folder.glob("*/*") if p.is_file()):
            archive.add(path, str(path.relative_to(folder)), filter=plain)


def main() -> None:
    """Writes files to begin with into the first folder and fuzzes; a file that fails is left as crash-… in the working folder."""
    if sys.argv[1] == "keep":
        return keep(Path(sys.argv[2]))
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
    for i, content in enumerate([*READERS[name].whole(), *kept(name)]):
        (Path(corpus) / f"first-{i}").write_bytes(content)

    def one(content: Any) -> None:
        read_damaged(name, bytes(content))

    atheris.Setup([sys.argv[0], corpus, *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
