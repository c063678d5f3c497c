"""How sizes above their targets are penalised, update by update (Schaefer et al., eq. 2 and section 4.4.3).

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
from lightning_baqe.quantization.config import MAX_BITS, MIN_BITS

RAMPS = {
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    "exponential": lambda t: math.expm1(5 * t) / math.expm1(5),
}


class Pressure(ABC):
    """What bits pay for their size; one for each size that has a target."""

    @abstractmethod
    def penalty(self, progress: float, bits: Tensor, counts: Tensor, target: float) -> tuple[Tensor, float]:
        """For the next update of the quantizers.

        Args:
            progress: t.
            bits: ``(n,)``, differentiable.
            counts: of values that each number of bits is for, ``(n,)``.
            target: bits of all values together.

        Returns:
            the penalty, ``()``, and its factor.
        """

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` goes on from."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a training was interrupted."""
        assert not state


class RectifiedPressure(Pressure):
    """``beta * max(r - 1, 0)²`` (eq. 2): 0 once the size is within its target."""

    def penalty(self, progress: float, bits: Tensor, counts: Tensor, target: float) -> tuple[Tensor, float]:
        """See :class:`Pressure`."""
        ratio = (bits * counts).sum() / target
        beta = self.beta(progress, float(ratio.detach()))
        return beta * torch.relu(ratio - 1).square(), beta

    @abstractmethod
    def beta(self, progress: float, ratio: float) -> float:
        """For the next update.

        Args:
            progress: t.
            ratio: r, now.
        """


@dataclass
class Ramp(RectifiedPressure):
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
class Controller(RectifiedPressure):
    """Finds beta by itself: sizes follow a path down to the target, and stay on it.

    The path is even in log r, from where learning began to the target at ``share`` of the progress. The logarithm of
    beta is moved by what r is above the path (integral), by how that changes (proportional) and by the change of the
    change (derivative): a PID controller in its velocity form.

    Args:
        share: of the progress, after which the target is to be reached.
        gains: proportional, integral, derivative; of log beta, by log r.
        first: beta at first.

    Raises:
        ConfigError: a share out of range, other than three gains, or beta of 0 or less.
    """

    share: float = 0.7
    gains: tuple[float, ...] = (20.0, 4.0, 0.0)
    first: float = 1.0

    def __post_init__(self) -> None:
        _check_share(self.share)
        self.gains = tuple(self.gains)
        if len(self.gains) != 3 or not self.first > 0:
            raise ConfigError(
                f"gains={self.gains!r} and first={self.first!r}, but three numbers and one above 0 are wanted"
            )
        self._log_beta = math.log(self.first)
        self._start: float | None = None
        self._errors: list[float] = []

    def beta(self, progress: float, ratio: float) -> float:
        """See the class."""
        if self._start is None:
            self._start = max(math.log(ratio), 0.0)
        path = _path(self._start, progress, self.share)
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


@dataclass
class Admm(Pressure):
    """Alternating direction method of multipliers (Boyd et al., 2011, section 3.1), which Schaefer et al. compare with.

    Besides the bits b that training moves there is a copy z that keeps the target, and u, what both have differed by so
    far. At each update z becomes the nearest to b + u that keeps the target, u grows by b - z, and training pays
    ``rho / 2 * sum(c (b - z + u)²) / sum(c)``. The paper's formulation stands in its supplement; this one, with sums
    weighted by what each number of bits is for, is our own. The target is approached on the path of a
    :class:`Controller`: u would otherwise grow as long as bits, which move by steps of one length, are on their way.

    Args:
        rho: factor of the penalty.
        share: of the progress, after which the target is to be reached.

    Raises:
        ConfigError: a number out of range.
    """

    rho: float = 1.0
    share: float = 0.7

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise ConfigError(f"rho={self.rho!r}, but a number above 0 is wanted")
        _check_share(self.share)
        self._dual: list[float] = []
        self._start: float | None = None

    def penalty(self, progress: float, bits: Tensor, counts: Tensor, target: float) -> tuple[Tensor, float]:
        """See :class:`Pressure`."""
        now = bits.detach()
        if self._start is None:
            self._start = max(math.log(float((counts * now).sum()) / target), 0.0)
        target *= math.exp(_path(self._start, progress, self.share))
        dual = torch.tensor(self._dual or [0.0] * len(now), dtype=now.dtype, device=now.device)
        copy = within_target(now + dual, counts, target)
        dual = dual + now - copy
        self._dual = dual.tolist()
        return self.rho / 2 * (counts * (bits - copy + dual).square()).sum() / counts.sum(), self.rho

    def state(self) -> dict[str, Any]:
        """u, and where the path began."""
        return {"dual": list(self._dual), "start": self._start}

    def restore(self, state: dict[str, Any]) -> None:
        """From :meth:`state`."""
        self._dual, self._start = list(state["dual"]), state["start"]


def within_target(bits: Tensor, counts: Tensor, target: float) -> Tensor:
    """The nearest bits of 2 to 8, in squares weighted by counts, that together are at most the target: all are lowered
    by the same number. A target below 2 bits of all gives these.

    Args:
        bits, counts: ``(n,)``.
        target: of ``sum(counts * bits)``.
    """
    low, high = 0.0, MAX_BITS + max(float(bits.max()), 0.0)
    if float((counts * bits.clamp(MIN_BITS, MAX_BITS)).sum()) <= target:
        high = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        keeps = float((counts * (bits - middle).clamp(MIN_BITS, MAX_BITS)).sum()) <= target
        low, high = (low, middle) if keeps else (middle, high)
    return (bits - high).clamp(MIN_BITS, MAX_BITS)


def _path(start: float, progress: float, share: float) -> float:
    """log r, evenly from the start to 0."""
    return start * max(1 - progress / share, 0.0)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ConfigError(f"share={share!r}, but a number above 0, up to 1, is wanted")
