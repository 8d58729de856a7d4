"""The sweep over depths: its rows, and the search for the deepest network within a budget."""

from __future__ import annotations

import json

import pytest

from benchmarks import compare, depth_sweep, measure, plots
from benchmarks.depth_sweep import STEP, largest_within
from benchmarks.worker import WorkerConfig, WorkerError
from tests.benchmarks.test_compare import CONTRACT

pytestmark = pytest.mark.tools

GIB = 2**30
TINY = ("--growth", "4", "--batch", "2", "--image-size", "8", "--threads", "1", "--repeats", "1")
CURVES = {  # bytes over depth
    "quadratic": lambda depth: 200_000 * depth**2 + 10**7,
    "linear": lambda depth: 10**7 * depth,
    "cubic": lambda depth: 3000 * depth**3,
    "steps": lambda depth: 10**8 * (depth // 20),
}


def point(peak_bytes):
    return {"peak_bytes": peak_bytes, "peak_rss_bytes": peak_bytes + 3 * 10**8}


def search(curve, depths=(34, 64, 94), budget_bytes=2 * GIB, free_bytes=1000 * GIB, failing=10**9):
    """What is found, and which depths were counted for it."""
    asked = []

    def count(depth):
        asked.append(depth)
        if depth >= failing:
            raise WorkerError("killed by SIGKILL during warm_up, probably out of memory")
        return point(curve(depth))

    points = {depth: point(curve(depth)) for depth in depths}
    return largest_within(budget_bytes, points, count, lambda: free_bytes), asked


# --- the search


@pytest.mark.parametrize("depths", [(10,), (10, 16), (34, 64, 94), (10, 196, 394)])
@pytest.mark.parametrize("name", CURVES)
def test_the_deepest_and_the_next_are_counted(name, depths):
    curve = CURVES[name]
    found, asked = search(curve, depths)
    fits, over = found["depth"], found["next_depth"]
    assert over == fits + STEP and fits % STEP == 4 and found["stopped"] is None
    assert found["peak_bytes"] == curve(fits) <= 2 * GIB < curve(over) == found["next_peak_bytes"]
    assert {fits, over} <= {*asked, *depths}
    assert [counted["depth"] for counted in found["counted"]] == sorted(set(asked))
    assert len(asked) == len(set(asked)) <= (25 if name == "steps" else 8)


def test_a_good_fit_needs_two_counts():
    found, asked = search(CURVES["quadratic"])
    assert asked == [found["depth"], found["next_depth"]] == [100, 106]


def test_nothing_fits():
    found, asked = search(CURVES["linear"], budget_bytes=10**6)
    assert found["depth"] is None and found["peak_bytes"] is None and found["stopped"] is None
    assert found["next_depth"] == 10 and asked == [10]


def test_nothing_measured():
    found, asked = search(CURVES["linear"], depths=())
    assert found["depth"] is None and found["next_depth"] is None and not asked
    assert found["stopped"] == "no depth was measured"


def test_the_machines_memory_ends_the_search():
    found, asked = search(CURVES["linear"], budget_bytes=100 * GIB, free_bytes=4 * GIB)
    needed = CURVES["linear"](found["depth"] + STEP) + 3 * 10**8
    assert needed > depth_sweep.ROOM * 4 * GIB > needed - 2 * 10**7 * STEP
    assert all(CURVES["linear"](depth) < 4 * GIB for depth in asked)
    assert found["next_depth"] is None
    assert f"depth {found['depth'] + STEP} would need" in found["stopped"]


def test_a_failing_count_ends_the_search():
    found, asked = search(CURVES["linear"], failing=150)
    assert asked[-1] >= 150 and found["depth"] == max([94, *asked[:-1]]) and found["next_depth"] is None
    assert found["stopped"] == f"depth {asked[-1]}: killed by SIGKILL during warm_up, probably out of memory"


def test_available_bytes():
    assert 2**20 < measure.available_bytes() < 2**50


# --- the sweep


def test_sweep_end_to_end(tmp_path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    budget = 110 * 1024  # between depth 10 and depth 16
    arguments = [*TINY, "--depths", "16,10", "--impl", "naive,checkpoint", "--budget", "110KiB"]
    status = depth_sweep.main([*arguments, "--json", str(out), "--plot", str(picture)])
    result = json.loads(out.read_text())
    shown = " ".join(capsys.readouterr().out.split())
    assert status == 0, shown
    places = [(row["depth"], row["impl"]) for row in result["rows"]]
    assert places == [(depth, impl) for depth in (10, 16) for impl in ("naive", "checkpoint")]
    for row in result["rows"]:
        assert row.keys() >= CONTRACT and row["model"] == f"densenet_bc_{row['depth']}_4"
        assert row["parameters"] == {10: 2666, 16: 5466}[row["depth"]]
        assert row["peak_bytes"] > 0 and row["median_ms"] > 0
    assert "torch" in result["environment"] and result["budget"]["bytes"] == budget
    for row in result["budget"]["rows"]:
        assert row["stopped"] is None and row["next_depth"] == row["depth"] + STEP
        assert row["peak_bytes"] <= budget < row["next_peak_bytes"]
        assert row["state_bytes"] == 12 * row["parameters"] > 0
    assert "DenseNet-BC, growth 4, training step, batch 2, 8x8, float32" in shown
    assert "Deepest within 110 KiB" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")

    naive = result["rows"][0]
    settings = WorkerConfig(naive["model"], 2, 8, threads=1)
    assert depth_sweep.counted_step("naive", settings)["peak_bytes"] == naive["peak_bytes"]


def test_sweep_measures_compiled_effdense():
    settings = WorkerConfig("", 2, 8, threads=1)
    (row,) = depth_sweep.run(settings, 4, [10], ["effdense-minimal"], repeats=1)["rows"]
    assert "error" not in row, row["error"]
    assert row["compiled"] is True and row["depth"] == 10 and row["parameters"] == 2666


def test_a_failing_depth_is_shown_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    measured = {"peak_bytes": 3 * 2**20, "peak_rss_bytes": 2**29, "label": "plain twin", "compiled": False}
    times = {"median_ms": 5.0, "p20_ms": 4.0, "p80_ms": 6.0}

    def run(settings, impls, repeats, on_progress):
        rows = [{"impl": impl, **measured, **times} for impl in impls]
        if settings.model == "densenet_bc_16_4":
            rows[0] = {**dict.fromkeys(rows[0]), "impl": impls[0], "error": "killed [out of memory]"}
        return {
            "environment": dict(cpu="", cpu_capability="", threads=1, torch="", load_average=0),
            "rows": rows,
        }

    monkeypatch.setattr(compare, "run", run)
    arguments = [*TINY, "--depths", "10,16,22", "--impl", "naive,checkpoint"]
    assert depth_sweep.main([*arguments, "--plot", str(tmp_path / "out.png")]) == 1
    shown = capsys.readouterr().out
    assert "depth 16, naive, failed: killed [out of memory]" in shown
    assert [line.count("3.0") for line in shown.splitlines() if line.startswith("│")] == [2, 1, 2]


def test_plot_shows_failed_depths(tmp_path):
    times = {"median_ms": 3000.0, "p20_ms": 2900.0, "p80_ms": 3300.0}
    rows = [{"impl": "naive", "depth": 10, "peak_bytes": 2**20, **times}]
    for depth, impl in ((16, "naive"), (10, "compile"), (16, "compile")):
        rows.append({"impl": impl, "depth": depth, "peak_bytes": None, **dict.fromkeys(times), "error": "no"})
    plots.depth_sweep(rows, "title", tmp_path / "some.png", 2**19)
    plots.depth_sweep(rows[1:], "title", tmp_path / "none.png")
    assert all((tmp_path / name).stat().st_size > 0 for name in ("some.png", "none.png"))


def test_labels_are_spread():
    assert plots._spread({"a": 5.0, "b": 4.5, "c": 9.0, "d": 4.6}, 1.0) == {
        "b": 4.5,
        "d": 5.5,
        "a": 6.5,
        "c": 9.0,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "34,65"], "the nearest depth is 64"),
        (["--depths", "34,x"], "must be whole numbers with commas between them, got '34,x'"),
        (["--depths", ","], "must be whole numbers"),
        (["--impl", "naiv"], "did you mean 'naive'"),
        (["--impl", ","], "names no implementation"),
        (["--json", "/nowhere/out.json"], "cannot write a file at '/nowhere/out.json'"),
        (
            ["--budget", "2XB"],
            "a size from 1 byte to 1024 TiB was expected, such as 8GiB, 512MiB or 8e9, got '2XB'",
        ),
        (["--budget", "0GiB"], "a size from 1 byte"),
        (["--growth", "0"], "must be a whole number of 1 or more"),
    ],
)
def test_sweep_refuses_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        depth_sweep.main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]
