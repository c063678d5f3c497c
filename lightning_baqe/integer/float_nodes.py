"""The operators of layers that stay float, and of what stands between them; see :mod:`lightning_baqe.integer.nodes`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from lightning_baqe.integer.node import Node, per_channel, window_sums
from lightning_baqe.quantization.pointwise import Pointwise


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatConv(Node):
    """Float32 convolution with bias and, if ``relu``, a ReLU; fields as :class:`Conv`."""

    kind = "float_conv"
    is_float = True
    layer: str
    weight: torch.Tensor
    bias: torch.Tensor
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    relu: bool

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        top, bottom, left, right = self.padding
        padded = functional.pad(values[0], (left, right, top, bottom))
        out = functional.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        return out.relu() if self.relu else out


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatLinear(Node):
    """Float32 matrix product; weight ``(out, in)``."""

    kind = "float_linear"
    is_float = True
    layer: str
    weight: torch.Tensor
    bias: torch.Tensor
    relu: bool

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        out = functional.linear(values[0], self.weight, self.bias)
        return out.relu() if self.relu else out


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatAdd(Node):
    """Float32 sum of two values and, if ``relu``, a ReLU."""

    kind = "float_add"
    is_float = True
    relu: bool

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        out = values[0] + values[1]
        return out.relu() if self.relu else out


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatFunction(Node):
    """A pointwise float32 function by name, with its parameters; see :mod:`lightning_baqe.quantization.pointwise`."""

    kind = "float_function"
    is_float = True
    function: str
    parameters: tuple[float, ...]

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return Pointwise(self.function, self.parameters)(values[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatAffine(Node):
    """Float32 ``x * gain + shift``, both of shape ``(channels,)``."""

    kind = "float_affine"
    is_float = True
    gain: torch.Tensor
    shift: torch.Tensor

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0] * per_channel(self.gain, values[0]) + per_channel(self.shift, values[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatMul(Node):
    """Float32 product of two values; the second has the first's shape, or ``(channels, 1, 1)``."""

    kind = "float_mul"
    is_float = True

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0] * values[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatAvgPool(Node):
    """Float32 average pooling, ``sum * factor`` over each window as in :class:`AvgPool`.

    Args:
        rows, columns: as in :class:`AvgPool`.
        factors: float32, shape ``()`` or ``(out_height * out_width,)``.
    """

    kind = "float_avg_pool"
    is_float = True
    rows: torch.Tensor
    columns: torch.Tensor
    factors: torch.Tensor

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        total = window_sums(values[0], self.rows, self.columns)
        return (total.flatten(2) * self.factors).reshape(total.shape)
