"""Front: choosing a point within limits, and reading run folders that are not as they should be."""

from __future__ import annotations

import io
import json
import sys
import types
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_baqe.errors import ConfigError, DataError, InfeasibleError
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.runs.front import (
    Front,
    FrontPoint,
    bits_summary,
)
from lightning_baqe.runs.summary import Summary


def point(name: str, accuracy: float, latency_us: float, size_bytes: int) -> FrontPoint:
    return FrontPoint(name, {"fc": (8, 8)}, accuracy, None, latency_us, size_bytes, Path("artifacts") / name)


@pytest.fixture
def front() -> Front:
    points = (
        point("trial_1", 0.80, 100.0, 3000),
        point("trial_2", 0.90, 200.0, 1000),
        point("trial_3", 0.95, 400.0, 2000),
    )
    return Front(Path("run"), points, float_latency_us=800.0)


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({}, "trial_3"),
        ({"latency_us": 400}, "trial_3"),
        ({"latency_us": 399.9}, "trial_2"),
        ({"size_bytes": 1000}, "trial_2"),
        ({"accuracy": 0.95}, "trial_3"),
        ({"latency_us": 150, "size_bytes": 3000, "accuracy": 0.8}, "trial_1"),
    ],
)
def test_selects_the_most_accurate_within_inclusive_limits(front: Front, limits: dict[str, float], name: str) -> None:
    assert front.select_point(**limits).name == name


@pytest.mark.parametrize(
    ("rivals", "winner"),
    [
        ([("trial_1", 0.9, 200.0, 1), ("trial_2", 0.9, 100.0, 9)], "trial_2"),
        ([("trial_1", 0.9, 100.0, 9), ("trial_2", 0.9, 100.0, 1)], "trial_2"),
        ([("trial_2", 0.9, 100.0, 1), ("trial_1", 0.9, 100.0, 1)], "trial_1"),
    ],
)
def test_ties_go_by_latency_then_size_then_name(rivals: list[tuple[str, float, float, int]], winner: str) -> None:
    assert Front(Path("run"), tuple(point(*rival) for rival in rivals)).select_point().name == winner


def test_selection_agrees_with_a_search_by_hand(sample_run_dir: Path) -> None:
    front = Front.load(sample_run_dir)
    for limit in sorted({point.latency_us for point in front}):
        fits = [point for point in front if point.latency_us <= limit]
        assert front.select_point(latency_us=limit).accuracy == max(point.accuracy for point in fits)


def test_a_limit_out_of_reach_is_named_with_the_best_value_and_the_nearest_point(front: Front) -> None:
    with pytest.raises(InfeasibleError) as caught:
        front.select_point(latency_us=50, accuracy=0.7)
    message = str(caught.value)
    assert "latency_us <= 50 cannot be met by any point: the best is 100 (trial_1)" in message
    assert "accuracy >= 0.7 can be met alone: the best is 0.95 (trial_3)" in message
    assert "jointly" not in message
    assert "Nearest is trial_1: accuracy 0.8, latency 100 us, size 3,000 bytes" in message
    assert "100.0%" in message


def test_limits_that_only_clash_are_told_apart(front: Front) -> None:
    with pytest.raises(InfeasibleError) as caught:
        front.select_point(latency_us=150, accuracy=0.9)
    message = str(caught.value)
    assert "not all of them jointly" in message
    assert "cannot be met by any point" not in message
    assert (
        "latency_us <= 150 can be met alone: the best is 100 (trial_1), with the other limits kept 200 (trial_2)"
        in message
    )
    assert "with the other limits kept 0.8 (trial_1)" in message
    assert "Nearest is trial_1" in message  # 11 % too inaccurate; trial_2 is 33 % too slow


def test_an_empty_front_says_that_nothing_is_complete() -> None:
    with pytest.raises(InfeasibleError, match="no trial has been completed"):
        Front(Path("run"), ()).select_point()


@pytest.mark.parametrize(
    ("limits", "pattern"),
    [
        ({"accuracy": 95}, "accuracy=0.95"),
        ({"accuracy": -0.1}, "from 0 to 1"),
        ({"latency_us": -1}, "above 0"),
        ({"size_bytes": 0}, "above 0"),
        ({"latency_us": float("nan")}, "wanted is a number"),
        ({"latency_us": "fast"}, "'fast'"),
        ({"accuracy": True}, "True"),
    ],
)
def test_limits_that_make_no_sense_are_refused(front: Front, limits: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        front.select_point(**limits)


def test_load_reads_every_pareto_point_fastest_first(sample_run_dir: Path) -> None:
    front = Front.load(str(sample_run_dir))
    assert len(front) == len(Summary.load(sample_run_dir).pareto) == len(list(front))
    assert [p.latency_us for p in front] == sorted(p.latency_us for p in front)
    assert {p.name for p in front} >= {"baseline_w8a8"}
    for loaded in front:
        assert loaded.artifact_path == sample_run_dir / "artifacts" / loaded.name
        assert loaded.artifact_path.is_dir()
        assert all(isinstance(pair, tuple) for pair in loaded.bits.values())
    with pytest.raises(FrozenInstanceError):
        front.points = ()  # type: ignore[misc]
    assert len({*front}) == len(front)


def test_select_loads_the_artifact(sample_run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("lightning_baqe.deploy.artifact")
    module.Artifact = types.SimpleNamespace(load=lambda folder: ("loaded", folder))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning_baqe.deploy.artifact", module)
    front = Front.load(sample_run_dir)
    assert front.select(latency_us=700) == ("loaded", front.select_point(latency_us=700).artifact_path)


def test_a_point_is_a_bit_config_for_other_recipes(sample_run_dir: Path) -> None:
    for of in Front.load(sample_run_dir):
        read = BitConfig.from_json(of.bit_config.to_json())
        assert {name: (bits.weight, bits.activation) for name, bits in read.items()} == dict(of.bits)


def test_a_missing_artifact_is_named(sample_run_dir: Path) -> None:
    front = Front.load(sample_run_dir)
    folder = front.select_point().artifact_path
    folder.rmdir()
    with pytest.raises(DataError, match=f"{folder.name} is not a folder"):
        front.select()


def test_a_folder_without_summary_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"summary\.json does not exist.*run folder.*interrupted"):
        Front.load(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        Front.load(tmp_path / "nowhere")


def test_a_run_that_has_just_begun_is_an_empty_front(tmp_path: Path) -> None:
    summary = {"trials": [{"number": 0, "state": "running"}], "baselines": [], "float": None}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert len(Front.load(tmp_path)) == 0


def test_table_shows_every_point_with_its_speedup(front: Front) -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(front.table())
    text = console.export_text()
    assert all(p.name in text for p in front)
    assert all(figure in text for figure in ("90.00%", "8.00x", "4.00x", "2.00x", "W8 A8", "–"))


def test_bits_in_a_few_letters() -> None:
    bits = {"a": (2, 8), "b": (5, 8), "c": (6, 8)}
    assert bits_summary(bits) == "W4.3 (2-6) A8"
    assert bits_summary(bits, ranges=False) == "W4.3 A8"
    assert bits_summary({}) == "–"
