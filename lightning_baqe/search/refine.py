"""Gradient steps on the continuous parameters of good candidates.

Bred candidates find the right region and lie on no optimum: a child differs from its parents by whole redraws. Where
parameters are continuous, the best few are moved uphill on the logarithm of the expected improvement.

| symbol | meaning                                             | shape |
| ------ | --------------------------------------------------- | ----- |
| rows   | candidates as internal values of the search space   | k x d |
| x      | encoded candidates                                  | k x D |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from botorch.generation.gen import gen_candidates_scipy
from optuna.distributions import FloatDistribution
from torch import Tensor

from lightning_baqe.search.space import Rows, SearchSpace


def continuous_parameters(space: SearchSpace) -> list[int]:
    """Positions of the float parameters that have no step."""
    return [
        index
        for index, dimension in enumerate(space.dimensions)
        if isinstance(dimension.distribution, FloatDistribution) and dimension.distribution.step is None
    ]


def refine(space: SearchSpace, rows: Rows, log_score: Callable[[Tensor], Tensor], max_iterations: int = 200) -> Rows:
    """Move each candidate to a local optimum in its continuous parameters; the others stay.

    L-BFGS-B within the unit cube, all candidates side by side.

    Args:
        space: where the candidates live.
        rows: `k x d` internal values.
        log_score: encoded points `k x D` -> shape `k`, to be maximised, with gradients.
        max_iterations: of L-BFGS-B.

    Returns:
        `k x d` internal values; `rows` itself where no parameter is continuous.
    """
    moved = continuous_parameters(space)
    if not moved or not len(rows):
        return rows
    encoded = space.encode(rows)
    columns = _columns(space, moved)

    def score(part: Tensor) -> Tensor:
        # The columns that stay are no variables of the optimiser; candidates keep their own.
        return log_score(encoded.index_copy(1, columns, part[:, 0]))

    with torch.enable_grad():
        found, _ = gen_candidates_scipy(
            initial_conditions=encoded[:, None, columns],
            acquisition_function=cast(Any, score),  # any function of batches will do
            lower_bounds=0.0,
            upper_bounds=1.0,
            options={"maxiter": max_iterations},
            use_parallel_mode=False,
        )
    result = rows.copy()
    place = found.detach()[:, 0].clamp(0, 1).numpy()
    for position, index in enumerate(moved):
        result[:, index] = space.dimensions[index].from_unit(place[:, position])
    return result


def _columns(space: SearchSpace, indices: list[int]) -> Tensor:
    """The encoded column of each of some parameters that have one."""
    widths = [d.width for d in space.dimensions]
    starts = np.concatenate([[0], np.cumsum(widths)[:-1]])
    return torch.tensor([int(starts[index]) for index in indices])
