"""Damaged files: every reader says in one line what is wrong, without any other error, long waits or much memory."""

from __future__ import annotations

import gzip
import os
import struct
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from effdense.train.listing import images_by_class
from tests.fuzz._corpus import kept
from tests.fuzz._fuzz import fuzz
from tests.fuzz._readers import (
    KINDS,
    ODD,
    READERS,
    Change,
    Damage,
    a_checkpoint,
    changed,
    damaged,
    read_damaged,
    safetensors_of,
    saved,
    some_tensors,
)

pytestmark = pytest.mark.compiled
numbers = st.integers(0, 2**31)
damages = st.lists(
    st.builds(Damage, st.sampled_from(list(KINDS)), st.integers(0, 999_999), numbers), min_size=1, max_size=4
)


@cache
def whole(name: str) -> list[bytes]:
    return READERS[name].whole()


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(name: str, tmp_path: Path) -> None:
    """The fuzzers begin with something that is right."""
    read = 0
    for i, content in enumerate(whole(name)):
        (folder := tmp_path / str(i)).mkdir()
        (path := folder / READERS[name].name).write_bytes(content)
        if name != "idx" or content[:2] == b"\x1f\x8b":
            READERS[name].read(path)
            read += 1
    assert read


@pytest.mark.parametrize("name", ["checkpoint", "idx", "image", "tensors"])
def test_what_atheris_has_kept(name: str) -> None:
    files = kept(name)
    assert len(files) > 40
    for content in files:
        read_damaged(name, content)


@fuzz(st.tuples(st.sampled_from(list(READERS)), numbers, damages), 100)
def test_damaged_bytes(case: tuple[str, int, list[Damage]]) -> None:
    name, which, damage = case
    read_damaged(name, damaged(whole(name)[which % len(whole(name))], damage))


@fuzz(st.tuples(st.sampled_from(["tensors", "weights", "checkpoint", "resume"]), st.binary(max_size=64)), 40)
def test_any_bytes(case: tuple[str, bytes]) -> None:
    read_damaged(*case)


changes = st.lists(
    st.builds(
        Change, st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple), st.integers(0, len(ODD) + 4)
    ),
    min_size=1,
    max_size=3,
)


# state_dict, class_names and options of another kind; a state_dict without weights, a file without one; a tensor as num_classes
FOUND: list[Any] = [
    ("checkpoint", [Change((5,), 0)]),
    ("checkpoint", [Change((2,), 0)]),
    ("checkpoint", [Change((1,), 15)]),
    ("weights", [Change((5,), 9)]),
    ("weights", [Change((5,), 99)]),
    ("checkpoint", [Change((1, 0), 15)]),
]


@fuzz(st.tuples(st.sampled_from(["weights", "checkpoint", "resume"]), changes), 60, *FOUND)
def test_checkpoints_of_odd_values(case: tuple[str, list[Change]]) -> None:
    name, change = case
    read_damaged(name, saved(changed(a_checkpoint(), change)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "I8", "F8"]) | json_values,
        "shape": st.lists(st.integers(-3, 9), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-9, 70), min_size=1, max_size=3) | json_values,
    },
)


@fuzz(
    st.tuples(
        st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3), st.binary(max_size=64)
    ),
    100,
)
def test_safetensors_headers(case: tuple[dict[str, Any], bytes]) -> None:
    pytest.importorskip("safetensors")
    read_damaged("tensors", safetensors_of(*case))


@fuzz(st.tuples(numbers, damages), 60)
def test_idx_inside_of_gzip(case: tuple[int, list[Damage]]) -> None:
    """Damage that no checksum shows."""
    plain = whole("idx")[1]
    read_damaged("idx", gzip.compress(damaged(plain, case[1]), 1, mtime=0))


@fuzz(st.tuples(numbers, damages), 60)
def test_pickles_inside_of_zip(case: tuple[int, list[Damage]]) -> None:
    """The same: the archive's checksums are those of the damaged parts."""
    import io
    import zipfile

    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(some_tensors()))) as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, damaged(part, case[1]) if name.endswith("data.pkl") else part)
    read_damaged("tensors", content.getvalue())


def test_a_small_file_that_unpacks_to_gigabytes() -> None:
    zeros = gzip.compress(bytes(2**20), 9, mtime=0)
    header = gzip.compress(struct.pack(">4I", 2051, 3, 28, 28), 9, mtime=0)
    read_damaged("idx", header + zeros * 2048)  # gzip joins what is joined


names = st.text(st.sampled_from("ab.é\n\udcff 1"), min_size=1, max_size=4).filter(
    lambda n: n not in (".", "..")
)
things = st.tuples(
    st.sampled_from(["a", "b"]),
    names,
    st.sampled_from(["png", "folder", "link", "pipe", "up", "dead", "txt"]),
)


@fuzz(st.lists(things, max_size=8), 60)
def test_any_folder(case: list[tuple[str, str, str]]) -> None:
    """Names that are no text, links that go round, pipes: images once each, or one error that names the folder."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "data"
        for folder in ("a", "b"):
            (root / folder).mkdir(parents=True)
        for folder, own, kind in case:
            path = root / folder / (own + ".png" if kind not in ("folder", "txt") else own)
            if os.path.lexists(path):
                continue
            if kind == "folder":
                (path / "deep").mkdir(parents=True)
                (path / "deep" / "x.png").write_bytes(b"x")
            elif kind == "pipe":
                os.mkfifo(path)
            elif kind in ("link", "up", "dead"):
                path.symlink_to({"link": root / "b", "up": root, "dead": root / "none"}[kind])
            else:
                path.write_bytes(b"x")
        try:
            found, left_out = images_by_class(root)
        except (ValueError, OSError) as error:
            assert str(root) in str(error)
            return
        every = Counter(os.path.realpath(path) for paths in found.values() for path in paths)
        assert sorted(found) == ["a", "b"] and all(os.path.isfile(path) for path in every)
        assert isinstance(left_out, Counter)
