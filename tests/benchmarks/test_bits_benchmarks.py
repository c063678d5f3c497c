"""The benchmarks of bit allocation in their smallest forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_data import small_elpv
from torch import nn

from lightning_baqe.benchmarks import landscape_accuracy
from lightning_baqe.benchmarks.accuracy_rows import SMALLEST
from lightning_baqe.benchmarks.bits import comparison, priors, sizes, solver, traces


def test_the_solver(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "MOST_S", dict.fromkeys(solver.MOST_S, 60.0))  # a busy machine is no error here
    assert solver.main(["--instances", "10", "--seeds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "10 random problems" in shown
    assert " 0 wrong" in shown
    monkeypatch.setattr(solver, "smallest", lambda problem: -1e9)
    assert solver.main(["--instances", "3", "--seeds", "1"]) == 1


def test_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert sizes.main(["--side", "32"]) == 0
    assert "tf_efficientnet_lite0" in capsys.readouterr().out
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    found = sizes.sizes_of(net, 8)
    assert found == sizes.Sizes(108 + 288, 192 + 144, 192 + 144, 192, 8)
    assert found.megabytes == pytest.approx(2 * (396 + 144 + 8) / 1e6)


def test_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--folder", str(tmp_path), "--images", "2", "--samples", "4", "--smallest", "--threads", "1"]
    assert traces.main(small) == 1  # four probes do not tell
    shown = capsys.readouterr().out
    assert "2 images, 4 probes" in shown
    assert "layer4.1.conv2" in shown
    assert "not known to 5%" in shown
    assert "ModelOpt's scores" in shown


def test_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small_elpv(tmp_path / "elpv", 64)
    settings = comparison.SETTINGS["elpv"]["tf_efficientnet_lite0"]
    narrow = replace(settings, model={"library": "timm"}, images={"image_size": 32}, batch_size=4)
    monkeypatch.setitem(comparison.SETTINGS, "elpv", {"mobilenetv2_035": narrow})
    methods = {name: comparison.METHODS[name] for name in ("output fisher", "divergence")}
    monkeypatch.setattr(comparison, "METHODS", methods)
    monkeypatch.setattr(comparison, "MEANS", (4,))
    arguments = ["--data", "elpv", "--root", str(tmp_path / "elpv"), "--seeds", "0", "--folder", str(tmp_path / "out")]
    assert comparison.main([*arguments, "--smallest"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "bits.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 2 + 1
    for row in rows[:-1]:
        assert 0 <= row["accuracy"] <= 1
        uniform = next(r for r in rows if (r["method"], r.get("mean")) == ("uniform", row["mean"]))
        assert row["size_bytes"] <= uniform["size_bytes"] + 300  # of requantizations
    assert rows[-1]["taus"].keys() == methods.keys()
    shown = capsys.readouterr().out
    assert "Kendall" in shown
    assert comparison.main([*arguments, "--smallest"]) == 0  # nothing is done again
    assert len((tmp_path / "out" / "bits.jsonl").read_text().splitlines()) == len(rows)


def test_priors(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = landscape_accuracy.SETTINGS["glyphs"]["resnet18"].with_epochs(1, 1)
    monkeypatch.setitem(landscape_accuracy.SETTINGS["glyphs"], "resnet18", settings)
    monkeypatch.setattr(priors, "PRIORS", {name: priors.PRIORS[name] for name in ("divergence", "fisher")})
    trial = landscape_accuracy.Trial(2, 8, 16, 16, 16, calibration_batches=1, float_sizes=SMALLEST)
    small = ["--networks", "resnet18", "--seeds", "2", "--trials", "4", "--initial", "2", "--jobs", "1"]
    small += ["--population", "4", "--generations", "1", "--folder", str(tmp_path)]
    assert priors.main(small, trial) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(row["sampler"], row["seed"]) for row in rows] == [
        (name, seed) for seed in (0, 1) for name in ("divergence", "fisher", "none")
    ]
    assert {len(row["values"]) for row in rows} == {4}
    told = {prior: json.loads((tmp_path / f"resnet18-{prior}.json").read_text()) for prior in priors.PRIORS}
    assert told["divergence"]["content"] != told["fisher"]["content"]
    assert "2 + 2 trials, 2 seeds" in capsys.readouterr().out
    assert priors.main(small, trial) == 0  # nothing is done again
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(rows)
