"""Operators that compute each element by itself; see :mod:`lightning_baqe.integer.nodes`.

Operands of sums and products have the same number of dimensions. As in torch, an operand of size 1 along a dimension
stands for all elements of the other's: one pixel of all channels (squeeze-and-excite), one channel of all pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_baqe.integer.base_nodes import Node, per_channel
from lightning_baqe.integer.dyadic import Dyadic, rounding_shift
from lightning_baqe.quantization.pointwise import Expression, Step


@dataclass(frozen=True, eq=False, kw_only=True)
class Add(Node):
    """Residual sum (HAWQ-V3 eq. 9): ``clip(((a * m_a + b * m_b + offset + half) >> shift) + zero_point)``.

    ``offset`` is ``-(m_a * zero_point_a + m_b * zero_point_b)``. ReLU is the lower end of the output's range.
    """

    multipliers: tuple[int, int]
    shift: int
    offset: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        total = values[0] * self.multipliers[0] + values[1] * self.multipliers[1] + self.offset
        return self.type.clip(rounding_shift(total, self.shift))


@dataclass(frozen=True, eq=False, kw_only=True)
class Mul(Node):
    """Product of two values: ``clip(requant((a - zero_point_a) * (b - zero_point_b)) + zero_point)``, one factor.

    As lowered, both are within 0..255, so that the product fits 17 bits and a sign.
    """

    requant: Dyadic
    input_zero_points: tuple[int, int]

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        product = (values[0] - self.input_zero_points[0]) * (values[1] - self.input_zero_points[1])
        return self.type.clip(self.requant.apply(product))


@dataclass(frozen=True, eq=False, kw_only=True)
class Requantize(Node):
    """Onto another grid: ``clip(requant(q - input_zero_point) + zero_point)``; ``requant`` is one factor."""

    requant: Dyadic
    input_zero_point: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return self.type.clip(self.requant.apply(values[0] - self.input_zero_point))


@dataclass(frozen=True, eq=False, kw_only=True)
class Clip(Node):
    """Clip to the output's range; a ReLU has the zero point as its lower end."""

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0].clamp(*self.type.limits)


@dataclass(frozen=True, eq=False, kw_only=True)
class Table(Node):
    """Any pointwise function of an integer: ``table[q - input_low]``.

    Args:
        table: int64, one entry for each integer of the input's range, within the output's.
        input_low: the input's lowest integer.
        steps: of the expression that it stands for; see :mod:`lightning_baqe.quantization.pointwise`.
    """

    table: torch.Tensor
    input_low: int
    steps: tuple[Step, ...]

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return self.table[values[0] - self.input_low]


@dataclass(frozen=True, eq=False, kw_only=True)
class Affine(Node):
    """A factor and a term by channel (a batch norm that follows no layer):
    ``clip((((q - input_zero_point) * multiplier + offset + half) >> shift) + zero_point)``, in 64 bits.

    Args:
        requant: ``(channels,)`` factors.
        offset: int64, ``(channels,)``, below 2^61 in absolute value, in steps of ``2^-shift`` of the output's grid.
    """

    requant: Dyadic
    offset: torch.Tensor
    input_zero_point: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return self.type.clip(self.requant.apply(values[0] - self.input_zero_point, 1, self.offset))


@dataclass(frozen=True, eq=False, kw_only=True)
class PRelu(Node):
    """Two factors, chosen by the sign of the real value:
    ``clip(requant(q - input_zero_point) + zero_point)``, ``requant`` being ``negative`` below the zero point.

    Args:
        positive, negative: one factor or ``(channels,)`` of any sign; their shifts may differ.
    """

    positive: Dyadic
    negative: Dyadic
    input_zero_point: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        steps = values[0] - self.input_zero_point
        above, below = (
            factors.apply(steps, None if factors.multiplier.ndim == 0 else 1)
            for factors in (self.positive, self.negative)
        )
        return self.type.clip(torch.where(steps < 0, below, above))


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatAdd(Node):
    """Float32 sum of two values and, if ``relu``, a ReLU."""

    relu: bool

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        out = values[0] + values[1]
        return out.relu() if self.relu else out


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatMul(Node):
    """Float32 product of two values."""

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0] * values[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatFunction(Node):
    """A pointwise float32 expression; ``steps`` as in :mod:`lightning_baqe.quantization.pointwise`."""

    steps: tuple[Step, ...]

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return Expression(self.steps)(values[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatAffine(Node):
    """Float32 ``x * gain + shift``, both of shape ``(channels,)``."""

    gain: torch.Tensor
    shift: torch.Tensor

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0] * per_channel(self.gain, values[0]) + per_channel(self.shift, values[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatPRelu(Node):
    """Float32 ``x``, times ``slope`` below 0.

    Args:
        slope: float32, shape ``()`` or ``(channels,)``.
    """

    slope: torch.Tensor

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return torch.where(values[0] < 0, values[0] * per_channel(self.slope, values[0]), values[0])
