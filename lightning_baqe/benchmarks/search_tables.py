"""Figures of replays, their tables and pictures: BAQE's tables III to VI, with hypervolumes and their significance.

| symbol | meaning                                                                              |
| ------ | ------------------------------------------------------------------------------------ |
| P      | the best known front: non-dominated points of all runs and of a long NSGA-II         |
| Y      | the non-dominated points of one run                                                  |
| target | the final hypervolume of the anchor's run of the same seed; the anchor is mode paper |
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
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
    """Hypervolumes, trial by trial.

    Attributes:
        names: of the samplers.
        seeds: that every sampler has run.
        relative: sampler -> one curve a seed: hypervolume over that of P after each trial.
    """

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    trials: int
    relative: dict[str, list[Tensor]]


def runs_of(rows: Sequence[Mapping[str, Any]], problem: str, trials: int, names: Sequence[str]) -> Runs:
    """The rows of one problem: sampler -> seed -> row."""
    wanted = [row for row in rows if (row["problem"], row["trials"]) == (problem, trials)]
    return {name: {row["seed"]: row for row in wanted if row["sampler"] == name} for name in names}


def curves_of(runs: Runs, front: Tensor, reference_point: Sequence[float], n_seeds: int) -> Curves:
    """Hypervolume curves of the seeds that every sampler has run.

    Raises:
        ConfigError: there is no such seed.
    """
    seeds = [seed for seed in range(n_seeds) if all(seed in of for of in runs.values())]
    if not seeds:
        raise ConfigError(f"no seed below {n_seeds} has a run of each of {list(runs)}; run the same command again")
    best = hypervolume(front, reference_point)
    relative = {
        name: [hypervolume_curve(torch.tensor(of[seed]["values"]), reference_point) / best for seed in seeds]
        for name, of in runs.items()
    }
    return Curves(tuple(runs), tuple(seeds), len(next(iter(relative.values()))[0]), relative)


def values_of(row: Mapping[str, Any]) -> Tensor:
    """Objectives of a row's trials, `n x m`, float64."""
    return torch.tensor(row["values"], dtype=torch.float64)


def front_of(values: Tensor) -> Tensor:
    """The non-dominated ones of `n x m` values."""
    return values[pareto_mask(values)]


def _scaler(front: Tensor) -> Callable[[Tensor], Tensor]:
    """What puts every objective over a front's range."""
    low, span = front.amin(0), (front.amax(0) - front.amin(0)).clamp_min(1e-12)
    return lambda values: (values - low) / span


def scaled_adrs(values: Tensor, front: Tensor) -> float:
    """Eq. 16 of BAQE from the non-dominated ones of some values to a front, every objective over the front's range."""
    scaled = _scaler(front)
    return adrs(scaled(front_of(values)), scaled(front))


def _distances(runs: Runs, curves: Curves, front: Tensor) -> dict[str, dict[str, float]]:
    """ADRS and optimal points of each sampler, means over the seeds."""
    scaled = _scaler(front)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in curves.names}
    for seed in curves.seeds:
        values = {name: values_of(runs[name][seed]) for name in curves.names}
        fronts = {name: front_of(found) for name, found in values.items()}
        joint = front_of(torch.cat(list(fronts.values())))
        for name, own in fronts.items():
            found[name].append(
                {
                    "adrs": scaled_adrs(own, front),
                    "adrs_of_all": adrs(scaled(values[name]), scaled(front)),
                    "front_to_found": adrs(scaled(front), scaled(own)),
                    "optimal": int(found_points(own, joint).sum()),
                    "share": float(found_points(own, front).double().mean()),
                }
            )
    return {name: {key: statistics.fmean(of[key] for of in each) for key in each[0]} for name, each in found.items()}


def summarise(runs: Runs, curves: Curves, front: Tensor, at: Sequence[int]) -> list[dict[str, Any]]:
    """One entry a sampler.

    Args:
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
        rows, band = [runs[name][seed] for seed in curves.seeds], bands(curves.relative[name])
        total_s = [(torch.tensor(row["propose_s"]) + torch.tensor(row["seconds"])).double().cumsum(0) for row in rows]
        steps = [trials_to_reach(c, t) for c, t in zip(curves.relative[name], targets, strict=True)]
        times = [math.inf if n is None else float(s[n - 1]) for n, s in zip(steps, total_s, strict=True)]
        entries.append(
            {
                "sampler": name,
                **distances[name],
                "hypervolume": {n: [float(b[n - 1]) for b in band] for n in at if n <= curves.trials},
                "against": {other: of[name] for other, of in tests.items() if other != name},
                "trials_to_target": statistics.median(math.inf if n is None else n for n in steps),
                "seconds_to_target": statistics.median(times),
                "reached": sum(n is not None for n in steps),
                "proposing_s": statistics.median(float(sum(row["propose_s"])) for row in rows),
                "total_s": statistics.median(float(s[-1]) for s in total_s),
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


def draw_curves(curves: Curves, title: str, path: Path) -> None:
    """Hypervolume of each sampler after each trial: median, and a band between the quartiles over the seeds."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    steps = range(1, curves.trials + 1)
    for index, name in enumerate(curves.names):
        low, median, high = bands(curves.relative[name])
        colour = f"C{index % 10}"
        axes.plot(steps, median, color=colour, linestyle="--" if index >= 10 else "-", label=name)
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="trials", ylabel="hypervolume / best known")
    axes.set_title(f"{title}: median and quartiles, {len(curves.seeds)} seeds")
    axes.legend(fontsize="small", ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_points(
    runs: Runs, curves: Curves, front: Tensor, objectives: Sequence[str], at: tuple[int, int], path: Path
) -> None:
    """BAQE's figure 7: two of the objectives, for each sampler all points of the first seed and the best known front.

    Args:
        front: best known, `f x m`.
        objectives: their names.
        at: which two.
    """
    columns = min(4, len(curves.names))
    height = -(-len(curves.names) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.0 * height), layout="constrained")
    cells = figure.subplots(height, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for cell in cells[len(curves.names) :]:
        cell.set_visible(False)
    for cell, name in zip(cells, curves.names, strict=False):
        values = values_of(runs[name][curves.seeds[0]])
        best = front_of(values)
        cell.scatter(front[:, at[0]], front[:, at[1]], s=3, color="C0", alpha=0.4, label="best known front")
        cell.scatter(values[:, at[0]], values[:, at[1]], s=8, color="0.6", label="trials")
        cell.scatter(best[:, at[0]], best[:, at[1]], s=12, color="C3", label="front of the run")
        cell.set(title=name, xlabel=objectives[at[0]], ylabel=objectives[at[1]])
    cells[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
