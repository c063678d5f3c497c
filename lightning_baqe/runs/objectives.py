"""The run folder: what a search writes down. The study is the truth; ``summary.json`` and the rest are made from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from optuna.study import Study
from optuna.trial import TrialState

from lightning_baqe.files import replace_file
from lightning_baqe.runs.front import pareto_entries, write_pareto_csv
from lightning_baqe.runs.limits import feasible
from lightning_baqe.search.pareto import hypervolume, pareto_mask

OBJECTIVES = ("error", "latency", "size")
REFERENCE_POINT = (1.0, 1.5, 1.1)
RESULT, FLOAT, BASELINES, TEST, REWARDS = "result", "float", "baselines", "test_accuracy", "rewards"
LIMITS = "limits"
_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.RUNNING: "running",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "pruned",
}
_EMPTY: dict[str, Any] = {
    "accuracy": None,
    "fake_quant_accuracy": None,
    "latency_us": None,
    "size_bytes": None,
    "seconds": {},
    "error": None,
}


def objectives(entry: Mapping[str, Any], reference: Mapping[str, Any]) -> tuple[float, float, float]:
    """``(1 - accuracy, latency / float's, size / float's)``, all minimised."""
    return (
        1.0 - entry["accuracy"],
        entry["latency_us"] / reference["latency_us"],
        entry["size_bytes"] / reference["size_bytes"],
    )


def summarise(study: Study, about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``summary.json``.

    Args:
        study: of the search; its user attributes hold the float model, the baselines, what the device rewards and the
            limits; where there are limits, ``feasible`` says of each measured entry whether it meets them.
        about: recipe, model, dataset, device, versions.
    """
    attributes = study.user_attrs
    reference = attributes[FLOAT]
    tests: Mapping[str, float] = attributes.get(TEST, {})
    baselines = [dict(entry) for entry in attributes.get(BASELINES, [])]
    trials = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state not in _STATES or (trial.state == TrialState.PRUNED and RESULT not in trial.user_attrs):
            continue  # waiting, or a proposal that repeated another and was never begun
        known = trial.user_attrs.get(RESULT, {})
        entry = {"number": trial.number, "phase": "", "bits": {}, "schedules": {}, **_EMPTY, **known}
        trials.append({**entry, "state": _STATES[trial.state], "pareto": False})
    entries = baselines + trials
    measured = [entry for entry in entries if entry["state"] == "complete"]
    limits = attributes.get(LIMITS) or {}
    for entry in entries:
        entry["pareto"] = False
        if limits and entry["state"] == "complete":
            entry["feasible"] = feasible(entry, limits)
    level = found = 0.0
    if measured:
        points = torch.tensor([objectives(entry, reference) for entry in measured], dtype=torch.float64)
        for entry, on_front in zip(measured, pareto_mask(points).tolist(), strict=True):
            entry["pareto"] = on_front
        found = hypervolume(points, REFERENCE_POINT)
        plain = [objectives(entry, reference) for entry in baselines if entry["state"] == "complete"]
        level = hypervolume(torch.tensor(plain, dtype=torch.float64), REFERENCE_POINT) if plain else 0.0
    summary = {
        **about,
        "float": {"test_accuracy": tests.get("float"), **reference},
        "baselines": baselines,
        "objectives": list(OBJECTIVES),
        "reference_point": list(REFERENCE_POINT),
        "hypervolume": found,
        "baselines_hypervolume": level,
        "rewards": attributes.get(REWARDS),
        "limits": limits or None,
        "trials": trials,
    }
    for entry in entries:
        name = f"baseline_{entry['name']}" if "name" in entry else f"trial_{entry['number']}"
        if entry["pareto"] and name in tests:
            entry["test_accuracy"] = tests[name]
    return summary


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` and ``pareto.csv``, and delete artifacts that are no longer on the front."""
    replace_file(run_dir / "summary.json", json.dumps(summary, indent=1).encode())
    write_pareto_csv(summary, run_dir / "pareto.csv")
    keep = {name for name, _ in pareto_entries(summary)}
    ended = {f"trial_{entry['number']}" for entry in summary["trials"] if entry["state"] != "running"}
    ended |= {f"baseline_{entry['name']}" for entry in summary["baselines"]}
    for name in ended - keep:  # what another worker builds at this moment stays
        folder = run_dir / "artifacts" / name
        if folder.is_dir():
            shutil.rmtree(folder)
