"""The operators of the integer graph, each with its bit-exact meaning in plain torch.

A node is a frozen record: its name, the names of its inputs, the type of its output and its constants. ``run`` computes
the output from the inputs; values carry a leading batch dimension, types do not. Integer values travel as int64 tensors
here: a target decides on storage types. The real value behind an integer ``q`` is ``scale * (q - zero_point)``.

Integer convolutions are computed in float64, where sums of products below 2^53 are exact: the worst case of every layer
is checked to fit 32 bits on construction, so no rounding can occur. Operators whose name begins with Float do float32
arithmetic on values inside the network: layers that stay float, and what stands between them.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer.dyadic import Dyadic, rounding_shift
from lightning_baqe.quantization.pointwise import Pointwise

INT32_MAX = 2**31 - 1

NODE_TYPES: dict[str, type[Node]] = {}  # all operators by kind


@dataclass(frozen=True)
class TensorType:
    """The type of one value, without the batch dimension.

    Args:
        shape: ``(channels, height, width)`` or ``(features,)``.
        low, high: inclusive integer range; both None for a float32 value.
        scale, zero_point: the real value is ``scale * (q - zero_point)``; scale 0 where it differs by channel.
    """

    shape: tuple[int, ...]
    low: int | None = None
    high: int | None = None
    scale: float = 1.0
    zero_point: int = 0

    @property
    def is_integer(self) -> bool:
        return self.low is not None

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest integer."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def clip(self, steps: torch.Tensor) -> torch.Tensor:
        """``clip(steps + zero_point)``, steps being int64 and counted from the zero point."""
        return (steps + self.zero_point).clamp(*self.limits)


@dataclass(frozen=True, eq=False, kw_only=True)
class Node(ABC):
    """Base of all operators.

    Args:
        name: unique in its graph.
        inputs: names of the nodes whose outputs it reads.
        type: the type of its output.
    """

    kind: ClassVar[str]  # in files and messages: the name of the class in snake case
    name: str
    inputs: tuple[str, ...]
    type: TensorType

    def __init_subclass__(cls) -> None:
        if "run" in vars(cls):
            cls.kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
            NODE_TYPES[cls.kind] = cls

    @abstractmethod
    def run(self, *values: torch.Tensor) -> torch.Tensor:
        """Compute the output, shape ``(n, *type.shape)``."""

    @property
    def is_float(self) -> bool:
        """Whether it does float arithmetic on values inside the network."""
        return self.kind.startswith("float_")


@dataclass(frozen=True, eq=False, kw_only=True)
class Input(Node):
    """The network's float32 input."""

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0].to(torch.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantize(Node):
    """Float to integer: ``clip(round_half_even(x * inverse_scale) + zero_point)``, one float32 multiplication."""

    inverse_scale: float

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        factor = torch.tensor(self.inverse_scale, dtype=torch.float32)
        scaled = torch.round(values[0].to(torch.float32) * factor)
        # Clamp before the cast: what lies outside int64 has no defined conversion.
        low, high = (limit - self.type.zero_point for limit in self.type.limits)
        return scaled.clamp(low, high).to(torch.int64) + self.type.zero_point


@dataclass(frozen=True, eq=False, kw_only=True)
class Dequantize(Node):
    """Integer to float32: ``float32(q - zero_point) * scale``, scale float32 of shape ``()`` or ``(channels,)``."""

    scale: torch.Tensor
    zero_point: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        shifted = (values[0] - self.zero_point).to(torch.float32)
        return shifted * per_channel(self.scale.to(torch.float32), shifted)


@dataclass(frozen=True, eq=False, kw_only=True)
class Layer(Node):
    """An integer layer: ``acc = sum(weight * q) + bias`` in int32.

    With ``requant`` the output is ``clip(requant(acc) + zero_point)``, without it the accumulators themselves. The
    input's zero point is folded into the bias: ``bias - zero_point * sum(weight)``.

    Args:
        layer: path of the module in the network that it was made of.
        weight: int64, ``(out, ...)``, within ``weight_bits`` signed bits.
        bias: int64 within 32 bits, shape ``(out,)``.
        fraction: int64, ``(out,)``, what rounding took from the bias, in steps of ``2^-shift`` of the output's grid:
            ``clip(((acc * m + fraction + half) >> shift) + zero_point)``. With few bits a step of the accumulator is
            a large part of a step of the output, and a bias in whole accumulator steps would be a bias error.
    """

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
class MaxPool(Node):
    """Max pooling of integers or floats; padding never wins. Args as torch: ``(height, width)`` pairs."""

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

    rows: torch.Tensor
    columns: torch.Tensor
    requant: Dyadic
    input_zero_point: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        total = window_sums(values[0] - self.input_zero_point, self.rows, self.columns)
        return self.type.clip(self.requant.apply(total.flatten(2), 2).reshape(total.shape))


@dataclass(frozen=True, eq=False, kw_only=True)
class Table(Node):
    """Any pointwise function of an integer: ``table[q - input_low]``.

    Args:
        table: int64, one entry for each integer of the input's range, within the output's.
        input_low: the input's lowest integer.
        functions: names and parameters of what it computes, in order: ``(("hardswish",), ("mul", 0.5))``.
    """

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

    requant: Dyadic
    offset: torch.Tensor
    input_zero_point: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return self.type.clip(self.requant.apply(values[0] - self.input_zero_point, 1, self.offset))


@dataclass(frozen=True, eq=False, kw_only=True)
class Mul(Node):
    """Product of two values: ``clip(requant((a - zero_point_a) * (b - zero_point_b)) + zero_point)``, one factor.

    The second has the first's shape, or ``(channels, 1, 1)`` (squeeze-and-excite). Both are within 0..255, so that the
    product fits 17 bits and a sign.
    """

    requant: Dyadic
    input_zero_points: tuple[int, int]

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        product = (values[0] - self.input_zero_points[0]) * (values[1] - self.input_zero_points[1])
        return self.type.clip(self.requant.apply(product))


@dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Node):
    """Channels of all inputs, one after the other: floats, or integers on one grid (HAWQ-V3 eq. 10, rescaled)."""

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

    channels: torch.Tensor | None
    rows: torch.Tensor | None
    columns: torch.Tensor | None

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        absent = self.type.zero_point if self.type.is_integer else 0
        return select_elements(values[0], (self.channels, self.rows, self.columns), absent)


@dataclass(frozen=True, eq=False, kw_only=True)
class Flatten(Node):
    """``(c, h, w)`` to ``(c * h * w,)``, channels outermost as in torch; or ``(c,)`` to ``(c, 1, 1)``."""

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0].reshape(len(values[0]), *self.type.shape)


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


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatAdd(Node):
    """Float32 sum of two values and, if ``relu``, a ReLU."""

    relu: bool

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        out = values[0] + values[1]
        return out.relu() if self.relu else out


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatFunction(Node):
    """A pointwise float32 function by name, with its parameters; see :mod:`lightning_baqe.quantization.pointwise`."""

    function: str
    parameters: tuple[float, ...]

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return Pointwise(self.function, self.parameters)(values[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatAffine(Node):
    """Float32 ``x * gain + shift``, both of shape ``(channels,)``."""

    gain: torch.Tensor
    shift: torch.Tensor

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0] * per_channel(self.gain, values[0]) + per_channel(self.shift, values[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatMul(Node):
    """Float32 product of two values; the second has the first's shape, or ``(channels, 1, 1)``."""

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0] * values[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatAvgPool(Node):
    """Float32 average pooling, ``sum * factor`` over each window as in :class:`AvgPool`.

    Args:
        rows, columns: as in :class:`AvgPool`.
        factors: float32, shape ``()`` or ``(out_height * out_width,)``.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    factors: torch.Tensor

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        total = window_sums(values[0], self.rows, self.columns)
        return (total.flatten(2) * self.factors).reshape(total.shape)


def per_channel(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Numbers by channel, shape ``()`` or ``(channels,)``, which broadcast to ``like``, ``(n, channels, ...)``."""
    return values if values.ndim == 0 else values.reshape(1, -1, *[1] * (like.ndim - 2))


def window_sums(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Sums of ``(n, channels, height, width)`` over windows: ``(n, channels, out_height, out_width)``, of the same
    type.

    ``rows`` and ``columns`` are int64, ``(out_height, 2)`` and ``(out_width, 2)``: first and one past the last of each
    window.
    """
    by_row = torch.stack([values[:, :, first:end].sum(2) for first, end in rows.tolist()], 2)
    return torch.stack([by_row[:, :, :, first:end].sum(3) for first, end in columns.tolist()], 3)


def select_elements(values: torch.Tensor, indices: Sequence[torch.Tensor | None], absent: float) -> torch.Tensor:
    """Elements of ``(n, ...)`` by one index for each further dimension, as :class:`Gather`; -1 gives ``absent``."""
    for dim, index in enumerate(indices, 1):
        if index is not None:
            outside = (index < 0).reshape([-1 if i == dim else 1 for i in range(values.ndim)])
            values = values.index_select(dim, index.clamp(min=0)).masked_fill(outside, absent)
    return values


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
