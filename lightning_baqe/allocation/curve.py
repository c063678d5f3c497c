"""All efficient allocations between two sums, cost and sensitivity, by dynamic programming.

Group after group, what was efficient so far is combined with each of the group's options, and what another one beats in
both sums is dropped: it stays beaten, whatever is added (Nemhauser and Ullmann, 1969). Integer programs give single
points of this curve; here it comes whole, in less time than a few of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np

from lightning_baqe.allocation.choices import Allocation, Choices, Values
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.config import near

_SAME = 2.0**-44  # of the largest possible sum: what differs by less is equal, so that rounding makes no points


class AllocationFront(Sequence[tuple[float, Allocation]]):
    """``(cost, {layer: bits})`` by rising cost and falling sensitivity; each is made when it is asked for.

    Attributes:
        costs: ``(n,)``, ascending.
        sensitivities: ``(n,)``, descending.
    """

    def __init__(self, choices: Choices, cost: str) -> None:
        self._choices, self._cost = choices, cost
        self.costs, self.sensitivities, self._steps = _efficient(choices.costs[cost], choices.sensitivity)

    def __len__(self) -> int:
        return len(self.costs)

    @overload
    def __getitem__(self, index: int) -> tuple[float, Allocation]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[float, Allocation]]: ...
    def __getitem__(self, index: int | slice) -> tuple[float, Allocation] | list[tuple[float, Allocation]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        found = self._choices.allocation(self._chosen(range(len(self))[index]))
        return found.costs[self._cost], found

    def __iter__(self) -> Iterator[tuple[float, Allocation]]:
        return (self[i] for i in range(len(self)))

    def within(self, limit: float) -> Allocation:
        """The least sensitive of those that cost at most this.

        Raises:
            IndexError: even the first costs more.
        """
        place = int(np.searchsorted(self.costs, limit * (1 + np.sign(limit) * _SAME), side="right")) - 1
        if place < 0:
            raise IndexError(f"limit={limit}, but the smallest {self._cost} is {self.costs[0]}")
        return self[place][1]

    def _chosen(self, place: int) -> list[int]:
        chosen = []
        for step, options in zip(reversed(self._steps), reversed(self._choices.options), strict=True):
            place, option = divmod(int(step[place]), len(options))
            chosen.append(option)
        return chosen[::-1]


def allocate_front(
    sensitivity: Values,
    costs: Mapping[str, Values],
    cost: str = "size_bytes",
    tied: Iterable[Iterable[str]] = (),
    fixed: Mapping[str, int] | None = None,
) -> AllocationFront:
    """Every efficient allocation: none costs less without being more sensitive.

    Sums that differ by less than 6e-14 of the largest possible one count as equal; of equal allocations there is one.

    Args:
        sensitivity, costs, tied, fixed: as for :func:`~lightning_baqe.allocation.program.allocate_bits`.
        cost: the one of ``costs`` that is traded.

    Returns:
        a sequence of ``(cost, {layer: bits})``, smallest cost first.

    Raises:
        ConfigError: as :func:`~lightning_baqe.allocation.program.allocate_bits`, or ``costs`` has no such cost.
    """
    if cost not in costs:
        raise ConfigError(f"cost={cost!r}, but costs has {', '.join(costs) or 'none'}{near(cost, tuple(costs))}")
    return AllocationFront(Choices.of(sensitivity, costs, tied, fixed), cost)


def _efficient(
    costs: Sequence[np.ndarray], values: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Sums that are efficient, and how they came about.

    Returns:
        costs ``(n,)``, values ``(n,)``; for each group, for each sum that was efficient after it, the place of the sum
        before it times the group's options, plus the option.
    """
    grain_cost, grain_value = (max(_SAME * sum(np.abs(v).max() for v in of), 5e-324) for of in (costs, values))
    cost, value = np.zeros(1), np.zeros(1)
    steps = []
    for added_cost, added_value in zip(costs, values, strict=True):
        all_costs, all_values = (cost[:, None] + added_cost).ravel(), (value[:, None] + added_value).ravel()
        order = np.lexsort((all_values, np.round(all_costs / grain_cost)))
        sorted_values = all_values[order]
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], sorted_values[:-1]]))
        kept = order[sorted_values < best_before - grain_value]
        cost, value = all_costs[kept], all_values[kept]
        steps.append(kept)
    return cost, value, steps
