"""What is known of points before they are tried. Not in the paper: BAQE learns every objective from trials alone.

Size follows from the bits, exactly. Latency is nearly the sum of the latencies of a network's kernels, each of which is
measured once in milliseconds, and no trial is needed to find each kernel's best schedule. Accuracy does not depend on
schedules, and any sensitivity of the layers says something about it. All of that are sums over parameters' choices.

| symbol | meaning                                                     | shape |
| ------ | ----------------------------------------------------------- | ----- |
| rows   | points as internal values of a `SearchSpace`                | n x d |
| E      | sums, one column an objective; NaN where nothing is known   | n x m |
| N      | different values in the groups beyond the first of each     | n x m |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from optuna.distributions import CategoricalDistribution
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.space import Rows, SearchSpace

Positions = npt.NDArray[np.int64]
Group = tuple[tuple[str, ...], tuple[Any, ...]]  # parameters, and values that stand beside theirs
Kind = Literal["exact", "estimate", "score"]


@dataclass(frozen=True)
class Sum:
    """An objective as a constant plus one term for each parameter's choice.

    Attributes:
        terms: parameter -> choice -> term; parameters without terms add nothing.
        offset: the constant.
        kind: "exact": the sum is the objective. "estimate": it is in the objective's unit, and trials correct its
            factor and offset a little. "score": it only tends to grow with the objective, in any unit.
        rest: parameters that the difference between objective and sum depends on; none: it is noise.
        groups: parameters whose choices had better be equal, with values that they had better be equal to as well: each
            different value of a group beyond the first one costs about the same. Layers that read one tensor are such
            a group: each bit-width but one is a conversion.
        step: what one such value is taken to add before trials tell, in the objective's unit.
    """

    terms: Mapping[str, Mapping[Any, float]]
    offset: float = 0.0
    kind: Kind = "estimate"
    rest: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()
    step: float = 0.0


@dataclass(frozen=True)
class Knowledge:
    """What a host of a search knows, in the study's units and orientation.

    Attributes:
        objectives: one entry an objective of the study; None where nothing is known.
        best: parameter -> choice -> values that other parameters should then have, such as a kernel's knobs at a
            bit-width. They are never searched.
        fixed: values that parameters should always have.
    """

    objectives: Sequence[Sum | None]
    best: Mapping[str, Mapping[Any, Mapping[str, Any]]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON can hold it, for :meth:`from_record`; choices, which may be numbers, stand in pairs."""
        objectives = [entry and {**vars(entry), "terms": _pairs(entry.terms)} for entry in self.objectives]
        return {"objectives": objectives, "best": _pairs(self.best), "fixed": dict(self.fixed)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Knowledge:
        """What a record holds; one that was made before there were groups has none."""
        objectives = [entry and _sum_of(entry) for entry in record["objectives"]]
        return cls(objectives, _unpaired(record["best"]), record["fixed"])


def _sum_of(record: Mapping[str, Any]) -> Sum:
    groups = tuple((tuple(names), tuple(beside)) for names, beside in record.get("groups", ()))
    return Sum(**{**record, "terms": _unpaired(record["terms"]), "rest": tuple(record["rest"]), "groups": groups})


def _pairs(table: Mapping[str, Mapping[Any, Any]]) -> dict[str, list[list[Any]]]:
    return {name: [[choice, value] for choice, value in choices.items()] for name, choices in table.items()}


def _unpaired(table: Mapping[str, Sequence[Sequence[Any]]]) -> dict[str, dict[Any, Any]]:
    return {name: {choice: value for choice, value in pairs} for name, pairs in table.items()}


class BoundKnowledge:
    """Knowledge about one search space, on rows.

    Args:
        knowledge: parameters that the space lacks may have one choice, and count as a constant.
        space: of the rows.

    Attributes:
        free: positions of the parameters that are searched: all but those that others decide on.

    Raises:
        ConfigError: a parameter with several choices is not in the space, has other choices there or is no categorical
            one, or is decided on twice.
    """

    def __init__(self, knowledge: Knowledge, space: SearchSpace) -> None:
        self.knowledge, self.space = knowledge, space
        self._position = {name: index for index, name in enumerate(space.names)}
        self._sums = [None if entry is None else self._tables(entry) for entry in knowledge.objectives]
        self._groups = [
            [self._group(*group) for group in entry.groups] if entry else [] for entry in knowledge.objectives
        ]
        self._fixed = [
            (self._position[name], self._internal(name, value))
            for name, value in knowledge.fixed.items()
            if name in self._position
        ]
        self._best = [table for name, choices in knowledge.best.items() for table in self._followers(name, choices)]
        decided = {index for index, _ in self._fixed} | {index for _, index, _ in self._best}
        self.free = [index for index in range(len(space.names)) if index not in decided]
        if not self.free:
            raise ConfigError("every parameter of the space is decided on by another; wanted some to search")

    def _internal(self, name: str, value: Any) -> float:
        dimension = self.space.dimensions[self._position[name]]
        if not dimension.contains(value):
            raise ConfigError(f"{name}={value!r} is known, but its distribution is {dimension.distribution!r}")
        return float(dimension.distribution.to_internal_repr(value))

    def _choices(self, name: str, what: str) -> tuple[Any, ...]:
        distribution = self.space.dimensions[self._position[name]].distribution
        if not isinstance(distribution, CategoricalDistribution):
            raise ConfigError(f"{what} {name}, which wants categorical choices, got {distribution!r}")
        return distribution.choices

    def _table(self, name: str, values: Mapping[Any, float]) -> Rows:
        """One number for each choice, by its index; NaN for choices of which nothing is said."""
        choices = self._choices(name, "terms name")
        unknown = [choice for choice in values if choice not in choices]
        if unknown:
            raise ConfigError(f"{name} has no choice {unknown}; its choices are {list(choices)}")
        return np.array([values.get(choice, np.nan) for choice in choices], dtype=np.float64)

    def _tables(self, entry: Sum) -> tuple[float, list[tuple[int, Rows]]]:
        offset, tables = entry.offset, []
        for name, choices in entry.terms.items():
            if name in self._position:
                tables.append((self._position[name], self._table(name, choices)))
            elif len(choices) == 1:
                offset += next(iter(choices.values()))
            else:
                raise ConfigError(f"terms name {name!r} with {len(choices)} choices, which the space does not have")
        return offset, tables

    def _group(self, names: tuple[str, ...], beside: tuple[Any, ...]) -> tuple[dict[int, Positions], int, int]:
        """By a parameter's position a table from its choices to places of values; how many values are beside, and all.

        The values beside come first. A parameter that the space lacks adds nothing.
        """
        values = list(dict.fromkeys(beside))
        n_beside, tables = len(values), {}
        for name in names:
            if name in self._position:
                choices = self._choices(name, "a group names")
                values += [choice for choice in choices if choice not in values]
                tables[self._position[name]] = np.array([values.index(choice) for choice in choices])
        return tables, n_beside, len(values)

    def _followers(self, name: str, choices: Mapping[Any, Mapping[str, Any]]) -> list[tuple[int, int, Rows]]:
        followers = sorted({other for values in choices.values() for other in values if other in self._position})
        if name not in self._position:
            if len(choices) != 1:
                raise ConfigError(f"best values follow {name!r}, which the space does not have")
            values = next(iter(choices.values()))
            self._fixed += [(self._position[other], self._internal(other, values[other])) for other in followers]
            return []
        known = {
            other: {choice: self._internal(other, at[other]) for choice, at in choices.items() if other in at}
            for other in followers
        }
        leader = self._position[name]
        return [(leader, self._position[other], self._table(name, values)) for other, values in known.items()]

    def estimates(self, rows: Rows) -> Tensor:
        """`n x m`, float64: the sums; NaN where an objective or a choice is not known."""
        result = np.full((len(rows), len(self._sums)), np.nan)
        for column, entry in enumerate(self._sums):
            if entry is not None:
                offset, tables = entry
                result[:, column] = offset
                for index, table in tables:
                    result[:, column] += table[rows[:, index].astype(np.int64)]
        return torch.from_numpy(result)

    def counts(self, rows: Rows) -> Tensor:
        """`n x m`, float64: how many different values the groups of each objective have, beyond one a group."""
        result = np.zeros((len(rows), len(self._groups)))
        for column, groups in enumerate(self._groups):
            for tables, n_beside, n in groups:
                present = np.zeros((len(rows), n), dtype=bool)
                present[:, :n_beside] = True
                for index, table in tables.items():
                    present[np.arange(len(rows)), table[rows[:, index].astype(np.int64)]] = True
                result[:, column] += np.maximum(present.sum(1) - 1, 0)
        return torch.from_numpy(result)

    def improved(self, rows: Rows) -> Rows:
        """The same points with every parameter that others decide on at its best; those without a best value stay."""
        result = np.array(rows, dtype=np.float64)
        for index, value in self._fixed:
            result[:, index] = value
        for leader, follower, table in self._best:
            values = table[result[:, leader].astype(np.int64)]
            result[:, follower] = np.where(np.isnan(values), result[:, follower], values)
        return result

    def uniform(self) -> Rows:
        """Points with the same choice everywhere, for each choice: of the free parameters with equal distributions."""
        longest = max(self.space.equals(self.free), key=len)
        levels = self.space.dimensions[longest[0]].levels
        if levels is None:
            return np.empty((0, len(self.space.names)))
        middle = [0.0 if d.levels is None else d.levels[len(d.levels) // 2] for d in self.space.dimensions]
        rows = np.tile(np.array(middle), (len(levels), 1))
        rows[:, longest] = levels[:, None]
        return self.improved(rows)
