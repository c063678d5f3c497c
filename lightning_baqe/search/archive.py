"""A Pareto front that grows point by point and may be bounded in size. Every objective is minimised.

| symbol | meaning                                | shape |
| ------ | -------------------------------------- | ----- |
| P      | points in objective space              | n x m |
| P'     | P scaled so that each objective is 0..1 | n x m |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.pareto import hypervolume, pareto_mask

Point = tuple[float, ...]
_MARGIN = 1.1  # of the reference point, so that the extreme points of a front are worth something, too


def hypervolume_contributions(points: Tensor) -> Tensor:
    """What each point alone adds to the hypervolume of a front; the selection of SMS-EMOA.

    Beume, Naujoks, Emmerich, "SMS-EMOA: Multiobjective selection based on dominated hypervolume", EJOR 2007. Each
    objective is scaled to 0..1 over the points first, and the reference point is 1.1, so that units do not matter.

    Args:
        points: `n x m`, finite, n >= 1.

    Returns:
        Shape `n`, at least 0; 0 for a point that another one dominates or equals.

    Raises:
        ConfigError: there is no point, or a value is not finite.
    """
    points = torch.as_tensor(points, dtype=torch.float64)
    if points.ndim != 2 or not points.numel() or not points.isfinite().all():
        raise ConfigError(f"points has shape {tuple(points.shape)}; wanted (n, m), at least one row and finite values")
    spread = points.amax(0) - points.amin(0)
    scaled = (points - points.amin(0)) / torch.where(spread > 0, spread, torch.ones_like(spread))
    reference = [_MARGIN] * points.shape[1]
    whole = hypervolume(scaled, reference)
    without = [hypervolume(scaled[torch.arange(len(scaled)) != i], reference) for i in range(len(scaled))]
    return torch.tensor([max(whole - rest, 0.0) for rest in without], dtype=torch.float64)


class ParetoArchive:
    """The Pareto front of all points that were ever offered, or `max_size` of its points.

    A point joins unless one that was offered before dominates **or equals** it: of equal points the first one stays.
    The points that it dominates leave, those that tie with it in some objectives and are worse in another included.
    Where the front grows over `max_size`, the point leaves that contributes the least hypervolume, of several such the
    newest. It is remembered without being in the archive, so that what it dominates does not come in later.

    Args:
        max_size: points at most; None: no bound.
        points: of an earlier archive, in its order.
        crowded_out: of an earlier archive.

    Raises:
        ConfigError: `max_size` is below 1.
    """

    def __init__(
        self, max_size: int | None = None, points: Sequence[Point] = (), crowded_out: Sequence[Point] = ()
    ) -> None:
        if max_size is not None and max_size < 1:
            raise ConfigError(f"max_size={max_size}; wanted at least 1, or None for no bound")
        self.max_size = max_size
        self.points: list[Point] = [tuple(point) for point in points]
        self.crowded_out: list[Point] = [tuple(point) for point in crowded_out]

    def offer(self, point: Point) -> tuple[bool, list[int]]:
        """Let a point in if it belongs to the front.

        Args:
            point: `m` finite numbers.

        Returns:
            Whether it is in the archive now, and the positions, before the offer, of the points that no longer are.

        Raises:
            ConfigError: a number is not finite, or there are more or fewer than in earlier points.
        """
        known = self.points + self.crowded_out
        new = torch.tensor([point], dtype=torch.float64)
        if not new.isfinite().all() or (known and len(known[0]) != len(point)):
            wanted = f"{len(known[0])} " if known else ""
            raise ConfigError(f"a point is {list(point)}; wanted {wanted}finite numbers")
        old = torch.tensor(known, dtype=torch.float64).reshape(len(known), len(point))
        if bool((old <= new).all(1).any()):
            return False, []
        survives = pareto_mask(torch.cat([old, new])).tolist()
        n = len(self.points)
        # Positions of what stays, the newcomer's is n.
        stay = [i for i in range(n) if survives[i]] + [n]
        self.crowded_out = [p for p, keep in zip(self.crowded_out, survives[n:-1], strict=True) if keep]
        points = [*self.points, tuple(point)]
        while self.max_size is not None and len(stay) > self.max_size:
            worth = hypervolume_contributions(torch.tensor([points[i] for i in stay], dtype=torch.float64)).tolist()
            least = max(range(len(stay)), key=lambda i: (-worth[i], i))
            self.crowded_out.append(points[stay.pop(least)])
        self.points = [points[i] for i in stay]
        return n in stay, [i for i in range(n) if i not in stay]
