"""Gradients through rounding that know how far a value was rounded (Schaefer et al., section 3.2).

| symbol | meaning |
| --- | --- |
| x | a value over its step size |
| e | x - round(x), within -0.5..0.5 |
| g | the gradient that arrives behind the rounding |
| delta | how strongly it is scaled |
| alpha | steepness; the paper's supplement alone has its value, so it is an option |

The straight-through estimator lets g pass as it is. The others pull values towards the grid or away from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_baqe.errors import ConfigError

DELTA = 5e-3  # section 4.2
_Scale = Callable[[Tensor, Tensor, float], Tensor]  # of g, e and alpha: (scale - 1) / delta

SCALES: dict[str, _Scale] = {
    "ste": lambda g, e, alpha: torch.zeros_like(e),
    "pbgs": lambda g, e, alpha: e.abs(),  # Kim et al., 2020
    "ewgs": lambda g, e, alpha: g.sign() * e,  # Lee et al., 2021
    "acos": lambda g, e, alpha: (math.pi * e).sin(),  # Nguyen et al., 2020
    "tanh": lambda g, e, alpha: g.sign() * (alpha * e).tanh(),
    "invtanh": lambda g, e, alpha: g.sign() * (alpha * e).atanh(),
}


class GradientScaling(NamedTuple):
    """One of :data:`SCALES`, with its strength.

    Attributes:
        kind: its name.
        delta: 0 or more.
        alpha: of ``tanh`` and ``invtanh``; below 2 for the latter.
    """

    kind: str = "ste"
    delta: float = DELTA
    alpha: float = 1.8

    def scaled(self, gradient: Tensor, ratio: Tensor) -> Tensor:
        """The gradient before the rounding.

        Args:
            gradient: behind it, any shape.
            ratio: what was rounded, of the same shape.
        """
        if self.kind == "ste":
            return gradient
        return gradient * (1 + self.delta * SCALES[self.kind](gradient, ratio - ratio.round(), self.alpha))


STRAIGHT = GradientScaling()


def gradient_scaling(kind: str, delta: float = DELTA, alpha: float = GradientScaling().alpha) -> GradientScaling:
    """A scaling whose arguments were checked.

    Raises:
        ConfigError: an unknown kind, or a number out of range.
    """
    if kind not in SCALES:
        raise ConfigError(f"gradient scaling {kind!r} is unknown; wanted is one of {', '.join(SCALES)}")
    if not delta >= 0:
        raise ConfigError(f"gradient scaling has delta={delta!r}, wanted is a number of 0 or more")
    if not 0 < alpha < (2 if kind == "invtanh" else math.inf):
        raise ConfigError(f"gradient scaling {kind!r} has alpha={alpha!r}, wanted is above 0, and below 2 for invtanh")
    return GradientScaling(kind, delta, alpha)
