"""The pages: their Python runs and prints what they show, their commands parse, their links lead somewhere.

A page's python blocks run in order in one namespace. A `text` block behind one is what it prints. What a block needs beyond torch
stands behind its language (```python needs=monai); where that is missing, the page is reported as skipped, after everything else on it has run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import socket
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed.run import get_args_parser

from effdense import cli, models

ROOT = Path(__file__).parents[2]
PAGES = [f"{page.relative_to(ROOT)}" for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))]
# What takes long as it is shown, and what runs instead. A block that is changed prints something else, too.
SMALLER = {
    "README.md": {"torchvision.models.densenet121()": "torchvision.models.DenseNet(8, (2, 2), 8)"},
    "docs/distributed.md": {
        "effdense.models.densenet121(num_classes=10).to": "effdense.models.DenseNet(8, (2, 2), 8, num_classes=10).to",
        "(8, 3, 224, 224": "(2, 3, 32, 32",
        "(8,)": "(2,)",
        "range(10)": "range(1)",
    },
    "docs/fit.md": {"torchvision.models.densenet121()": "torchvision.models.DenseNet(8, (2, 2), 8)"},
    "docs/lightning.md": {"(64, 3, 32, 32)": "(2, 3, 32, 32)", "(64,)": "(2,)"},
    "docs/loops.md": {
        '"densenet121", num_classes=10, drop_rate=0.1': '"densenet121", num_classes=10, drop_rate=0.1, block_config=(2, 2)',
        "(64, 3, 224, 224)": "(4, 3, 32, 32)",
        "(64,)": "(4,)",
        "split(16)": "split(2)",
        "(64, 3, 32, 32)": "(4, 3, 32, 32)",
        "batch_size=16)": "batch_size=2)",
        "--model.depth 22": "--model.depth 10",
        "densenet_cifar(22, 12)": "densenet_cifar(10, 12)",
        '"out_channels": 2}': '"out_channels": 2, "block_config": [1, 1]}',
        "(1, 64, 64, 64)": "(1, 16, 16, 16)",
    },
    "docs/models.md": {"torchvision.models.densenet121()": "torchvision.models.DenseNet(8, (2, 2), 8)"},
    "docs/medical.md": {
        "num_classes=2)  # DenseNet-121's blocks": "num_classes=2, block_config=(1, 1))",
        'num_classes=2, memory="minimal")': 'num_classes=2, block_config=(2, 2), memory="minimal")',
        "(2, 1, 96, 96, 96)": "(2, 1, 16, 16, 16)",
        "(1, 1, 64, 64, 64)": "(1, 1, 32, 32, 32)",
    },
    "docs/train.md": {
        "pretrained=True": "pretrained=False",
        "range(300)": "range(1)",
        "(256, 3, 32, 32)": "(8, 3, 32, 32)",
        "(256,)": "(8,)",
    },
}
LANGUAGES = {"python", "sh", "text", "cpp", "toml"}


def a_run(root: str, classes: dict[str, str], out: str) -> None:
    """A small run on a folder of images of one colour a class."""
    image = importlib.import_module("PIL.Image")
    for split in ("train", "val"):
        for name, color in classes.items():
            Path(root, split, name).mkdir(parents=True)
            for i in range(2):
                image.new("RGB", (24, 20 + i), color).save(Path(root, split, name, f"{i}.png"))
    command = "train --model densenet_bc_10_4 --data folder --recipe imagenet --resize 16 --device cpu --epochs 1 --batch-size 4"
    assert cli.main([*command.split(), "--data-root", root, "--out", out]) == 0


def flowers() -> None:
    """What docs/train.md has by the time that it uses a run: a small one, and two images."""
    image, colors = importlib.import_module("PIL.Image"), {"rose": "red", "tulip": "yellow"}
    a_run("flowers", colors, "runs/flowers")
    for name, color in colors.items():
        image.new("RGB", (30, 40), color).save(f"{name}.jpg")


def scans() -> None:
    """What docs/use.md begins with: a run on two classes, and two images of which nobody has said what they are."""
    image, colors = importlib.import_module("PIL.Image"), {"healthy": "black", "sick": "white"}
    a_run("xray", colors, "runs/xray")
    Path("ward7").mkdir()
    for i, color in enumerate(colors.values()):
        image.new("L", (30, 40), color).save(f"ward7/scan{i + 1}.png")


# What a page takes for granted, by what a block with it needs.
BEFORE = {"docs/train.md": ("PIL", flowers), "docs/use.md": ("PIL", scans)}


class Block(NamedTuple):
    """What stands between two fences."""

    page: str
    line: int  # of its first line, from 1
    language: str
    needs: tuple[str, ...]
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str | None = None) -> list[Block]:
    text = (ROOT / page).read_text() if text is None else text
    found = []
    for fence in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", text, re.MULTILINE):
        language, *others = fence[2].split() or [""]
        needs = [word.removeprefix("needs=") for word in others]
        line = text.count("\n", 0, fence.start()) + 2
        found.append(Block(page, line, language, tuple(needs), textwrap.dedent(fence[3])))
    return found


def available(need: str) -> bool:
    return torch.cuda.is_available() if need == "gpu" else importlib.util.find_spec(need) is not None


def run_page(page: str, found: Sequence[Block]) -> list[str]:
    """Runs what can run; returns what was left out, and why."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    unused, left_out = set(SMALLER.get(page, {})), []
    printed: str | None = None  # by the block before, where it ran as it is shown
    for block in found:
        if block.language == "text" and printed is not None:
            assert printed == block.text, f"{block.where}: this was printed:\n{printed}"
        printed = None
        if block.language != "python":
            continue
        code = block.text
        for shown, instead in SMALLER.get(page, {}).items():
            if shown in code:
                code = code.replace(shown, instead)
                unused.discard(shown)
        if missing := [need for need in block.needs if not available(need)]:
            left_out.append(f"{block.where} needs {', '.join(missing)}")
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * (block.line - 1) + code, page, "exec"), namespace)
        printed = output.getvalue() if code == block.text else None
    assert not unused, f"SMALLER[{page!r}] has what the page has not: {unused}"
    return left_out


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, and as torchrun would start the one process of a group."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**group, "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))]
)
@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_python(page: str) -> None:
    need, prepare = BEFORE.get(page, ("", None))
    if prepare is not None and available(need):
        prepare()
    if left_out := run_page(page, blocks(page)):
        pytest.skip(f"all but {'; '.join(left_out)}")


@pytest.mark.usefixtures("alone")
def test_the_page_about_use_runs_its_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on the run of its beginning, not only their options."""
    pytest.importorskip("sklearn")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    scans()
    shutil.copytree("xray/val", "elsewhere/xray/test")
    ran = [
        cli.main([*words[1:], "--device", "cpu"])
        for block in blocks("docs/use.md")
        if block.language == "sh"
        for words in commands(block)
        if words[1] in ("evaluate", "predict") and words[2] == "runs/xray"
    ]
    assert ran == [0] * 4
    assert all(
        Path(name).stat().st_size for name in ("classes.csv", "all.json", "evaluation.png", "ward7.csv")
    )


class Parsed(Exception):
    """A command line is right; what it says is in `arguments`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments


def commands(block: Block) -> list[list[str]]:
    """Every command of a block, in words, without the variables set in front."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    for words in found:
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
    return [words for words in found if words]


def check_module(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses as `python -m name` does, and looks up the model that is named. A GPU that is not there is no mistake."""
    if not torch.cuda.is_available():
        arguments = ["cpu" if word == "cuda" else word for word in arguments]
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, args: list[str] | None = None, namespace: None = None) -> None:
        raise Parsed(parse(self, args, namespace))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        main = importlib.import_module("effdense.cli" if name == "effdense" else name).main
        with pytest.raises(Parsed) as parsed:
            main(arguments)
    model = getattr(parsed.value.arguments, "model", None)
    if model is not None and ":" not in model:
        with torch.device("meta"):
            models.build(model)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    match words:
        case ["python", "-m", module, *arguments]:
            check_module(module, arguments, monkeypatch)
        case ["effdense", *arguments]:
            check_module("effdense", arguments, monkeypatch)
        case ["torchrun", *arguments]:
            started = get_args_parser().parse_args(arguments)
            if started.module:
                check_module(started.training_script, started.training_script_args, monkeypatch)
        case ["pip", "install", what, *_]:
            extras = re.findall(r"\w+", what.partition("[")[2])
            project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
            known = re.findall(r"^(\w+) = \[", project.partition("\n[")[0], re.MULTILINE)
            assert what.partition("[")[0] == "." and set(extras) <= set(known)
        case ["make", target, *settings]:
            makefile = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{target}:", makefile, re.MULTILINE)
            assert all(re.search(rf"^{s.partition('=')[0]} \?=", makefile, re.MULTILINE) for s in settings)
        case ["mkdir" | "cp", *_]:
            pass
        case ["pytest", "-m", mark]:
            assert f'"markers", "{mark}:' in (ROOT / "tests" / "conftest.py").read_text()
        case _:
            raise AssertionError(f"what is {shlex.join(words)}?")


SHELL = [block for page in PAGES for block in blocks(page) if block.language == "sh"]


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.where)
def test_commands(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the page's files of options, whose first line is their name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    for file in (b.text for b in blocks(block.page) if b.language == "toml"):
        (tmp_path / file.partition("\n")[0].removeprefix("# ")).write_text(file)
    for words in commands(block):
        check_command(words, monkeypatch)


def test_every_block_says_its_language() -> None:
    unknown = [b.where for page in PAGES for b in blocks(page) if b.language not in LANGUAGES]
    assert not unknown


def test_links_lead_somewhere() -> None:
    missing = [
        f"{page}: {link}"
        for page in PAGES
        for link in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
        if "://" not in link and not ((ROOT / page).parent / link).exists()
    ]
    assert not missing


def test_what_is_wrong_on_a_page_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    page = "```python\nprint(1)\n```\n```text\n2\n```\n"
    with pytest.raises(AssertionError, match=r"a page:5: this was printed:\s+1\n"):
        run_page("a page", blocks("a page", page))
    page = "```python needs=no_such_library\n1/0\n```\n- item\n  ```python\n  1/0\n  ```\n"
    with pytest.raises(ZeroDivisionError):
        run_page("a page", blocks("a page", page))
    assert run_page("a page", blocks("a page", page)[:1]) == ["a page:2 needs no_such_library"]
    for wrong in ("effdense pln", "make tea", "pip install '.[tea]'", "python -m effdense summary x"):
        with pytest.raises((AssertionError, SystemExit, ValueError)):
            check_command(shlex.split(wrong), monkeypatch)
