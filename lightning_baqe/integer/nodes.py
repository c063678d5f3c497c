"""The operators of the integer graph, each with its bit-exact meaning in plain torch.

A node is a frozen record: its name, the names of its inputs, the type of its output and its constants. ``run`` computes
the output from the inputs; values carry a leading batch dimension, types do not. Integer values travel as int64 tensors
here: a target decides on storage types. The real value behind an integer ``q`` is ``scale * (q - zero_point)``.

Integer convolutions are computed in float64, where sums of products below 2^53 are exact: the worst case of every layer
is checked to fit 32 bits on construction, so no rounding can occur.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer.dyadic import Dyadic, rounding_shift
from lightning_baqe.integer.float_nodes import (
    FloatAdd,
    FloatAffine,
    FloatAvgPool,
    FloatConv,
    FloatFunction,
    FloatLinear,
    FloatMul,
)
from lightning_baqe.integer.node import Node, TensorType, per_channel, window_sums

__all__ = [
    "NODE_TYPES", "Add", "Affine", "AvgPool", "Clip", "Concat", "Conv", "Dequantize", "Flatten", "FloatAdd",
    "FloatAffine", "FloatAvgPool", "FloatConv", "FloatFunction", "FloatLinear", "FloatMul", "Gather", "Input", "Linear",
    "MaxPool", "Mul", "Node", "Quantize", "Requantize", "Table", "TensorType", "check_accumulator",
]  # fmt: skip

INT32_MAX = 2**31 - 1


def _clip(values: torch.Tensor, kind: TensorType) -> torch.Tensor:
    assert kind.low is not None
    assert kind.high is not None
    return values.clamp(kind.low, kind.high)


@dataclass(frozen=True, eq=False, kw_only=True)
class Input(Node):
    """The network's float32 input."""

    kind = "input"

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0].to(torch.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantize(Node):
    """Float to integer: ``clip(round_half_even(x * inverse_scale) + zero_point)``, one float32 multiplication."""

    kind = "quantize"
    inverse_scale: float

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        factor = torch.tensor(self.inverse_scale, dtype=torch.float32)
        scaled = torch.round(values[0].to(torch.float32) * factor)
        # Clamp before the cast: what lies outside int64 has no defined conversion.
        assert self.type.low is not None
        assert self.type.high is not None
        zero_point = self.type.zero_point
        return scaled.clamp(self.type.low - zero_point, self.type.high - zero_point).to(torch.int64) + zero_point


@dataclass(frozen=True, eq=False, kw_only=True)
class Dequantize(Node):
    """Integer to float32: ``float32(q - zero_point) * scale``, scale float32 of shape ``()`` or ``(channels,)``."""

    kind = "dequantize"
    scale: torch.Tensor
    zero_point: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        shifted = (values[0] - self.zero_point).to(torch.float32)
        return shifted * per_channel(self.scale.to(torch.float32), shifted)


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Node):
    """Integer 2-d convolution: ``acc = sum(weight * q) + bias`` in int32, padded with ``pad_value``.

    With ``requant`` the output is ``clip(requant(acc) + zero_point)``, without it the accumulators themselves. The
    input's zero point is folded into the bias: ``bias - zero_point * sum(weight)``.

    Args:
        weight: int64, shape ``(out, in / groups, kernel_h, kernel_w)``, within ``weight_bits`` signed bits.
        bias: int64 within 32 bits, shape ``(out,)``.
        stride, dilation: ``(height, width)``.
        padding: ``(top, bottom, left, right)``.
        layer: path of the module in the network that it was made of.
        fraction: int64, ``(out,)``, what rounding took from the bias, in steps of ``2^-shift`` of the output's grid:
            ``clip(((acc * m + fraction + half) >> shift) + zero_point)``. With few bits a step of the accumulator is
            a large part of a step of the output, and a bias in whole accumulator steps would be a bias error.
    """

    kind = "conv"
    layer: str
    weight: torch.Tensor
    weight_bits: int
    activation_bits: int
    bias: torch.Tensor
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    pad_value: int
    input_range: tuple[int, int]
    requant: Dyadic | None
    fraction: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_accumulator(self.layer, self.weight, self.bias, self.input_range)

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        top, bottom, left, right = self.padding
        padded = functional.pad(values[0].to(torch.float64), (left, right, top, bottom), value=float(self.pad_value))
        weight = self.weight.to(torch.float64)
        acc = functional.conv2d(padded, weight, None, self.stride, 0, self.dilation, self.groups)
        acc = acc.to(torch.int64) + per_channel(self.bias, acc)
        if self.requant is None:
            return acc
        return _clip(self.requant.apply(acc, 1, self.fraction) + self.type.zero_point, self.type)


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Node):
    """Integer matrix product of ``(n, in)`` values, as :class:`Conv`; weight ``(out, in)``."""

    kind = "linear"
    layer: str
    weight: torch.Tensor
    weight_bits: int
    activation_bits: int
    bias: torch.Tensor
    input_range: tuple[int, int]
    requant: Dyadic | None
    fraction: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_accumulator(self.layer, self.weight, self.bias, self.input_range)

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        acc = (values[0].to(torch.float64) @ self.weight.to(torch.float64).T).to(torch.int64) + self.bias
        if self.requant is None:
            return acc
        return _clip(self.requant.apply(acc, 1, self.fraction) + self.type.zero_point, self.type)


@dataclass(frozen=True, eq=False, kw_only=True)
class Add(Node):
    """Residual sum (HAWQ-V3 eq. 9): ``clip(((a * m_a + b * m_b + offset + half) >> shift) + zero_point)``.

    ``offset`` is ``-(m_a * zero_point_a + m_b * zero_point_b)``. ReLU is the lower end of the output's range.
    """

    kind = "add"
    multipliers: tuple[int, int]
    shift: int
    offset: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        total = values[0] * self.multipliers[0] + values[1] * self.multipliers[1] + self.offset
        return _clip(rounding_shift(total, self.shift) + self.type.zero_point, self.type)


@dataclass(frozen=True, eq=False, kw_only=True)
class Requantize(Node):
    """Onto another grid: ``clip(requant(q - input_zero_point) + zero_point)``; ``requant`` is one factor."""

    kind = "requantize"
    requant: Dyadic
    input_zero_point: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return _clip(self.requant.apply(values[0] - self.input_zero_point) + self.type.zero_point, self.type)


@dataclass(frozen=True, eq=False, kw_only=True)
class Clip(Node):
    """Clip to the output's range; a ReLU has the zero point as its lower end."""

    kind = "clip"

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return _clip(values[0], self.type)


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool(Node):
    """Max pooling of integers or floats; padding never wins. Args as torch: ``(height, width)`` pairs."""

    kind = "max_pool"
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        value = values[0].to(torch.float64) if self.type.is_integer else values[0]
        out = functional.max_pool2d(value, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)
        return out.to(values[0].dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class AvgPool(Node):
    """Integer average pooling: ``clip(requant(sum(q - input_zero_point)) + zero_point)``, summed over each window.

    A window is what lies within the image; padding adds 0 and is left out. The sum is exact in int32; the windows'
    sizes are part of the dyadic factors.

    Args:
        rows: int64, shape ``(out_height, 2)``, first row of each window and the one after its last.
        columns: int64, shape ``(out_width, 2)``, likewise.
        requant: one factor, or ``(out_height * out_width,)`` where windows count differently.
    """

    kind = "avg_pool"
    rows: torch.Tensor
    columns: torch.Tensor
    requant: Dyadic
    input_zero_point: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        total = window_sums(values[0] - self.input_zero_point, self.rows, self.columns)
        scaled = self.requant.apply(total.flatten(2), 2).reshape(total.shape)
        return _clip(scaled + self.type.zero_point, self.type)


@dataclass(frozen=True, eq=False, kw_only=True)
class Table(Node):
    """Any pointwise function of an integer: ``table[q - input_low]``.

    Args:
        table: int64, one entry for each integer of the input's range, within the output's.
        input_low: the input's lowest integer.
        functions: names and parameters of what it computes, in order: ``(("hardswish",), ("mul", 0.5))``.
    """

    kind = "table"
    table: torch.Tensor
    input_low: int
    functions: tuple[tuple[Any, ...], ...]

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

    kind = "affine"
    requant: Dyadic
    offset: torch.Tensor
    input_zero_point: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        scaled = self.requant.apply(values[0] - self.input_zero_point, 1, self.offset)
        return _clip(scaled + self.type.zero_point, self.type)


@dataclass(frozen=True, eq=False, kw_only=True)
class Mul(Node):
    """Product of two values: ``clip(requant((a - zero_point_a) * (b - zero_point_b)) + zero_point)``, one factor.

    The second has the first's shape, or ``(channels, 1, 1)`` (squeeze-and-excite). Both are within 0..255, so that the
    product fits 17 bits and a sign.
    """

    kind = "mul"
    requant: Dyadic
    input_zero_points: tuple[int, int]

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        product = (values[0] - self.input_zero_points[0]) * (values[1] - self.input_zero_points[1])
        return _clip(self.requant.apply(product) + self.type.zero_point, self.type)


@dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Node):
    """Channels of all inputs, one after the other: floats, or integers on one grid (HAWQ-V3 eq. 10, rescaled)."""

    kind = "concat"

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return torch.cat(values, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Gather(Node):
    """Select channels, rows and columns: ``out[c, y, x] = in[channels[c], rows[y], columns[x]]``.

    Slices, splits, channel shuffles, nearest upsampling and padding are all of this kind. An index of -1 stands for the
    real value 0: the zero point of integers.

    Args:
        channels, rows, columns: int64 of the output's sizes, or None for all in order. Values of shape ``(features,)``
            have channels only.
    """

    kind = "gather"
    channels: torch.Tensor | None
    rows: torch.Tensor | None
    columns: torch.Tensor | None

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        out = values[0]
        for dim, index in enumerate((self.channels, self.rows, self.columns), 1):
            if index is not None:
                out = out.index_select(dim, index.clamp(min=0))
                absent = (index < 0).reshape([-1 if i == dim else 1 for i in range(out.ndim)])
                out = out.masked_fill(absent, self.type.zero_point if self.type.is_integer else 0)
        return out


@dataclass(frozen=True, eq=False, kw_only=True)
class Flatten(Node):
    """``(c, h, w)`` to ``(c * h * w,)``, channels outermost as in torch; or ``(c,)`` to ``(c, 1, 1)``."""

    kind = "flatten"

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0].reshape(len(values[0]), *self.type.shape)


NODE_TYPES: dict[str, type[Node]] = {
    cls.kind: cls
    for cls in (
        Input, Quantize, Dequantize, Conv, Linear, Add, Mul, Affine, Table, Requantize, Clip, MaxPool, AvgPool, Concat,
        Gather, Flatten, FloatConv, FloatLinear, FloatAdd, FloatMul, FloatAffine, FloatFunction, FloatAvgPool,
    )
}  # fmt: skip


def check_accumulator(layer: str, weight: torch.Tensor, bias: torch.Tensor, input_range: tuple[int, int]) -> None:
    """Refuse a layer whose worst-case accumulator leaves 32 bits.

    Raises:
        UnsupportedModelError: names the layer and its worst case.
    """
    low, high = input_range
    flat = weight.reshape(weight.shape[0], -1)
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
