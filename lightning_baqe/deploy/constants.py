"""The constant arguments of a network's kernels: packed weights, biases, numbers of requantization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

Maker = Callable[[], np.ndarray]


class Constants(Mapping[str, np.ndarray]):
    """Arrays by name, each made when it is first asked for: whoever wants a plan's specs alone packs no weights.

    Args:
        makers: ``{name: what makes the array}``.
    """

    def __init__(self, makers: Mapping[str, Maker]) -> None:
        self._makers = dict(makers)
        self.made: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.made:
            self.made[name] = np.ascontiguousarray(self._makers[name]())
        return self.made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
