"""Pools of candidates: points that span a search space, and children of good points.

| symbol | meaning                                             | shape |
| ------ | --------------------------------------------------- | ----- |
| rows   | candidates as internal values of a `SearchSpace`    | n x d |
| share  | how often a candidate takes each choice of a group  | n x k |
| alpha  | concentration of the Dirichlet law of the shares    |       |
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.space import Distributions, Key, Rows, SearchSpace

_BINS = 8  # a parameter with too many values to list is drawn from this many equal parts of its range
_ATTEMPTS = 20  # draws of n candidates before a space is taken as used up


def _draw(space: SearchSpace, n: int, alpha: float, rng: np.random.Generator) -> Rows:
    u = np.empty((n, len(space.names)))
    for group in space.equals(range(len(space.names))):
        levels = space.dimensions[group[0]].levels
        bins = _BINS if levels is None else len(levels)
        share = rng.dirichlet(np.full(bins, alpha), size=n)
        edges = np.cumsum(share, axis=1)
        edges[:, -1] = 1.0
        choice = (rng.random((n, len(group), 1)) >= edges[:, None, :]).sum(-1)
        within = rng.random(choice.shape)
        # The middle of a level's own interval; anywhere within a bin.
        u[:, group] = (choice + (within if levels is None else 0.5)) / bins
    return space.from_unit(u)


def unseen(rows: Rows, seen: set[Key]) -> Rows:
    """Drop the rows whose key is in `seen`, and repeated rows; the order stays."""
    taken = set(seen)
    keep = []
    for index, key in enumerate(map(tuple, rows.tolist())):
        if key not in taken:
            taken.add(key)
            keep.append(index)
    return rows[keep]


def spanning_rows(space: SearchSpace, n: int, rng: np.random.Generator, alpha: float = 0.5) -> Rows:
    """`spanning_pool` as internal values, `k x d` with k <= n."""
    if n < 1 or not alpha > 0:
        raise ConfigError(f"n={n}, alpha={alpha}; wanted n >= 1 and alpha > 0")
    if space.cardinality <= 4 * n:
        levels = [dimension.levels for dimension in space.dimensions if dimension.levels is not None]
        grid = np.array(list(itertools.product(*levels)), dtype=np.float64)
        return grid[rng.permutation(len(grid))[:n]]
    rows = np.empty((0, len(space.names)))
    for attempt in range(_ATTEMPTS):
        # Shares first; should they keep giving the same points, uniform draws fill the rest.
        law = alpha if attempt < _ATTEMPTS // 2 else 1e3
        rows = unseen(np.concatenate([rows, _draw(space, n, law, rng)]), set())[:n]
        if len(rows) == n:
            break
    return rows


def spanning_pool(search_space: Distributions, n: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Draw different candidates that span a space, as the 500 of BAQE III-C are meant to.

    Independent uniform draws over many parameters all have nearly the same share of each choice (all networks about
    six bits on average). Here the shares vary from one candidate to the next: per candidate and group of parameters
    with equal distributions they come from a Dirichlet law, by which most candidates prefer few choices, and each
    parameter is drawn from them, so that candidates with nearly one choice everywhere are among them.

    Args:
        search_space: name -> Optuna distribution. A parameter with more than 64 values is split into 8 equal parts.
        n: how many.
        rng: source of all randomness.

    Returns:
        n different parameter dicts; all points of the space in random order where it has fewer than n.

    Raises:
        ConfigError: n is below 1.
    """
    space = SearchSpace(search_space)
    return [space.external(row) for row in spanning_rows(space, n, rng)]


def breed(space: SearchSpace, parents: Rows, n: int, rng: np.random.Generator) -> Rows:
    """n children, possibly repeated, of `p x d` good points, p >= 1: uniform crossover of two parents, then mutation.

    Each child takes every parameter from one of two random parents and redraws each with probability 1 / d, at
    least one of them: half of the time to a neighbouring level where there is an order, else anywhere.
    """
    d = len(space.names)
    first, second = parents[rng.integers(len(parents), size=n)], parents[rng.integers(len(parents), size=n)]
    children = np.where(rng.random((n, d)) < 0.5, first, second)
    mutate = rng.random((n, d)) < 1 / d
    mutate[np.arange(n), rng.integers(d, size=n)] = True
    fresh = space.from_unit(rng.random((n, d)))
    near = rng.random((n, d)) < 0.5
    direction = np.where(rng.random((n, d)) < 0.5, -1, 1)
    for index, dimension in enumerate(space.dimensions):
        if dimension.levels is None or dimension.is_one_hot:
            continue
        order = np.argsort(dimension.ranks) if dimension.ranks is not None else np.arange(len(dimension.levels))
        ordered = dimension.levels[order]
        place = np.argmin(np.abs(ordered[None, :] - children[:, index, None]), axis=1)
        step = ordered[np.clip(place + direction[:, index], 0, len(ordered) - 1)]
        fresh[:, index] = np.where(near[:, index], step, fresh[:, index])
    return np.where(mutate, fresh, children)
