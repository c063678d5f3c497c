"""What samplers are compared on: a space, objectives that answer any of its points, and what an answer costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from optuna.distributions import BaseDistribution

from lightning_baqe.search.knowledge import Knowledge


class Problem(Protocol):
    """A search that can be replayed, without training or measuring.

    Attributes:
        name: for tables.
        distributions: of the parameters, as Optuna knows them.
        objectives: their names; all are minimised.
        reference_point: of the hypervolume, one number an objective.
    """

    name: str
    distributions: Mapping[str, BaseDistribution]
    objectives: tuple[str, ...]
    reference_point: tuple[float, ...]

    def evaluate(self, params: Mapping[str, Any]) -> tuple[float, ...]:
        """The objectives of any point of the space."""

    def candidates(self, n: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Points that span the space: the fixed pool of BAQE III-C."""

    def seconds(self, params: Mapping[str, Any]) -> float:
        """How long one real evaluation takes, proposing apart; 0 where it is no real one."""

    def knowledge(self) -> Knowledge | None:
        """What is known of points before any trial, as far as :meth:`preparation_s` pays for; None: nothing."""

    def preparation_s(self) -> float:
        """How long it takes to learn what is known: measuring kernels, for instance."""
