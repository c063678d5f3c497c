"""Layers with weights; see :mod:`lightning_baqe.integer.nodes`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch.nn import functional

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer.base_nodes import Node, per_channel
from lightning_baqe.integer.dyadic import Dyadic

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer(Node):
    """An integer layer: ``acc = sum(weight * q) + bias`` in int32.

    With ``requant`` the output is ``clip(requant(acc) + zero_point)``, without it the accumulators themselves. The
    input's zero point is folded into the bias: ``bias - zero_point * sum(weight)``.

    Args:
        layer: path of the module in the network that it was made of.
        weight: int64, ``(out, ...)``, within ``weight_bits`` signed bits.
        weight_bits: of all output channels, or of each; they are stored so, and computed with as with the widest.
        bias: int64 within 32 bits, shape ``(out,)``.
        fraction: int64, ``(out,)``, what rounding took from the bias, in steps of ``2^-shift`` of the output's grid:
            ``clip(((acc * m + fraction + half) >> shift) + zero_point)``. With few bits a step of the accumulator is
            a large part of a step of the output, and a bias in whole accumulator steps would be a bias error.
    """

    layer: str
    weight: torch.Tensor
    weight_bits: int | tuple[int, ...]
    activation_bits: int
    bias: torch.Tensor
    input_range: tuple[int, int]
    requant: Dyadic | None
    fraction: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_accumulator(self.layer, self.weight, self.bias, self.input_range)

    @property
    def widest_weight_bits(self) -> int:
        """Bits of the channel that has the most."""
        return max(self.weight_bits) if isinstance(self.weight_bits, tuple) else self.weight_bits

    @property
    def mean_weight_bits(self) -> Fraction:
        """Bits of a weight."""
        if isinstance(self.weight_bits, tuple):
            return Fraction(sum(self.weight_bits), len(self.weight_bits))
        return Fraction(self.weight_bits)

    def _finish(self, products: torch.Tensor) -> torch.Tensor:
        """The output for sums of products, float64 of shape ``(n, out, ...)``."""
        acc = products.to(torch.int64) + per_channel(self.bias, products)
        return acc if self.requant is None else self.type.clip(self.requant.apply(acc, 1, self.fraction))


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Layer):
    """Integer 2-d convolution, padded with ``pad_value``.

    Args:
        weight: shape ``(out, in / groups, kernel_h, kernel_w)``.
        stride, dilation: ``(height, width)``.
        padding: ``(top, bottom, left, right)``.
    """

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    pad_value: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(torch.float64)
        return self._finish(_convolve(self, values[0].to(torch.float64), weight, None, float(self.pad_value)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Layer):
    """Integer matrix product of ``(n, in)`` values; weight ``(out, in)``."""

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return self._finish(values[0].to(torch.float64) @ self.weight.to(torch.float64).T)


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatLayer(Node):
    """A float32 layer with bias and, if ``relu``, a ReLU; ``layer`` and the shapes as :class:`Layer`."""

    layer: str
    weight: torch.Tensor
    bias: torch.Tensor
    relu: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatConv(FloatLayer):
    """Float32 convolution; fields as :class:`Conv`."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        out = _convolve(self, values[0], self.weight, self.bias, 0.0)
        return out.relu() if self.relu else out


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatLinear(FloatLayer):
    """Float32 matrix product; weight ``(out, in)``."""

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        out = functional.linear(values[0], self.weight, self.bias)
        return out.relu() if self.relu else out


def _convolve(
    node: Conv | FloatConv, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pad_value: float
) -> torch.Tensor:
    top, bottom, left, right = node.padding
    padded = functional.pad(values, (left, right, top, bottom), value=pad_value)
    return functional.conv2d(padded, weight, bias, node.stride, 0, node.dilation, node.groups)


def check_accumulator(layer: str, weight: torch.Tensor, bias: torch.Tensor, input_range: tuple[int, int]) -> None:
    """Refuse a layer whose worst-case accumulator leaves 32 bits; UnsupportedModelError names it and its worst case."""
    low, high = input_range
    flat = weight.reshape(weight.shape[0], -1)
    farthest = [max(abs(int(end)) for end in values.aminmax()) if values.numel() else 0 for values in (weight, bias)]
    if flat.shape[1] * farthest[0] * max(abs(low), abs(high)) + farthest[1] <= INT32_MAX:
        return  # whatever their signs are: most layers, and their sums take long
    positive, negative = flat.clamp(min=0).sum(1), flat.clamp(max=0).sum(1)
    largest = (positive * high + negative * low + bias).max()
    smallest = (positive * low + negative * high + bias).min()
    # Partial sums pass through the extremes without bias, too.
    worst = max(int(largest), -int(smallest), int((positive * high - negative * low).max()), int(bias.abs().max()))
    if worst > INT32_MAX:
        raise UnsupportedModelError(
            f"layer {layer!r}: an accumulator can reach {worst} (2^{math.log2(worst):.1f}), more than the 32 bits of "
            "an int32; give it fewer bits or keep it float (32)"
        )
