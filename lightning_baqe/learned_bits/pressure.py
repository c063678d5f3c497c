"""How strongly sizes above their targets are penalised, update by update: beta of Schaefer et al., eq. 2.

| symbol | meaning |
| --- | --- |
| t | progress of learning bits, 0 to 1 |
| r | a size over its target |
| beta | factor of ``max(r - 1, 0)²`` in the loss |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_baqe.errors import ConfigError

RAMPS = {
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    "exponential": lambda t: math.expm1(5 * t) / math.expm1(5),
}


def size_penalty(sizes: list[tuple[Tensor, float]], beta: list[float]) -> Tensor:
    """``beta * max(r - 1, 0)²``, summed; 0 once a size is within its target.

    Args:
        sizes: ``(size, target)`` of weights and of activations, in the same unit.
        beta: of each.
    """
    over = [torch.relu(size / target - 1) for size, target in sizes]
    return torch.stack([factor * excess.square() for factor, excess in zip(beta, over, strict=True)]).sum()


class Pressure(ABC):
    """What beta is; one for each size that has a target."""

    @abstractmethod
    def beta(self, progress: float, ratio: float) -> float:
        """For the next update.

        Args:
            progress: t.
            ratio: r, now.
        """

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` goes on from."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a training was interrupted."""
        assert not state


@dataclass
class Ramp(Pressure):
    """The paper's: beta rises to its final value, and stays there.

    Args:
        final: beta in the end.
        kind: ``"linear"``, ``"cosine"`` or ``"exponential"``.
        share: of the progress, after which it is reached.

    Raises:
        ConfigError: an unknown kind, or numbers out of range.
    """

    final: float = 100.0
    kind: str = "linear"
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in RAMPS:
            raise ConfigError(f"ramp {self.kind!r} is unknown; wanted is one of {', '.join(RAMPS)}")
        _check_share(self.share)
        if not self.final > 0:
            raise ConfigError(f"beta={self.final!r}, but a number above 0 is wanted")

    def beta(self, progress: float, ratio: float) -> float:
        """See the class."""
        return self.final * RAMPS[self.kind](min(progress / self.share, 1.0))


@dataclass
class Controller(Pressure):
    """Finds beta by itself: sizes follow a path down to the target, and stay on it.

    The path is even in log r, from where learning began to the target at ``share`` of the progress. The logarithm of
    beta is moved by what r is above the path (integral), by how that changes (proportional) and by the change of the
    change (derivative): a PID controller in its velocity form.

    Args:
        share: of the progress, after which the target is to be reached.
        gains: proportional, integral, derivative; of log beta, by log r.
        first: beta at first.

    Raises:
        ConfigError: a share out of range.
    """

    share: float = 0.7
    gains: tuple[float, ...] = (20.0, 4.0, 0.0)
    first: float = 1.0

    def __post_init__(self) -> None:
        _check_share(self.share)
        self.gains = tuple(self.gains)
        self._log_beta = math.log(self.first)
        self._start: float | None = None
        self._errors: list[float] = []

    def beta(self, progress: float, ratio: float) -> float:
        """See the class."""
        if self._start is None:
            self._start = max(math.log(ratio), 0.0)
        path = self._start * max(1 - progress / self.share, 0.0)
        self._errors = [*self._errors, math.log(ratio) - path][-3:]
        last, before, earlier = (*reversed(self._errors), *[self._errors[0]] * 2)[:3]
        proportional, integral, derivative = self.gains
        self._log_beta += proportional * (last - before) + integral * last + derivative * (last - 2 * before + earlier)
        self._log_beta = min(max(self._log_beta, -20.0), 30.0)
        return math.exp(self._log_beta)

    def state(self) -> dict[str, Any]:
        """Of the controller."""
        return {"log_beta": self._log_beta, "start": self._start, "errors": list(self._errors)}

    def restore(self, state: dict[str, Any]) -> None:
        """From :meth:`state`."""
        self._log_beta, self._start, self._errors = state["log_beta"], state["start"], list(state["errors"])


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ConfigError(f"share={share!r}, but a number above 0, up to 1, is wanted")
