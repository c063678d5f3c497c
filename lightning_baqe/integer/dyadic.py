"""Dyadic numbers ``m / 2^s``: how a real factor is applied with one integer multiplication and one shift.

HAWQ-V3 (section III-A, eqs. 6 and 7) replaces every rescaling by a dyadic number. One rounding mode is used everywhere,
in the interpreter and in compiled code: round half up, ``(v * m + 2^(s-1)) >> s`` with an arithmetic shift, computed in
64 bits.

| symbol | meaning | range |
| --- | --- | --- |
| r | the real factor | finite |
| m | multiplier | abs(m) < 2^31 |
| s | shift | 1 .. 62 |

Error bound: with one factor, ``abs(m / 2^s - r) <= 2^-31 * abs(r)`` wherever ``2^-31 <= abs(r) < 2^30``. A vector of
factors shares one shift, chosen for the largest of them: then ``abs(m_i / 2^s - r_i) <= 2^-31 * max(abs(r))``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_baqe.errors import ConfigError

MULTIPLIER_BITS = 31
MIN_SHIFT, MAX_SHIFT = 1, 62


@dataclass(frozen=True, eq=False)
class Dyadic:
    """The factors ``multiplier / 2**shift``.

    Args:
        multiplier: int64 tensor of shape ``()`` (one factor) or ``(channels,)``, below 2^31 in absolute value.
        shift: common right shift, 1 to 62.
    """

    multiplier: torch.Tensor
    shift: int

    def __post_init__(self) -> None:
        if self.multiplier.dtype != torch.int64 or self.multiplier.ndim > 1:
            raise ConfigError(
                f"multiplier must be an int64 tensor of 0 or 1 dimensions, got {self.multiplier.dtype} of shape "
                f"{tuple(self.multiplier.shape)}"
            )
        if not MIN_SHIFT <= self.shift <= MAX_SHIFT:
            raise ConfigError(f"shift must be within {MIN_SHIFT}..{MAX_SHIFT}, got {self.shift}")
        if self.multiplier.numel() and int(self.multiplier.abs().max()) >= 2**MULTIPLIER_BITS:
            raise ConfigError(f"multipliers must be below 2^{MULTIPLIER_BITS} in absolute value")

    @classmethod
    def from_real(cls, factors: torch.Tensor | Sequence[float] | float) -> Dyadic:
        """Nearest dyadic numbers with one common shift (HAWQ-V3 eq. 7).

        Args:
            factors: real factors, shape ``()`` or ``(channels,)``, any sign, below 2^30 in absolute value.

        Raises:
            ConfigError: a factor is not finite or too large for 64-bit arithmetic.
        """
        real = torch.as_tensor(factors, dtype=torch.float64)
        largest = float(real.abs().max()) if real.numel() else 0.0
        if not math.isfinite(largest) or largest >= 2.0 ** (MULTIPLIER_BITS - 1):
            raise ConfigError(f"factors must be finite and below 2^{MULTIPLIER_BITS - 1}, got one of {largest}")
        if largest == 0.0:
            return cls(torch.zeros_like(real, dtype=torch.int64), MIN_SHIFT)
        # largest = f * 2^e with f in [0.5, 1): shift = 31 - e puts the largest multiplier into [2^30, 2^31).
        return cls.rounded(real, max(MULTIPLIER_BITS - math.frexp(largest)[1], MIN_SHIFT))

    @classmethod
    def rounded(cls, real: torch.Tensor, shift: int) -> Dyadic:
        """Nearest dyadic numbers of a shift, or of one less where a multiplier is rounded up to 2^31."""
        shift = min(shift, MAX_SHIFT)
        multiplier = torch.round(real * 2.0**shift).to(torch.int64)
        if int(multiplier.abs().max()) >= 2**MULTIPLIER_BITS:
            return cls.rounded(real, shift - 1)
        return cls(multiplier, shift)

    def real(self) -> torch.Tensor:
        """The factors as float64, same shape as ``multiplier``."""
        return self.multiplier.to(torch.float64) / 2.0**self.shift

    def apply(
        self, values: torch.Tensor, channel_dim: int | None = None, fraction: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``round_half_up(values * factor + fraction / 2^shift)`` in 64-bit integers.

        Args:
            values: integer tensor, below 2^31 in absolute value.
            channel_dim: the dimension of ``values`` that a vector of factors runs along.
            fraction: int64, ``(channels,)``, below 2^31 in absolute value.
        """
        if self.multiplier.ndim == 1 and channel_dim is None:
            raise ConfigError("a vector of factors needs channel_dim")
        shape = [-1 if dim == channel_dim else 1 for dim in range(values.ndim)]
        product = values.to(torch.int64) * self.multiplier.reshape(shape)
        return rounding_shift(product if fraction is None else product + fraction.reshape(shape), self.shift)


def rounding_shift(values: torch.Tensor, shift: int) -> torch.Tensor:
    """``(values + 2^(shift-1)) >> shift`` with an arithmetic shift: division by 2^shift, rounded half up."""
    return (values + (1 << (shift - 1))) >> shift
