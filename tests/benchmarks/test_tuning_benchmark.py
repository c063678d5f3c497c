"""The benchmark of tuning: what it keeps, what it sums up, and one small run from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_device import Refusing
from small_graphs import Maker

from lightning_baqe.benchmarks import tuning
from lightning_baqe.benchmarks.tuning import Setup, strategies_of, summarize, total
from lightning_baqe.errors import ConfigError, MeasurementError
from lightning_baqe.integer.graph import IntegerGraph


def test_a_folder_of_another_setup(tmp_path: Path) -> None:
    command = ["--folder", str(tmp_path / "deep" / "folder"), "--model", "no_such_network"]
    for _ in range(2):
        with pytest.raises(ConfigError, match="no_such_network"):
            tuning.main(command)
    with pytest.raises(ConfigError, match="bits: 8 there, 4 here"):
        tuning.main([*command, "--bits", "4"])


def figure(latency_us: float | None) -> dict[str, Any]:
    return {"knobs": {"tile": "1x1x1"}, "latency_us": latency_us, "error": None if latency_us else "crashed"}


def row(layers: list[str], default: float | None, a: float, b: float, at_random: list[float | None]) -> dict[str, Any]:
    winners = {"a": figure(a), "b": figure(b)}
    return {"layers": layers, "macs": 1000, "default": figure(default), "winners": winners,
            "random": [figure(latency) for latency in at_random]}  # fmt: skip


def test_summary() -> None:
    rows = summarize([row(["x", "y"], 10.0, 8.0, 9.0, [30.0, None, 12.0, 20.0]), row(["z"], 5.0, 5.0, 4.0, [None])])
    assert (rows[0]["random_us"], rows[0]["random_median_us"], rows[0]["random_failed"]) == ([12.0, 20.0, 30.0], 20, 1)
    assert rows[1]["random_median_us"] is None
    assert (total(rows, "default_us"), total(rows, "tuned_us", "a"), total(rows, "random_median_us")) == (25, 21, 40)
    runs = [{"strategy": "a", "seconds": 2.0}, {"strategy": "b", "seconds": 3.0}, {"strategy": "a", "seconds": 1.5}]
    first, second = strategies_of(rows, runs)
    assert (first["winners_us"], first["ratio"], first["best_on"], first["seconds"]) == (21.0, 25 / 21, 1, 3.5)
    assert (second["winners_us"], second["best_on"], second["seconds"]) == (22.0, 1, 3.0)
    with pytest.raises(MeasurementError, match="kernel of x failed"):
        summarize([row(["x"], None, 1.0, 1.0, [])])


@pytest.fixture(scope="module")
def graph() -> IntegerGraph:
    maker = Maker(16, 8)
    maker.conv(maker.conv(out=32, padding=1, name="a"), out=16, kernel=1, limits=None, name="b")
    maker.requantize("b", (-128, 127))
    return maker.graph()


def test_from_end_to_end_and_again(
    graph: IntegerGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Setup, "graph", lambda self, model=None: graph)
    command = ["--candidates", "2", "--random", "2", "--rounds", "2", "--folder", str(tmp_path / "folder")]
    command += ["--strategies", "ranked", "random", "--rebuild", ""]
    tuning.main(command)
    output = capsys.readouterr().out
    assert "second run of ranked: 0 measurements" in output
    assert "'default': True, 'tuned': True" in output
    first = json.loads((tmp_path / "folder" / "tuning.json").read_text())
    assert sorted(layer for kernel in first["kernels"] for layer in kernel["layers"]) == ["a", "b"]
    assert [len(kernel["random_us"]) for kernel in first["kernels"]] == [2, 2]
    assert first["table_x"]["rounds"] == 2
    assert {entry["strategy"] for entry in first["strategies"]} == {"ranked", "random"}

    tuning.main(command, Refusing(tmp_path / "none.db"))
    second = json.loads((tmp_path / "folder" / "tuning.json").read_text())
    assert (second["kernels"], second["table_x"]) == (first["kernels"], first["table_x"])


def test_wrong_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tuning.main(["--rounds", "0"])
    assert "--rounds is at least 1" in capsys.readouterr().err
