"""Pools of candidates: points that span a search space, and children of good points.

| symbol | meaning                                             | shape |
| ------ | --------------------------------------------------- | ----- |
| rows   | candidates as internal values of a `SearchSpace`    | n x d |
| share  | how often a candidate takes each choice of a group  | n x k |
| alpha  | concentration of the Dirichlet law of the shares    |       |
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.space import Key, Rows, SearchSpace

_BINS = 8  # a parameter with too many values to list is drawn from this many equal parts of its range
_ATTEMPTS = 20  # draws of n candidates before a space is taken as used up


def _bins(space: SearchSpace, index: int) -> int:
    levels = space.dimensions[index].levels
    return _BINS if levels is None else len(levels)


def _group_indices(space: SearchSpace, groups: Sequence[Sequence[str]] | None) -> list[list[int]]:
    """Positions of the parameters of each group; those that no group names go with their equals."""
    position = {name: index for index, name in enumerate(space.names)}
    named = [name for group in groups or () for name in group]
    unknown = sorted(set(named) - set(position))
    if unknown or len(set(named)) < len(named):
        raise ConfigError(
            f"groups name {unknown[:5] or 'a parameter twice'}; wanted each name once, out of {list(position)[:5]}..."
        )
    result = [[position[name] for name in group] for group in groups or () if group]
    for group in result:
        if len({_bins(space, index) for index in group}) > 1:
            raise ConfigError(
                f"group {[space.names[index] for index in group][:5]} mixes parameters with "
                f"{sorted({_bins(space, index) for index in group})} choices; wanted the same number in each"
            )
    equals: dict[str, list[int]] = {}
    for name, index in position.items():
        if name not in named:
            equals.setdefault(repr(space.dimensions[index].distribution), []).append(index)
    return result + list(equals.values())


def _draw(space: SearchSpace, groups: list[list[int]], n: int, alpha: float, rng: np.random.Generator) -> Rows:
    u = np.empty((n, len(space.names)))
    for group in groups:
        bins = _bins(space, group[0])
        share = rng.dirichlet(np.full(bins, alpha), size=n)
        edges = np.cumsum(share, axis=1)
        edges[:, -1] = 1.0
        choice = (rng.random((n, len(group), 1)) >= edges[:, None, :]).sum(-1)
        # The middle of a level's own interval; anywhere within a bin.
        within = np.array([[0.5 if space.dimensions[i].levels is not None else np.nan for i in group]])
        within = np.where(np.isnan(within), rng.random(choice.shape), within)
        u[:, group] = (choice + within) / bins
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


def spanning_rows(
    space: SearchSpace,
    n: int,
    rng: np.random.Generator,
    groups: Sequence[Sequence[str]] | None = None,
    alpha: float = 0.5,
) -> Rows:
    """`spanning_pool` as internal values, `k x d` with k <= n."""
    if n < 1 or not alpha > 0:
        raise ConfigError(f"n={n}, alpha={alpha}; wanted n >= 1 and alpha > 0")
    if space.cardinality <= 4 * n:
        levels = [dimension.levels for dimension in space.dimensions if dimension.levels is not None]
        grid = np.array(list(itertools.product(*levels)), dtype=np.float64)
        return grid[rng.permutation(len(grid))[:n]]
    indices = _group_indices(space, groups)
    rows = np.empty((0, len(space.names)))
    for attempt in range(_ATTEMPTS):
        # Shares first; should they keep giving the same points, uniform draws fill the rest.
        law = alpha if attempt < _ATTEMPTS // 2 else 1e3
        rows = unseen(np.concatenate([rows, _draw(space, indices, n, law, rng)]), set())[:n]
        if len(rows) == n:
            break
    return rows


def spanning_pool(
    search_space: Mapping[str, BaseDistribution],
    n: int,
    rng: np.random.Generator,
    groups: Sequence[Sequence[str]] | None = None,
    alpha: float = 0.5,
) -> list[dict[str, Any]]:
    """Draw different candidates that span a space, as the 500 of BAQE III-C are meant to.

    Independent uniform draws over many parameters all have nearly the same share of each choice (all networks about
    six bits on average). Here the shares vary from one candidate to the next: per candidate and group of parameters
    they come from a Dirichlet law, and each parameter is drawn from them, so that candidates with nearly one choice
    everywhere are among them.

    Args:
        search_space: name -> Optuna distribution. A parameter with more than 64 values is split into 8 equal parts.
        n: how many.
        rng: source of all randomness.
        groups: names that share their shares; by default the parameters with equal distributions. Names that are in
            no group are grouped by default.
        alpha: concentration; below 1 most candidates prefer few choices.

    Returns:
        n different parameter dicts; all points of the space in random order where it has fewer than n.

    Raises:
        ConfigError: n or alpha out of range, a group names an unknown parameter, or mixes numbers of choices.
    """
    space = SearchSpace(search_space)
    return [space.external(row) for row in spanning_rows(space, n, rng, groups, alpha)]


def breed(space: SearchSpace, parents: Rows, n: int, rng: np.random.Generator) -> Rows:
    """Children of good points: uniform crossover of two parents, then mutation.

    Each child takes every parameter from one of two random parents and redraws each with probability 1 / d, at
    least one of them: half of the time to a neighbouring level where there is an order, else anywhere.

    Args:
        space: where the points live.
        parents: `p x d` internal values, p >= 1.
        n: how many children.
        rng: source of all randomness.

    Returns:
        `n x d` internal values, possibly repeated.
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
