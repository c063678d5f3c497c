"""The benchmark of training steps in its smallest form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import small_fashion_mnist

from lightning_baqe.benchmarks.quantizers import __main__ as quantizers
from lightning_baqe.benchmarks.quantizers import gradients, mixed, schedules
from lightning_baqe.benchmarks.quantizers.candidates import CANDIDATES, Trainee, available
from lightning_baqe.benchmarks.quantizers.learning import Length

FEW = replace(gradients.SETTINGS, images={"image_size": 28, "val_size": 40})
SMALL = ["--batch", "2", "--side", "32", "--rounds", "3", "--threads", "1"]


def test_a_comparison(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    generous = tuple((name, reference, 1000.0) for name, reference, _ in quantizers.LIMITS)
    monkeypatch.setattr(quantizers, "LIMITS", generous)  # a busy machine is no error here
    monkeypatch.setattr(quantizers, "MEMORY_LIMIT", 1000.0)
    threads = torch.get_num_threads()
    assert quantizers.main([*SMALL, "--candidates", "float", "ours"]) == 0
    shown = capsys.readouterr().out
    assert "1 threads: step of 2 images of 32x32" in shown
    assert "all limits are kept" in shown
    monkeypatch.setattr(quantizers, "MEMORY_LIMIT", 1e-6)
    assert quantizers.main([*SMALL, "--candidates", "float", "ours"]) == 1
    assert "of float's memory, 1e-06 allowed" in capsys.readouterr().out
    torch.set_num_threads(threads)


def test_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small_fashion_mnist(tmp_path / "data", 300, 20)
    monkeypatch.setattr(gradients, "SETTINGS", FEW)
    monkeypatch.setattr(gradients, "MIXES", (("ste", "ste"), ("ewgs", "invtanh")))
    small = ["--seeds", "0", "1", "--float-epochs", "1", "--steps", "1", "--root", str(tmp_path / "data")]
    assert gradients.main([*small, "--folder", str(tmp_path)]) == 0
    assert "ewgs / invtanh" in capsys.readouterr().out
    assert (tmp_path / "gradients.png").stat().st_size > 5000
    rows = (tmp_path / "gradients.jsonl").read_text()
    assert gradients.main([*small, "--folder", str(tmp_path)]) == 0  # nothing is trained again
    assert "seed 0, ste / ste" not in capsys.readouterr().out
    assert (tmp_path / "gradients.jsonl").read_text() == rows


def test_schedules(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small_fashion_mnist(tmp_path / "data", 900, 20)
    monkeypatch.setattr(schedules, "SETTINGS", FEW)
    for name in ("LENGTH", "SEARCH_LENGTH"):
        monkeypatch.setattr(schedules, name, Length(2, 1, 1, 1))
    small = [
        "--seeds",
        "0",
        "--means",
        "2.5",
        "--float-epochs",
        "1",
        "--steps",
        "5",
        "--trials",
        "2",
        "--root",
        str(tmp_path / "data"),
    ]
    assert schedules.main([*small, "--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "black box" in shown
    assert "15 steps each, 1 seeds; 2 trials" in shown
    rows = (tmp_path / "schedules.jsonl").read_text()
    assert len(rows.splitlines()) == 2 + 3
    assert all(max(json.loads(row)["sizes"]) <= 1 for row in rows.splitlines())
    assert schedules.main([*small, "--folder", str(tmp_path)]) == 0  # nothing is trained again, the search is the same
    assert (tmp_path / "schedules.jsonl").read_text() == rows


def test_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small_fashion_mnist(tmp_path / "data", 300, 20)
    monkeypatch.setitem(mixed.NETWORKS, "fashion_mnist", {"resnet8": FEW})  # type: ignore[misc]
    monkeypatch.setattr(mixed, "LENGTH", Length(2, 1, 1, 1))
    small = ["--smallest", "--seeds", "0", "--means", "2.5", "--steps", "2", "--root", str(tmp_path / "data")]
    assert mixed.main([*small, "--folder", str(tmp_path)]) == 0
    assert "learned less homogeneous" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "mixed.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == list(mixed.METHODS)
    assert max(size for row in rows for size in row["sizes"]) <= 2.5 + 1e-6
    assert set(map(tuple, rows[1]["bits"].values())) == {(3, 3), (2, 2)}
    assert min(rows[2]["sizes"]) > 2.3  # the Hessian's spends what it has
    assert mixed.main([*small, "--folder", str(tmp_path)]) == 0  # nothing is trained again
    assert len((tmp_path / "mixed.jsonl").read_text().splitlines()) == 3


def test_verdicts_are_those_of_paired_differences() -> None:
    def rows(shift: float) -> list[dict[str, Any]]:
        values = {("ste", "ste"): 0.0, ("ewgs", "ewgs"): shift, ("tanh", "tanh"): -shift}
        return [
            {"mix": list(mix), "seed": seed, "accuracy": 0.8 + 0.05 * seed + value + 0.001 * (seed if value else 0)}
            for mix, value in values.items()
            for seed in range(4)
        ]

    assert gradients.verdict(rows(0.01)).endswith("better ewgs / ewgs; worse tanh / tanh")
    assert gradients.verdict(rows(0.0)).endswith("better none; worse none")
    assert gradients.differences(rows(0.01), ("tanh", "tanh")) == pytest.approx([-1.0, -0.9, -0.8, -0.7])


def test_ratios_are_those_of_the_same_round() -> None:
    times = {"a": [2.0, 40.0, 6.0], "b": [1.0, 10.0, 2.0]}
    assert quantizers.ratio_of(times, "a", "b")[1] == 3.0
    assert quantizers.ratio_of({"a": [3.0], "b": [2.0]}, "a", "b") == (1.5, 1.5, 1.5)


@pytest.mark.filterwarnings("ignore")  # other projects' own
@pytest.mark.parametrize("name", [name for name in available() if not CANDIDATES[name][1]])
def test_candidates_train(name: str) -> None:
    trainee = Trainee(name, 4, 32, torch.device("cpu"), channels_last=False)
    losses = [trainee.step() for _ in range(8)]
    assert losses[-1] < losses[0]
