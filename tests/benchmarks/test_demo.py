"""The demonstration: benchmarks.demo."""

from __future__ import annotations

import pytest

from benchmarks import demo

pytestmark = pytest.mark.tools


def test_demo(tmp_path, monkeypatch, capsys):
    small = {"TRAINED": "densenet_bc_10_4", "STEPS": 3, "BATCH": 4, "REPEATS": 1}
    for name, value in {**small, "MEASURED": "densenet_bc_22_4", "MEASURED_BATCH": 2}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    picture = tmp_path / "new" / "demo.png"
    assert demo.main(["--picture", str(picture)]) == 0, capsys.readouterr().out
    shown = capsys.readouterr().out
    assert shown.count("agrees (at most 1e-09)") == 2
    assert "effdense-minimal" in shown and str(picture) in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_notices_a_difference():
    assert demo.largest_difference([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert not demo.largest_difference([1.0], [float("nan")]) <= demo.FLOAT64_TOLERANCE
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--picture"])


def test_demo_names_missing_data(capsys):
    assert demo.main(["--data-root", "/nowhere"]) == 2
    assert "no Fashion-MNIST in /nowhere" in capsys.readouterr().err
