"""Pareto fronts and what they are worth. Every objective is minimised.

| symbol | meaning                        | shape |
| ------ | ------------------------------ | ----- |
| P      | points in objective space      | n x m |
| r      | reference point                | m     |
| F      | non-dominated points (front)   | f x m |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_baqe.errors import ConfigError

_ROWS_AT_ONCE = 512


def _as_points(points: Tensor, name: str) -> Tensor:
    points = torch.as_tensor(points, dtype=torch.float64)
    if points.ndim != 2 or points.shape[1] == 0:
        raise ConfigError(
            f"{name} has shape {tuple(points.shape)}; wanted (n, m): one row per point, m >= 1 objectives"
        )
    if points.isnan().any():
        raise ConfigError(f"{name} holds NaN in {int(points.isnan().any(1).sum())} rows; drop failed points first")
    return points


def as_reference_point(reference_point: Tensor | Sequence[float], n_objectives: int) -> Tensor:
    """Check a reference point against the number of objectives.

    Returns:
        A float64 tensor of shape `m`.

    Raises:
        ConfigError: it has another length, or a value that is not finite.
    """
    reference = torch.as_tensor(reference_point, dtype=torch.float64)
    if reference.shape != (n_objectives,) or not reference.isfinite().all():
        raise ConfigError(
            f"reference_point is {reference.tolist()}; wanted {n_objectives} finite numbers, one for each objective"
        )
    return reference


def pareto_mask(points: Tensor) -> Tensor:
    """Tell which points no other point dominates.

    One point dominates another when it is nowhere larger and somewhere smaller. Equal points do not dominate
    each other, so all copies of a non-dominated point are marked.

    Args:
        points: `n x m`, every objective minimised; infinities are allowed.

    Returns:
        A bool tensor of shape `n`.

    Raises:
        ConfigError: the shape is not `n x m`, or a value is NaN.
    """
    points = _as_points(points, "points")
    # BoTorch's is_non_dominated does the same, but its package takes seconds to import.
    mask = torch.ones(points.shape[0], dtype=torch.bool)
    for start in range(0, points.shape[0], _ROWS_AT_ONCE):
        rows = points[start : start + _ROWS_AT_ONCE, None, :]
        dominated = ((points <= rows).all(-1) & (points < rows).any(-1)).any(1)
        mask[start : start + _ROWS_AT_ONCE] = ~dominated
    return mask


def hypervolume(points: Tensor, reference_point: Tensor | Sequence[float]) -> float:
    """Measure the space that the points dominate, up to the reference point. Exact.

    BAQE eq. 12, with the sum over a grid replaced by the volume (Lebesgue measure) that it stands for.

    Args:
        points: `n x m`, every objective minimised; dominated points and duplicates change nothing. A point that
            is not better than the reference point in every objective adds nothing.
        reference_point: `m` finite numbers, the worst corner.

    Returns:
        The volume in units of the product of the objectives; 0.0 without points.

    Raises:
        ConfigError: shapes do not fit, a value is NaN, or a point is minus infinity somewhere.
    """
    points = _as_points(points, "points")
    reference = as_reference_point(reference_point, points.shape[1])
    inside = points[(points < reference).all(1)]
    if inside.shape[0] == 0:
        return 0.0
    if inside.isinf().any():
        raise ConfigError("points hold -inf: they dominate an infinite volume; drop them or bound the objective")
    front = torch.unique(inside[pareto_mask(inside)], dim=0)
    if front.shape[1] == 1:
        return float(reference[0] - front[0, 0])
    # Takes seconds to import; a callback that keeps a front of two checkpoints should not wait for it.
    from botorch.utils.multi_objective.hypervolume import Hypervolume

    return float(Hypervolume(ref_point=-reference).compute(-front))  # BoTorch maximises


def adrs(found: Tensor, front: Tensor) -> float:
    """Average distance from the found points to the reference set: BAQE eq. 16.

    Each found point counts its Euclidean distance to the nearest point of the front. (Elsewhere the average often
    runs over the front instead; swap the arguments for that.)

    Args:
        found: `k x m`, the points Y that a search found, objectives normalised by the caller.
        front: `f x m`, the true front P, in the same units.

    Returns:
        The mean distance; 0.0 when every found point lies on the front.

    Raises:
        ConfigError: one of the two is empty, or their numbers of objectives differ.
    """
    found, front = _as_points(found, "found"), _as_points(front, "front")
    if not found.shape[0] or not front.shape[0] or found.shape[1] != front.shape[1]:
        raise ConfigError(
            f"found has shape {tuple(found.shape)} and front {tuple(front.shape)}; "
            "wanted (k, m) and (f, m) with at least one row each and the same m"
        )
    distances = torch.linalg.vector_norm(found[:, None, :] - front[None, :, :], dim=-1)
    return float(distances.amin(1).mean())


def default_reference_point(values: Tensor) -> Tensor:
    """Derive a reference point from what was observed, for callers who have none.

    The worst value on the front plus a tenth of the front's range, per objective. Where the front has no range,
    the range of all values takes its place, and where that is zero too, 1.

    Args:
        values: `n x m`, n >= 1, finite, every objective minimised.

    Returns:
        Shape `m`.

    Raises:
        ConfigError: there is no point, or a value is not finite.
    """
    values = _as_points(values, "values")
    if not values.shape[0] or not values.isfinite().all():
        raise ConfigError(
            f"values has shape {tuple(values.shape)}; wanted at least one row and finite values to derive a "
            "reference point from; give reference_point= instead"
        )
    front = values[pareto_mask(values)]
    spread = front.amax(0) - front.amin(0)
    spread = torch.where(spread > 0, spread, values.amax(0) - values.amin(0))
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    return front.amax(0) + 0.1 * spread
