"""What a run minimises, and the summary that scores its trials by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_baqe.runs.limits import feasible
from lightning_baqe.runs.summary import Baseline, Entry, Figures, Summary, Trial, is_measured
from lightning_baqe.search.pareto import hypervolume, pareto_mask

OBJECTIVES = ("error", "latency", "size")
REFERENCE_POINT = (1.0, 1.5, 1.1)


def objectives(entry: Figures, reference: Figures) -> tuple[float, float, float]:
    """``(1 - accuracy, latency / float's, size / float's)``, all minimised; NaN where a figure is unknown.

    The accuracy is whatever the run's metric is, at most 1; one below 0 gives an error beyond the reference point,
    which adds nothing to a hypervolume.
    """
    accuracy, latency_us, size_bytes = entry.triple
    _, float_us, float_bytes = reference.triple
    return 1.0 - accuracy, latency_us / float_us, size_bytes / float_bytes


def summarise(
    about: Mapping[str, Any],
    reference: Figures,
    trials: Sequence[Trial],
    baselines: Sequence[Baseline] = (),
    limits: Mapping[str, float] | None = None,
    rewards: Mapping[str, Any] | None = None,
    tests: Mapping[str, float] | None = None,
) -> Summary:
    """The summary of a run: front and hypervolumes of what it measured.

    Args:
        about: recipe, metric, model, dataset, device, versions.
        reference: the float model's figures.
        trials, baselines: as they ended.
        limits: where there are some, ``feasible`` says of each complete entry whether it meets them.
        rewards: what the device rewards.
        tests: accuracies on the test split: ``float`` and keys of entries; those on the front get theirs.
    """
    tests = tests or {}
    measured = [entry for entry in (*baselines, *trials) if is_measured(entry)]
    points = torch.tensor([objectives(entry, reference) for entry in measured], dtype=torch.float64)
    front = {e.key for e, on in zip(measured, pareto_mask(points).tolist(), strict=True) if on} if measured else set()
    plain = points[: sum(entry.name is not None for entry in measured)]

    def scored(entry: Entry) -> dict[str, Any]:
        found: dict[str, Any] = {"pareto": entry.key in front}
        if limits and entry.state == "complete":
            found["feasible"] = feasible(entry, limits)
        if entry.key in front & tests.keys():
            found["test_accuracy"] = tests[entry.key]
        return found

    return Summary(
        **about,
        reference=reference.model_copy(update={"test_accuracy": tests.get("float")}),
        baselines=tuple(entry.model_copy(update=scored(entry)) for entry in baselines),
        objectives=OBJECTIVES,
        reference_point=REFERENCE_POINT,
        hypervolume=hypervolume(points, REFERENCE_POINT) if len(points) else 0.0,
        baselines_hypervolume=hypervolume(plain, REFERENCE_POINT) if len(plain) else 0.0,
        rewards=None if rewards is None else dict(rewards),
        limits=dict(limits) if limits else None,
        trials=tuple(entry.model_copy(update=scored(entry)) for entry in trials),
    )
