"""Optuna search spaces as numbers: internal values, and columns in the unit interval for kernels.

| symbol | meaning                                                                       | shape |
| ------ | ----------------------------------------------------------------------------- | ----- |
| d      | parameters of the space                                                       |       |
| D      | encoded columns: one per parameter, one per choice of a non-numeric parameter |       |
| rows   | internal values (Optuna's: a number, or the index of a choice)                | n x d |
| x      | encoded points                                                                | n x D |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor

from lightning_baqe.errors import ConfigError

Distributions = Mapping[str, BaseDistribution]  # by the parameters' names
Rows = npt.NDArray[np.float64]
Key = tuple[float, ...]

_MAX_LEVELS = 64  # a parameter with more values is drawn from bins


def _levels(distribution: BaseDistribution) -> Rows | None:
    """All internal values, ascending, of a parameter that has at most 64 of them; None for any other."""
    if isinstance(distribution, CategoricalDistribution):
        return np.arange(len(distribution.choices), dtype=np.float64)
    if isinstance(distribution, IntDistribution | FloatDistribution) and distribution.step is not None:
        n = round((distribution.high - distribution.low) / distribution.step) + 1
        if n <= _MAX_LEVELS:
            values = distribution.low + np.arange(n, dtype=np.float64) * distribution.step
            return np.minimum(values, distribution.high)
    return None


def _ranks(choices: Sequence[Any]) -> Rows | None:
    """rank / (k - 1) of each choice where all are finite numbers; None where a choice is something else."""
    if not all(isinstance(choice, int | float) and math.isfinite(choice) for choice in choices):
        return None
    ascending = sorted(set(choices))
    return np.array([ascending.index(choice) / max(len(ascending) - 1, 1) for choice in choices], dtype=np.float64)


class _Dimension:
    """One parameter: its levels, its columns, and the way from the unit interval back."""

    def __init__(self, name: str, distribution: BaseDistribution) -> None:
        if not isinstance(distribution, IntDistribution | FloatDistribution | CategoricalDistribution):
            raise ConfigError(f"{name}: {distribution!r}; wanted an Int-, Float- or CategoricalDistribution of Optuna")
        self.name, self.distribution, self.levels = name, distribution, _levels(distribution)
        choices = distribution.choices if isinstance(distribution, CategoricalDistribution) else ()
        self.ranks = _ranks(choices) if choices else None
        self.is_one_hot = bool(choices) and self.ranks is None
        self.width = len(choices) if self.is_one_hot else 1  # number of columns

    def contains(self, value: Any) -> bool:
        if isinstance(self.distribution, CategoricalDistribution):
            return value in self.distribution.choices
        return isinstance(value, int | float) and self.distribution.low <= value <= self.distribution.high

    def columns(self, internal: Rows) -> Rows:
        """`n` internal values -> `n x c` columns in [0, 1], on a log scale where the distribution has one."""
        if self.ranks is not None:
            return self.ranks[internal.astype(np.int64)][:, None]
        if self.is_one_hot:
            # Scaled so that two different choices lie at distance 1, as the ends of a numeric parameter do.
            return np.eye(self.width)[internal.astype(np.int64)] / math.sqrt(2)
        distribution = cast("IntDistribution | FloatDistribution", self.distribution)
        low, high = float(distribution.low), float(distribution.high)
        if low == high:
            return np.zeros((len(internal), 1))
        if distribution.log:
            return np.asarray(np.log(internal / low) / math.log(high / low))[:, None]
        return np.asarray((internal - low) / (high - low))[:, None]

    def from_unit(self, u: Rows) -> Rows:
        """Numbers in [0, 1) -> internal values; uniform in, uniform (or log-uniform) out."""
        if self.levels is not None and not getattr(self.distribution, "log", False):
            return self.levels[np.minimum((u * len(self.levels)).astype(np.int64), len(self.levels) - 1)]
        distribution = cast("IntDistribution | FloatDistribution", self.distribution)
        low, high = float(distribution.low), float(distribution.high)
        # A whole number owns the half step on both of its sides, as in Optuna's own samplers.
        half = 0.5 * float(distribution.step) if distribution.step is not None else 0.0
        if distribution.log:
            value = np.exp(math.log(low - half) + u * (math.log(high + half) - math.log(low - half)))
        else:
            value = (low - half) + u * (high - low + 2 * half)
        if distribution.step is not None:
            value = low + np.round((value - low) / distribution.step) * distribution.step
        return np.clip(value, low, high)


class SearchSpace:
    """A fixed set of named parameters.

    Args:
        distributions: name -> Optuna distribution; names are kept in sorted order.

    Raises:
        ConfigError: the space is empty or holds something that is no Optuna distribution.
    """

    def __init__(self, distributions: Distributions) -> None:
        if not distributions:
            raise ConfigError("search_space is empty; wanted at least one parameter: {name: distribution}")
        self.dimensions = tuple(_Dimension(name, distributions[name]) for name in sorted(distributions))
        self.names = tuple(dimension.name for dimension in self.dimensions)

    @property
    def signature(self) -> tuple[tuple[str, str], ...]:
        """Names and distributions as text; equal for equal spaces."""
        return tuple((dimension.name, repr(dimension.distribution)) for dimension in self.dimensions)

    @property
    def cardinality(self) -> float:
        """Number of different points; infinite where a parameter has too many values to list."""
        return math.prod(math.inf if d.levels is None else len(d.levels) for d in self.dimensions)

    def internal(self, params: Mapping[str, Any]) -> Key:
        """Parameter values -> internal values, in the order of `names`; other names in params are left aside.

        Raises:
            ConfigError: a name is missing, or its value lies outside its distribution.
        """
        missing = [name for name in self.names if name not in params]
        if missing:
            raise ConfigError(f"a point has no value for {missing[:5]}; wanted one for each of {len(self.names)} names")
        for dimension in self.dimensions:
            if not dimension.contains(params[dimension.name]):
                raise ConfigError(
                    f"{dimension.name}={params[dimension.name]!r}; wanted a value of {dimension.distribution!r}"
                )
        return tuple(float(d.distribution.to_internal_repr(params[d.name])) for d in self.dimensions)

    def holds(self, params: Mapping[str, Any]) -> bool:
        """Whether params gives every parameter of the space a value within its distribution."""
        return all(d.name in params and d.contains(params[d.name]) for d in self.dimensions)

    def external(self, row: Sequence[float] | Rows) -> dict[str, Any]:
        """Internal values -> parameter values as Optuna hands them to an objective."""
        pairs = zip(self.dimensions, row, strict=True)
        return {dimension.name: dimension.distribution.to_external_repr(float(value)) for dimension, value in pairs}

    def encode(self, rows: Rows) -> Tensor:
        """Internal values `n x d` -> columns in [0, 1] `n x D`, float64."""
        rows = np.asarray(rows, dtype=np.float64).reshape(-1, len(self.names))
        return torch.from_numpy(np.concatenate([d.columns(rows[:, i]) for i, d in enumerate(self.dimensions)], axis=1))

    def columns(self, indices: Sequence[int]) -> list[int]:
        """Encoded columns of the parameters at these positions."""
        ends = np.cumsum([dimension.width for dimension in self.dimensions]).tolist()
        return [c for index in indices for c in range(ends[index] - self.dimensions[index].width, ends[index])]

    def equals(self, indices: Iterable[int]) -> list[list[int]]:
        """Positions, those of parameters with equal distributions together."""
        groups: dict[str, list[int]] = {}
        for index in indices:
            groups.setdefault(repr(self.dimensions[index].distribution), []).append(index)
        return list(groups.values())

    def subspace(self, indices: Sequence[int]) -> SearchSpace:
        """The space of the parameters at these positions, in the same order."""
        return SearchSpace({self.names[index]: self.dimensions[index].distribution for index in sorted(indices)})

    def from_unit(self, u: Rows) -> Rows:
        """Points of the unit cube `n x d` -> internal values `n x d`."""
        return np.stack([d.from_unit(u[:, i]) for i, d in enumerate(self.dimensions)], axis=1)


def encode(search_space: Distributions, points: Sequence[Mapping[str, Any]]) -> Tensor:
    """Encode parameter dicts for kernels.

    Numbers go linearly (or logarithmically, where the distribution is) to [0, 1]; a categorical parameter whose
    choices are all numbers goes to rank / (k - 1); any other becomes one column per choice, scaled so that two
    choices lie at distance 1. Columns follow the sorted names.

    Args:
        search_space: name -> Optuna distribution.
        points: n dicts with a value for each name.

    Returns:
        `n x D`, float64.

    Raises:
        ConfigError: a name is missing, or a value lies outside its distribution.
    """
    space = SearchSpace(search_space)
    return space.encode(np.array([space.internal(point) for point in points], dtype=np.float64))
