"""What searches are compared by, over many seeds. Every objective is minimised.

| symbol | meaning                                                  | shape |
| ------ | -------------------------------------------------------- | ----- |
| Y      | objectives of a run's trials, in order                   | n x m |
| P      | the best front that is known                             | f x m |
| r      | reference point                                          | m     |
| curve  | a figure after each trial of a run                       | n     |
| S      | seeds: runs of two searches with the same seed are a pair |       |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata, wilcoxon
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.acquisition import hypervolume_improvement, nondominated_cells
from lightning_baqe.search.pareto import as_reference_point, hypervolume, pareto_mask


def found_share(found: Tensor, front: Tensor, tolerance: float = 1e-9) -> float:
    """The share of a front's distinct points that a search has found.

    Args:
        found: `k x m`, k may be 0.
        front: `f x m`, f >= 1.
        tolerance: how far apart equal values may lie, relative to the front's range of each objective.

    Returns:
        0 to 1.

    Raises:
        ConfigError: the front is empty, or the numbers of objectives differ.
    """
    return float(_hits(found, front, tolerance).double().mean())


def found_count(found: Tensor, front: Tensor, tolerance: float = 1e-9) -> int:
    """How many distinct points of a front a search has found, the "optimal points" of BAQE's tables III to VI.

    Raises:
        ConfigError: as `found_share`.
    """
    return int(_hits(found, front, tolerance).sum())


def _hits(found: Tensor, front: Tensor, tolerance: float) -> Tensor:
    found, front = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(front, dtype=torch.float64)
    if front.ndim != 2 or not len(front) or found.ndim != 2 or found.shape[1] != front.shape[1]:
        raise ConfigError(
            f"found has shape {tuple(found.shape)} and front {tuple(front.shape)}; wanted (k, m) and (f, m), f >= 1"
        )
    front = torch.unique(front, dim=0)
    spread = (front.amax(0) - front.amin(0)).clamp_min(1e-300)
    near = ((found[None] - front[:, None]).abs() <= tolerance * spread + 1e-300).all(-1)
    return near.any(1)


def normalised_hypervolume(points: Tensor, front: Tensor, reference_point: Tensor | Sequence[float]) -> float:
    """The hypervolume of points as a share of that of the best known front.

    Returns:
        0 to 1 where the front dominates all points.

    Raises:
        ConfigError: shapes do not fit, or the front dominates no volume.
    """
    best = hypervolume(front, reference_point)
    if best <= 0:
        raise ConfigError(
            f"the front of {len(front)} points dominates nothing up to {list(map(float, reference_point))}; "
            "wanted a worse reference point"
        )
    return hypervolume(points, reference_point) / best


def hypervolume_curve(values: Tensor, reference_point: Tensor | Sequence[float]) -> Tensor:
    """The hypervolume after each trial.

    Args:
        values: `n x m` in the order of the trials; a failed trial is a row of infinities.
        reference_point: `m`.

    Returns:
        Shape `n`, never falling.

    Raises:
        ConfigError: shapes do not fit, or a value is NaN.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    reference = as_reference_point(reference_point, values.shape[-1])
    curve = torch.zeros(len(values), dtype=torch.float64)
    total, front = 0.0, values[:0]
    for index, value in enumerate(values):
        gain = float(hypervolume_improvement(value[None], nondominated_cells(front, reference)))
        if gain > 0:
            total += gain
            front = torch.cat([front, value[None]])
            front = front[pareto_mask(front)]
        curve[index] = total
    return curve


def trials_to_reach(curve: Tensor, target: float) -> int | None:
    """The number of trials after which a curve is at the target, to rounding; None where it never is."""
    reached = torch.nonzero(torch.as_tensor(curve) >= target * (1 - 1e-12))
    return int(reached[0]) + 1 if len(reached) else None


def seconds_to_reach(curve: Tensor, seconds: Tensor, target: float) -> float | None:
    """The time until a curve is at the target; None where it never is.

    Args:
        curve: `n`.
        seconds: `n`, of each trial: proposing, training, building and measuring.
        target: in the curve's unit.

    Raises:
        ConfigError: the lengths differ.
    """
    if len(curve) != len(seconds):
        raise ConfigError(f"curve has {len(curve)} trials and seconds {len(seconds)}; wanted one figure for each trial")
    trials = trials_to_reach(curve, target)
    return None if trials is None else float(torch.as_tensor(seconds, dtype=torch.float64)[:trials].sum())


@dataclass(frozen=True)
class Bands:
    """Median and quartiles over seeds, each of shape `n`."""

    low: Tensor
    median: Tensor
    high: Tensor


def bands(curves: Sequence[Tensor]) -> Bands:
    """Median and quartiles of curves of equal length, at each trial.

    Raises:
        ConfigError: there is no curve, or their lengths differ.
    """
    if len({len(curve) for curve in curves}) != 1:
        raise ConfigError(f"{len(curves)} curves of lengths {sorted({len(curve) for curve in curves})}; wanted one")
    stacked = torch.stack([torch.as_tensor(curve, dtype=torch.float64) for curve in curves])
    low, median, high = torch.quantile(stacked, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
    return Bands(low, median, high)


@dataclass(frozen=True)
class Comparison:
    """Two searches over the same seeds.

    Attributes:
        p: of the Wilcoxon signed-rank test, two-sided; 1 where no pair differs.
        effect: matched-pairs rank-biserial correlation, -1 to 1: the share of the rank sum in favour of the first
            minus the share against it. Positive where the first search has the larger figures.
        difference: median of the differences, first minus second.
        wins, losses: pairs in which the first has the larger or the smaller figure.
    """

    p: float
    effect: float
    difference: float
    wins: int
    losses: int


def compare_paired(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Wilcoxon signed-rank test of paired figures; ties within a pair are dropped (Wilcoxon's own treatment).

    The p is exact for up to 50 pairs without ties. Kerby, "The simple difference formula", Comprehensive Psychology,
    2014, for the effect.

    Args:
        first, second: one figure a seed, in the same order of seeds.

    Raises:
        ConfigError: the lengths differ, there is no pair, or a figure is not finite.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a) or not np.isfinite(np.concatenate([a, b])).all():
        raise ConfigError(f"{len(a)} and {len(b)} figures; wanted the same number of finite ones, at least one pair")
    difference = a - b
    moved = difference[difference != 0]
    if not len(moved):
        return Comparison(1.0, 0.0, 0.0, 0, 0)
    places = rankdata(np.abs(moved))
    effect = float((places[moved > 0].sum() - places[moved < 0].sum()) / places.sum())
    p = float(wilcoxon(moved).pvalue)
    return Comparison(p, effect, float(np.median(difference)), int((moved > 0).sum()), int((moved < 0).sum()))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction of several p-values for the chance that any of them is low by luck.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics, 1979.

    Returns:
        The adjusted p-values, at most 1, with the same keys.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: (item[1], item[0]))):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def bootstrap_interval(
    figures: Sequence[float], level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean.

    Args:
        figures: one a seed.
        level: of confidence.
        draws: resamples.
        seed: of the resamples.

    Returns:
        Lower and upper end.

    Raises:
        ConfigError: there is no figure, or the level is not between 0 and 1.
    """
    values = np.asarray(figures, dtype=np.float64)
    if not len(values) or not 0 < level < 1:
        raise ConfigError(f"{len(values)} figures, level={level}; wanted at least one figure and 0 < level < 1")
    # SciPy's bootstrap draws otherwise: published intervals could not be repeated, and one figure is refused there.
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[chosen].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
