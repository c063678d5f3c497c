"""Figures of replays: hypervolume by trial, with bands over the seeds, and the points that were found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from lightning_baqe.benchmarks.search_tables import Curves, Runs, front_of, values_of
from lightning_baqe.search.metrics import bands


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
