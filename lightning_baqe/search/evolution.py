"""NSGA-II without a study, for problems that are free to evaluate.

Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", IEEE Transactions on Evolutionary
Computation 6 (2), 2002. Its environmental selection; children are those of `breed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.pareto import pareto_mask
from lightning_baqe.search.pool import breed, spanning_rows, unseen
from lightning_baqe.search.space import Distributions, SearchSpace


def evolve(
    search_space: Distributions,
    evaluate: Callable[[Mapping[str, Any]], Sequence[float]],
    population: int = 200,
    generations: int = 200,
    seed: int = 0,
) -> Tensor:
    """Approximate the Pareto front of a function.

    Args:
        search_space: name -> Optuna distribution.
        evaluate: parameters -> objectives, minimised.
        population: survivors of each generation.
        generations: each evaluates at most `population` new points.
        seed: of all randomness.

    Returns:
        Objectives of the last population's non-dominated points, distinct, `f x m`, f <= population.

    Raises:
        ConfigError: a number is out of range.
    """
    if population < 2 or generations < 0:
        raise ConfigError(f"population={population}, generations={generations}; wanted at least 2 and at least 0")
    space, rng = SearchSpace(search_space), np.random.default_rng(seed)

    def values_of(rows: np.ndarray) -> Tensor:
        return torch.tensor([evaluate(space.external(row)) for row in rows], dtype=torch.float64)

    rows = spanning_rows(space, population, rng)
    values = values_of(rows)
    for _ in range(generations):
        children = unseen(breed(space, rows, population, rng), set(map(tuple, rows.tolist())))
        if not len(children):
            continue
        rows, values = np.concatenate([rows, children]), torch.cat([values, values_of(children)])
        kept = survivors(values, population)
        rows, values = rows[kept.numpy()], values[kept]
    return torch.unique(values[pareto_mask(values)], dim=0)


def survivors(values: Tensor, n: int) -> Tensor:
    """Indices of NSGA-II's choice of n out of `k x m` values: front after front, the last one by crowding distance."""
    left = torch.arange(len(values))
    chosen: list[Tensor] = []
    missing = min(n, len(values))
    while missing:
        front = pareto_mask(values[left])
        members = left[front]
        if len(members) > missing:
            members = members[crowding(values[members]).argsort(descending=True, stable=True)[:missing]]
        chosen.append(members)
        missing -= len(members)
        left = left[~front]
    return torch.cat(chosen) if chosen else left


def crowding(values: Tensor) -> Tensor:
    """Crowding distance of `k x m` points of one front: infinite at the ends, shape `k`."""
    distance = torch.zeros(len(values), dtype=torch.float64)
    for column in values.T:
        ordered, order = column.sort(stable=True)
        span = (ordered[-1] - ordered[0]).clamp_min(1e-300)
        distance[order[1:-1]] += (ordered[2:] - ordered[:-2]) / span
        distance[order[[0, -1]]] = torch.inf
    return distance
