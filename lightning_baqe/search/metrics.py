"""What searches are compared by, over many seeds. Every objective is minimised.

| symbol | meaning                                                  | shape |
| ------ | -------------------------------------------------------- | ----- |
| Y      | objectives of a run's trials, in order                   | n x m |
| P      | the best front that is known                             | f x m |
| r      | reference point                                          | m     |
| curve  | a figure after each trial of a run                       | n     |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata, wilcoxon
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.acquisition import hypervolume_improvement, nondominated_cells
from lightning_baqe.search.pareto import as_reference_point, pareto_mask

_CONFIDENCE = 0.95
_TOLERANCE = 1e-9  # how far apart equal values may lie, relative to the front's range of each objective


def found_points(found: Tensor, front: Tensor) -> Tensor:
    """Which distinct points of a front a search has found: their number are BAQE's "optimal points", tables III to VI.

    Args:
        found: `k x m`, k may be 0.
        front: `f x m`, f >= 1.

    Returns:
        Bool, one for each distinct point of the front.

    Raises:
        ConfigError: the front is empty, or the numbers of objectives differ.
    """
    found, front = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(front, dtype=torch.float64)
    if front.ndim != 2 or not len(front) or found.ndim != 2 or found.shape[1] != front.shape[1]:
        raise ConfigError(
            f"found has shape {tuple(found.shape)} and front {tuple(front.shape)}; wanted (k, m) and (f, m), f >= 1"
        )
    front = torch.unique(front, dim=0)
    spread = (front.amax(0) - front.amin(0)).clamp_min(1e-300)
    near = ((found[None] - front[:, None]).abs() <= _TOLERANCE * spread + 1e-300).all(-1)
    return near.any(1)


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


def bands(curves: Sequence[Tensor]) -> Tensor:
    """Lower quartile, median and upper quartile of curves of equal length at each trial: `3 x n`.

    Raises:
        ConfigError: there is no curve, or their lengths differ.
    """
    if len({len(curve) for curve in curves}) != 1:
        raise ConfigError(f"{len(curves)} curves of lengths {sorted({len(curve) for curve in curves})}; wanted one")
    stacked = torch.stack([torch.as_tensor(curve, dtype=torch.float64) for curve in curves])
    return torch.quantile(stacked, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)


class Comparison(NamedTuple):
    """Two searches over the same seeds.

    Attributes:
        p: of the Wilcoxon signed-rank test, two-sided; 1 where no pair differs.
        effect: matched-pairs rank-biserial correlation, -1 to 1: the share of the rank sum in favour of the first
            minus the share against it. Positive where the first search has the larger figures.
        difference: median of the differences, first minus second.
    """

    p: float
    effect: float
    difference: float


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
        return Comparison(1.0, 0.0, 0.0)
    places = rankdata(np.abs(moved))
    effect = float((places[moved > 0].sum() - places[moved < 0].sum()) / places.sum())
    return Comparison(float(wilcoxon(moved).pvalue), effect, float(np.median(difference)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction of several p-values for the chance that any of them is low by luck.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics, 1979.

    Returns:
        The adjusted p-values, at most 1, with the same keys.
    """
    names = sorted(p_values, key=lambda name: (p_values[name], name))
    scaled = (min(1.0, (len(names) - place) * p_values[name]) for place, name in enumerate(names))
    return dict(zip(names, accumulate(scaled, max), strict=True))


def bootstrap_interval(figures: Sequence[float]) -> tuple[float, float]:
    """Lower and upper end of a 95 % percentile bootstrap interval of a mean, from 10,000 resamples.

    Raises:
        ConfigError: there is no figure.
    """
    values = np.asarray(figures, dtype=np.float64)
    if not len(values):
        raise ConfigError("0 figures; wanted at least one")
    # SciPy's bootstrap draws otherwise: published intervals could not be repeated, and one figure is refused there.
    chosen = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    low, high = np.quantile(values[chosen].mean(1), [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)
