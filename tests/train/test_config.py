"""`effdense train --config`: files with options, and the one that every run writes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from effdense.train import command, config
from effdense.train.settings import RECIPES, RunConfig
from tests._training import load, train, write_data

pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
NEEDED = 'model = "densenet_bc_10_4"\ndata = "fashion-mnist"\n'


def settings(*words: str) -> RunConfig:
    parser = argparse.ArgumentParser(prog="effdense train")
    command.add_arguments(parser)
    return command.read_settings(parser.parse_args(command.with_config(["train", *words])[1:]))


def write(folder: Path, text: str) -> str:
    (folder / "run.toml").write_text(NEEDED + text)
    return str(folder / "run.toml")


def test_the_command_line_is_on_top(tmp_path: Path) -> None:
    text = 'recipe = "finetune"\nlr = 1e-4\ndrops = [0.5, 0.75]\nresize = "none"\ncompile = true\nchannels_last = true\n'
    text += "class-weights = [1, 2.5]\nsync-bn = false\n"
    file = write(tmp_path, text)
    found = settings("--no-compile", "--config", file, "--out", "x", "--epochs", "3", "--seed=7")
    assert (found.model, found.recipe_name, found.recipe.epochs, found.seed) == (
        "densenet_bc_10_4",
        "finetune",
        3,
        7,
    )
    assert (found.recipe.lr, found.recipe.drops, found.recipe.resize) == (1e-4, (0.5, 0.75), None)
    assert (
        found.recipe.class_weights == (1.0, 2.5) and found.recipe.ema_decay == RECIPES["finetune"].ema_decay
    )
    assert (found.compile, found.channels_last, found.sync_bn) == (False, True, False)
    assert settings("--config", file, "--out", "x").compile


@pytest.mark.parametrize(
    "text, message",
    [
        ("epoch = 3", "there is no option 'epoch', did you mean 'epochs'?"),
        ("label_smothing = 0.1", "there is no option 'label_smothing', did you mean 'label-smoothing'?"),
        ("resume = true", "there is no option 'resume'"),
        ("compile = 1", "compile must be true or false, got 1"),
        ("lr = true", "lr must be a number, a text or a list of numbers, got True"),
        ("[recipe]\nlr = 1", "recipe must be a number, a text or a list of numbers, got {'lr': 1}"),
        ("epochs = 0", "argument --epochs: a whole number of 1 or more was expected, got '0'"),
        ("ema-decay = 1.0", "a number of 0 or more and below 1 was expected, got '1.0'"),
        ("lr = ", "it is no TOML: Invalid value"),
        ("lr = 1\nlr = 2", "it is no TOML: "),
        ("val_split = 0.1\nval-split = 0.2", "'val_split' and 'val-split' are the same option"),
        ("lr = '1_000'", "argument --lr: a number of 0 or more was expected, got '1_000'"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        settings("--config", write(tmp_path, text), "--out", "x")
    assert message in capsys.readouterr().err


def test_other_forms(tmp_path: Path, capsys: Any) -> None:
    for name, content, message in (
        ("x.yaml", b"lr: 1\n", "it is no TOML, whose lines are as in model = "),
        ("x.toml", b"# \xe9\n", "TOML is in UTF-8, and byte 2 is not"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match="2"):
            settings("--config", str(tmp_path / name), "--out", "x")
        assert message in capsys.readouterr().err


def test_no_file(capsys: Any) -> None:
    for words, message in (
        (("/nowhere.toml",), "/nowhere.toml: No such file"),
        ((), "expected one argument"),
    ):
        with pytest.raises(SystemExit, match="2"):
            settings("--model", "x", "--data", "cifar10", "--out", "x", "--config", *words)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_runs_settings_are_a_config(recipe: str, tmp_path: Path) -> None:
    options = (
        "--model",
        "densenet_bc_10_4",
        "--data",
        "folder",
        "--data-root",
        'a "b\\c"\té',
        "--channels",
        "1",
    )
    run = settings(
        *options, "--recipe", recipe, "--out", "x", "--class-weights", "1,2.5", "--seed", "3", "--sync-bn"
    )
    config.write(tmp_path, run)
    again = settings("--config", str(tmp_path / config.FILE), "--out", "y")
    assert dataclasses.replace(again, out=run.out, epochs_given=False) == run


def test_the_run_again(tmp_path: Path) -> None:
    root = write_data(tmp_path)
    assert train(root, tmp_path / "run", "--limit-train", "24", "--epochs", "1") == 0
    from effdense import cli

    assert (
        cli.main(["train", "--config", str(tmp_path / "run" / config.FILE), "--out", str(tmp_path / "again")])
        == 0
    )
    assert load(tmp_path / "again")["settings"] == load(tmp_path / "run")["settings"]
