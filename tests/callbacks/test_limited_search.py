"""Searches within limits, in plain Trainers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from lightning_baqe.errors import ConfigError, InfeasibleError
from lightning_baqe.runs.limits import violations
from lightning_baqe.runs.summary import Figures

Make = Callable[..., Any]


def test_limits_are_constraints_and_marks(
    tmp_path: Path,
    foreign: Make,
    search: Make,
    fit: Make,
    digits: Any,
    made_up_device: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limits = {"latency_us": 1e9, "size_bytes": 9000.0, "accuracy": 0.3}
    fit(foreign(), search(measure_on=made_up_device, limits=limits, trials=4), digits)
    shown = capsys.readouterr().err
    assert "What can be reached" in shown
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["limits"] == limits
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}")
    for trial, entry in zip(study.trials, summary["trials"], strict=True):
        assert trial.constraints == pytest.approx(violations(Figures.model_validate(entry), limits))
        assert entry["feasible"] == (entry["size_bytes"] <= 9000 and entry["accuracy"] >= 0.3)
    assert [entry["phase"] for entry in summary["trials"]][-1] == "bo"
    assert "within limits" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(ConfigError, match=r"constrained by limits = .*now they are \{'accuracy': 0.5\}"):
        fit(foreign(), search(measure_on=made_up_device, limits={"accuracy": 0.5}, trials=5), digits)


def test_what_cannot_be_met_ends_it_before_the_first_trial(
    tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any, made_up_device: Any
) -> None:
    module = foreign()
    with pytest.raises(
        InfeasibleError, match=r"size_bytes <= 10 cannot be met: the nearest that can be reached is"
    ) as error:
        fit(module, search(measure_on=made_up_device, limits={"size_bytes": 10.0}, trials=1), digits)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["trials"] == summary["baselines"] == []
    nearest = float(str(error.value).split("reached is ")[1].split(" ")[0].replace(",", ""))
    # What it names can be had: the same folder goes on with it.
    callback = search(measure_on=made_up_device, limits={"size_bytes": nearest}, trials=1)
    fit(foreign(), callback, digits)
    space = callback.loop.space
    bits = space.extreme(min)
    assert {bits[layer].weight for layer in space.bit_choices} == {4}
