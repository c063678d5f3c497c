"""Figures of replays, and their tables: BAQE's tables III to VI, with hypervolumes and their significance.

| symbol | meaning                                                                              |
| ------ | ------------------------------------------------------------------------------------ |
| P      | the best known front: non-dominated points of all runs and of a long NSGA-II         |
| Y      | the non-dominated points of one run                                                  |
| target | the final hypervolume of the anchor's run of the same seed; the anchor is mode paper |
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lightning_baqe.benchmarks.setups import table_of
from lightning_baqe.errors import ConfigError
from lightning_baqe.search import adrs, hypervolume, pareto_mask
from lightning_baqe.search.metrics import (
    bands,
    compare_paired,
    found_points,
    holm,
    hypervolume_curve,
    trials_to_reach,
)

ANCHOR, CHANCE, LEADER = "paper", "random", "beyond"
Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]  # sampler -> seed -> row


@dataclass(frozen=True)
class Curves:
    """What all tables and figures are computed from.

    Attributes:
        names: of the samplers.
        seeds: that every sampler has run.
        trials: of a run.
        relative: sampler -> one curve a seed: hypervolume over that of P after each trial.
        proposing_s: sampler -> seed -> processor seconds of all proposals.
        total_s: sampler -> one curve a seed: seconds from the start until the end of each trial.
    """

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    trials: int
    relative: dict[str, list[Tensor]]
    proposing_s: dict[str, list[float]]
    total_s: dict[str, list[Tensor]]


def runs_of(rows: Sequence[Mapping[str, Any]], problem: str, trials: int, names: Sequence[str]) -> Runs:
    """The rows of one problem: sampler -> seed -> row."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {name: {} for name in names}
    for row in rows:
        if (row["problem"], row["trials"]) == (problem, trials) and row["sampler"] in found:
            found[row["sampler"]][row["seed"]] = row
    return found


def curves_of(runs: Runs, front: Tensor, reference_point: Sequence[float], n_seeds: int) -> Curves:
    """Hypervolume curves of the seeds that every sampler has run.

    Raises:
        ConfigError: there is no such seed.
    """
    seeds = [seed for seed in range(n_seeds) if all(seed in of for of in runs.values())]
    if not seeds:
        raise ConfigError(f"no seed below {n_seeds} has a run of each of {list(runs)}; run the same command again")
    best = hypervolume(front, reference_point)
    relative: dict[str, list[Tensor]] = {}
    proposing: dict[str, list[float]] = {}
    total: dict[str, list[Tensor]] = {}
    for name, of in runs.items():
        relative[name] = [hypervolume_curve(torch.tensor(of[s]["values"]), reference_point) / best for s in seeds]
        proposing[name] = [float(sum(of[s]["propose_s"])) for s in seeds]
        total[name] = [
            (torch.tensor(of[s]["propose_s"]) + torch.tensor(of[s]["seconds"])).double().cumsum(0) for s in seeds
        ]
    first = next(iter(relative.values()))
    return Curves(tuple(runs), tuple(seeds), len(first[0]), relative, proposing, total)


def scaled_adrs(values: Tensor, front: Tensor) -> float:
    """Eq. 16 of BAQE from the non-dominated ones of some values to a front, every objective over the front's range."""
    low, span = front.amin(0), (front.amax(0) - front.amin(0)).clamp_min(1e-12)
    return adrs((values[pareto_mask(values)] - low) / span, (front - low) / span)


def _distances(runs: Runs, curves: Curves, front: Tensor) -> dict[str, dict[str, float]]:
    """ADRS and optimal points of each sampler, means over the seeds."""
    low, span = front.amin(0), (front.amax(0) - front.amin(0)).clamp_min(1e-12)
    scaled = (front - low) / span
    found: dict[str, dict[str, list[float]]] = {
        name: {"adrs": [], "adrs_of_all": [], "front_to_found": [], "optimal": [], "share": []} for name in curves.names
    }
    for seed in curves.seeds:
        values = {name: torch.tensor(runs[name][seed]["values"], dtype=torch.float64) for name in curves.names}
        fronts = {name: v[pareto_mask(v)] for name, v in values.items()}
        joint = torch.cat(list(fronts.values()))
        joint = joint[pareto_mask(joint)]
        for name in curves.names:
            of = found[name]
            own = (fronts[name] - low) / span
            of["adrs"].append(scaled_adrs(fronts[name], front))
            of["adrs_of_all"].append(adrs((values[name] - low) / span, scaled))
            of["front_to_found"].append(adrs(scaled, own))
            of["optimal"].append(int(found_points(fronts[name], joint).sum()))
            of["share"].append(float(found_points(fronts[name], front).double().mean()))
    return {name: {key: statistics.fmean(v) for key, v in of.items()} for name, of in found.items()}


def summarise(runs: Runs, curves: Curves, front: Tensor, at: Sequence[int]) -> list[dict[str, Any]]:
    """One entry a sampler.

    Args:
        runs, curves: of `runs_of` and `curves_of`.
        front: P.
        at: trials at which the hypervolume is given.

    Returns:
        `{"sampler", "adrs": of Y, "adrs_of_all": of all trials, as eq. 16 may also be read, "front_to_found": the
        distance the other way round, "normalised_adrs", "optimal": points on the front of all samplers' runs of the
        seed, "share": of P, "hypervolume": {trials: [quartile, median, quartile]}, "against": {other: {"p", "p_holm",
        "effect", "difference"}}, "trials_to_target", "seconds_to_target": medians, infinite where more than half of
        the seeds never reach it, "reached": seeds that do, "normalised_time", "proposing_s", "total_s": medians}`.
        Normalised figures are over the anchor's; None where the anchor did not run or its figure is 0.
    """
    anchor = ANCHOR if ANCHOR in curves.names else curves.names[0]
    targets = [float(curve[-1]) for curve in curves.relative[anchor]]
    distances = _distances(runs, curves, front)
    tests = {other: _tests(curves, other) for other in dict.fromkeys((CHANCE, anchor, LEADER)) if other in curves.names}
    entries: list[dict[str, Any]] = []
    for name in curves.names:
        band = bands(curves.relative[name])
        steps = [trials_to_reach(c, t) for c, t in zip(curves.relative[name], targets, strict=True)]
        times = [math.inf if n is None else float(s[n - 1]) for n, s in zip(steps, curves.total_s[name], strict=True)]
        entries.append(
            {
                "sampler": name,
                **distances[name],
                "hypervolume": {n: [float(b[n - 1]) for b in band] for n in at if n <= curves.trials},
                "against": {other: of[name] for other, of in tests.items() if other != name},
                "trials_to_target": statistics.median(math.inf if n is None else n for n in steps),
                "seconds_to_target": statistics.median(times),
                "reached": sum(n is not None for n in steps),
                "proposing_s": statistics.median(curves.proposing_s[name]),
                "total_s": statistics.median(float(s[-1]) for s in curves.total_s[name]),
            }
        )
    base = next(entry for entry in entries if entry["sampler"] == anchor)
    for entry in entries:
        for key, of in (("normalised_adrs", "adrs"), ("normalised_time", "seconds_to_target")):
            entry[key] = entry[of] / base[of] if 0 < base[of] < math.inf else None
    return entries


def _tests(curves: Curves, other: str) -> dict[str, dict[str, float]]:
    """Every sampler's final hypervolume against that of one of them, paired by seed; Holm over the samplers."""
    final = {name: [float(curve[-1]) for curve in curves.relative[name]] for name in curves.names}
    found = {name: compare_paired(final[name], final[other]) for name in curves.names if name != other}
    adjusted = holm({name: test.p for name, test in found.items()})
    return {
        name: {"p": t.p, "p_holm": adjusted[name], "effect": t.effect, "difference": t.difference}
        for name, t in found.items()
    }


def print_summary(console: Console, title: str, entries: Sequence[Mapping[str, Any]], curves: Curves) -> None:
    """Print the table of `summarise`."""
    points = list(entries[0]["hypervolume"])
    others = list(dict.fromkeys(other for entry in entries for other in entry["against"]))
    headings = ("sampler", "ADRS", "norm. ADRS", "norm. time", "optimal points", "of P",
                *(f"HV at {n}" for n in points), *(f"p vs {other}" for other in others),
                "trials to target", "seeds", "proposing s", "total s")  # fmt: skip
    table = table_of(title, headings, ("sampler",))
    for entry in entries:
        low, _, high = entry["hypervolume"][points[-1]]
        volumes = [f"{entry['hypervolume'][n][1]:.3f}" for n in points]
        volumes[-1] += f" [{low:.3f}, {high:.3f}]"
        table.add_row(
            entry["sampler"], f"{entry['adrs']:.4f}", _ratio(entry["normalised_adrs"]),
            _ratio(entry["normalised_time"]), f"{entry['optimal']:.1f}", f"{entry['share']:.1%}",
            *volumes, *(_test(entry["against"].get(other)) for other in others),
            _trials(entry["trials_to_target"], curves.trials), f"{entry['reached']}/{len(curves.seeds)}",
            f"{entry['proposing_s']:.1f}", f"{entry['total_s']:.0f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "HV: share of the best known front's hypervolume, median and quartiles over seeds. ADRS: eq. 16 of a run's "
        "front. Optimal points: on the front of all samplers' runs of the seed. p: Wilcoxon signed-rank of the final "
        "HV, Holm over the samplers; + better, - worse. Target: mode paper's final HV of the seed; time until then.",
        soft_wrap=True,
    )


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if math.isfinite(value) else "never"


def _test(test: Mapping[str, float] | None) -> str:
    if test is None:
        return "-"
    return f"{test['p_holm']:.2g} {'+' if test['effect'] > 0 else '-' if test['effect'] < 0 else '='}"


def _trials(value: float, trials: int) -> str:
    return f"{value:.0f}" if math.isfinite(value) else f"> {trials}"
