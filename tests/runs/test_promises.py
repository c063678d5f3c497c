"""Trials that are given up: before their tuning, after an epoch of it, and never more than are wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from lightning_baqe.errors import ConfigError
from lightning_baqe.runs.promises import Promises
from lightning_baqe.search.knowledge import Knowledge, Sum

Make = Callable[..., Any]
NO_STUDY: Any = None  # which is asked for nothing where nothing is pruned
OPTIONS: dict[str, Any] = {"mode": "beyond", "prune": True, "tune_s": 5.0, "bit_choices": (3, 4, 8), "baselines": ()}


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def judge(monkeypatch: pytest.MonkeyPatch, verdict: Callable[[int, int], bool]) -> list[tuple[int, int, float]]:
    """Let a verdict on trial and rung decide instead of the figures; what was asked."""
    asked: list[tuple[int, int, float]] = []
    real = Promises.is_hopeless

    def is_hopeless(self: Promises, trial: optuna.Trial, rung: int, accuracy: float) -> bool:
        real(self, trial, rung, accuracy)
        asked.append((trial.number, rung, accuracy))
        return verdict(trial.number, rung)

    monkeypatch.setattr(Promises, "is_hopeless", is_hopeless)
    return asked


def test_hopeless_trials_are_pruned_and_others_finish(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    foreign: Make,
    search: Make,
    fit: Make,
    digits: Any,
    made_up_device: Any,
) -> None:
    asked = judge(monkeypatch, lambda number, rung: (number, rung) in {(1, 0), (2, 1)})
    fit(foreign(), search(measure_on=made_up_device, **OPTIONS, trials=3, epochs_per_trial=2), digits)
    assert [(number, rung) for number, rung, _ in asked] == [
        (0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1),
    ]  # fmt: skip
    assert all(0 <= accuracy <= 1 for *_, accuracy in asked)
    summary = summary_of(tmp_path / "run")
    assert [e["state"] for e in summary["trials"]] == ["complete", "pruned", "pruned", "complete", "complete"]
    before, after = summary["trials"][1], summary["trials"][2]
    assert set(before["seconds"]) == {"propose", "estimate"}
    assert set(after["seconds"]) == {"propose", "estimate", "train"}
    for entry, (_, _, accuracy) in ((before, asked[2]), (after, asked[4])):
        assert entry["promised_accuracy"] == accuracy
        assert entry["accuracy"] is None
        assert entry["error"] is None
        assert not entry["pareto"]
    assert "2 pruned" in (tmp_path / "run" / "report.html").read_text()


def test_no_more_are_pruned_than_are_wanted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    foreign: Make,
    search: Make,
    fit: Make,
    digits: Any,
    made_up_device: Any,
) -> None:
    judge(monkeypatch, lambda number, rung: True)
    fit(foreign(), search(measure_on=made_up_device, **OPTIONS, trials=2), digits)
    states = [entry["state"] for entry in summary_of(tmp_path / "run")["trials"]]
    assert states == ["pruned", "pruned", "complete", "complete"]


def test_without_pruning_nothing_is_promised(
    monkeypatch: pytest.MonkeyPatch, foreign: Make, search: Make, fit: Make, digits: Any, made_up_device: Any
) -> None:
    asked = judge(monkeypatch, lambda number, rung: True)
    fit(foreign(), search(measure_on=made_up_device, **{**OPTIONS, "prune": False}, trials=1), digits)
    assert asked == []


def test_pruning_wants_to_know_latencies(foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    with pytest.raises(ConfigError, match="prune=True with mode='paper'"):
        search(prune=True)
    with pytest.raises(ConfigError, match="sampler=RandomSampler"):
        search(**OPTIONS, sampler=optuna.samplers.RandomSampler())
    with pytest.raises(ConfigError, match="no kernel was measured"):
        Promises(Knowledge([None, None, Sum({})]), {}, [], NO_STUDY, 0)


def test_what_finished_trials_tell() -> None:
    """The more bits, the more accurate and the slower; a network that is no more accurate for it is hopeless."""
    space = {f"{layer}/bits": optuna.distributions.CategoricalDistribution((4, 8)) for layer in "abcdef"}
    terms = {name: {4: 0.05, 8: 0.1} for name in space}
    knowledge = Knowledge([Sum({}, kind="score"), Sum(terms), Sum(terms, kind="exact")])
    promises = Promises(knowledge, space, [], NO_STUDY, 0)
    study = optuna.create_study(directions=["minimize"] * 3)

    def ask(wide: int) -> optuna.Trial:
        study.enqueue_trial({name: 8 if index < wide else 4 for index, name in enumerate(space)})
        return study.ask(space)

    for wide in range(6):
        trial, size = ask(wide), 0.3 + 0.05 * wide
        assert not promises.is_hopeless(trial, 0, 0.5 + 0.05 * wide)
        study.tell(trial, [0.3 - 0.03 * wide, 0.9 * size, size])
    assert not promises.is_hopeless(ask(6), 0, 0.9)
    bad = ask(6)
    assert promises.is_hopeless(bad, 0, 0.1)
    expected = study._storage.get_trial_system_attrs(bad._trial_id)["baqe:expected"]
    np.testing.assert_allclose(expected, [0.27, 0.9 * 0.5, 0.6])  # of the three that promised nearly as little
