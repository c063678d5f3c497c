"""Which kernel computes an operator that is no convolution, with which constants."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from lightning_baqe.deploy.calls import Maker
from lightning_baqe.errors import BuildError
from lightning_baqe.hardware.target import CpuTarget
from lightning_baqe.integer import nodes as ir
from lightning_baqe.kernels.x86 import float_functions
from lightning_baqe.kernels.x86.layout import VECTOR, Layout
from lightning_baqe.kernels.x86.moves import MOVE_PARAMS, MoveSpec
from lightning_baqe.kernels.x86.pixels import PIXEL_PARAMS, PixelSpec
from lightning_baqe.kernels.x86.pooling import POOL_PARAMS, PoolSpec

INT32_MAX = 2**31 - 1
LONGEST_RUN = 64  # bytes that a rearrangement copies at once


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel and its arguments but the values.

    Args:
        spec: of its code.
        params: numbers, without the halo's value.
        constants: what makes the arrays that it takes before the params.
    """

    spec: PixelSpec | PoolSpec | MoveSpec
    params: tuple[Any, ...] = ()
    constants: tuple[Maker, ...] = ()

    def arguments(self, pad: int) -> tuple[Maker, ...]:
        """What makes constants and params."""
        size = {PixelSpec: PIXEL_PARAMS, PoolSpec: POOL_PARAMS, MoveSpec: MOVE_PARAMS}[type(self.spec)]
        filled = [*self.params, *[0] * (size - 1 - len(self.params)), pad]
        return (*self.constants, partial(np.array, filled, np.int64))


def pixel_kernel(
    node: ir.Node, sources: list[Layout], kinds: list[ir.TensorType], result: Layout, target: CpuTarget
) -> Kernel:
    """The kernel of a node that is no convolution, no matrix product and no input; BuildError where no kernel computes
    it.

    ``sources`` and ``kinds`` are layouts and types of its inputs, ``result`` is the layout of its output.
    """
    source, limits = sources[0], _limits(node.type)

    def pixels(op: str, params: tuple[Any, ...] = (), *constants: Maker, **fields: Any) -> Kernel:
        return Kernel(PixelSpec(op, source, result, **fields), params, constants)

    match node:
        case ir.Quantize():
            return pixels("quantize", limits, _floats(node.inverse_scale))
        case ir.Dequantize():
            factors = partial(by_channel, node.scale.expand(result.channels), result, "float32")
            return pixels("dequantize", (node.zero_point,), factors)
        case ir.Requantize():
            if _bytes_to_bytes(source, result, target):
                return _byte_table(node, source, result)
            narrow, high = _requantize_width(node, kinds[0])
            params = (node.input_zero_point, int(node.requant.multiplier), node.requant.shift, *limits)
            return pixels("requantize", params, narrow=narrow, high=high)
        case ir.Add():
            params = (*node.multipliers, node.offset, node.shift, *limits)
            return pixels("add", params, other=sources[1], narrow=narrow_add(node, kinds))
        case ir.Mul():
            a, b = (_reach(kind, point) for kind, point in zip(kinds, node.input_zero_points, strict=True))
            high = node.requant.shift >= 32 and a * b <= INT32_MAX
            params = (*node.input_zero_points, int(node.requant.multiplier), node.requant.shift, *limits)
            return pixels("mul", params, other=sources[1], narrow=False, high=high)
        case ir.Affine():
            multipliers = partial(by_channel, node.requant.multiplier.expand(result.channels), result, "int32")
            # With 2^61 of offset and as much of rounding, one bit more is wanted than elsewhere.
            high = node.requant.shift >= 33 and _reach(kinds[0], node.input_zero_point) <= INT32_MAX
            params = (node.input_zero_point, node.requant.shift, *limits)
            offsets = partial(_even_first, node.offset, result)
            return pixels("affine", params, multipliers, offsets, narrow=False, high=high)
        case ir.PRelu():
            if is_lookup(node) and _bytes_to_bytes(source, result, target):
                return _byte_table(node, source, result)
            by_sign, shifts = (node.positive, node.negative), (node.positive.shift, node.negative.shift)
            made = [partial(by_channel, p.multiplier.expand(result.channels), result, "int32") for p in by_sign]
            high = min(shifts) >= 32 and _reach(kinds[0], node.input_zero_point) <= INT32_MAX
            return pixels("prelu", (node.input_zero_point, *shifts, *limits), *made, narrow=False, high=high)
        case ir.Table():
            return _table(node, source, result, target)
        case ir.Clip():
            return pixels("clip", limits[1:])
        case ir.MaxPool():
            return Kernel(PoolSpec("max_pool", source, result, node.kernel, node.stride, node.padding, node.dilation))
        case ir.MaxWindows():
            bounds = _flat(node.rows), _flat(node.columns)
            return Kernel(PoolSpec("max_pool", source, result, windows=True), (), bounds)
        case ir.AvgPool() | ir.FloatAvgPool():
            return _average(node, source, result)
        case ir.Concat():
            return Kernel(MoveSpec("concat", tuple(sources), result))
        case ir.Gather():
            return _gather(node, source, result)
        case ir.Flatten():
            return Kernel(MoveSpec("flatten", (source,), result))
        case ir.Move():
            return _move(node, source, result)
        case ir.FloatAdd():
            return pixels("float_add", other=sources[1], relu=node.relu)
        case ir.FloatMul():
            return pixels("float_mul", other=sources[1])
        case ir.FloatAffine():
            parts = [part.expand(result.channels) for part in (node.gain, node.shift)]
            return pixels("float_affine", (), partial(_in_turn, parts, result))
        case ir.FloatPRelu():
            return pixels("float_prelu", (), partial(by_channel, node.slope.expand(result.channels), result, "float32"))
        case ir.FloatFunction():
            if missing := float_functions.unknown(node.steps):
                raise BuildError(
                    f"{node.name!r}: no kernel computes the float function {missing[0]!r}; there are "
                    f"{sorted(float_functions.NAMES)}"
                )
            return pixels("float_function", function=float_functions.encode(node.steps))
    raise BuildError(f"no kernel computes {node.name!r} ({node.kind})")


def _limits(kind: ir.TensorType) -> tuple[Any, ...]:
    return kind.zero_point, kind.low, kind.high


def pack_kernel(result: Layout, node: ir.Quantize | None, flat: bool = False) -> Kernel:
    """Of the network's input, or of a ``flat`` value that an island wrote; quantized by a node or as it is."""
    spec = PixelSpec("pack", result, result, flat=flat)
    return Kernel(spec) if node is None else Kernel(spec, _limits(node.type), (_floats(node.inverse_scale),))


def unpack_kernel(source: Layout, node: ir.Dequantize | None) -> Kernel:
    """Of the network's output or of what an island reads, dequantized by a node or as it is."""
    if node is None:
        return Kernel(PixelSpec("unpack", source, source))
    factors = _flat(node.scale.expand(source.channels), "float32")
    return Kernel(PixelSpec("logits", source, source), (node.zero_point,), (factors,))


def copy_kernel(source: Layout, result: Layout) -> Kernel:
    """Of a value that needs another halo."""
    return Kernel(MoveSpec("copy", (source,), result))


def by_channel(values: torch.Tensor, layout: Layout, dtype: str) -> np.ndarray:
    """Numbers by logical channel as numbers by stored channel, 0 for spare ones."""
    full = np.zeros(layout.stored, dtype)
    full[: layout.channels] = values.numpy()
    return full


def _in_turn(parts: list[torch.Tensor], layout: Layout) -> np.ndarray:
    return np.concatenate([by_channel(part, layout, "float32") for part in parts])


def _even_first(values: torch.Tensor, layout: Layout) -> np.ndarray:
    """Numbers by stored channel, of each vector the even ones first."""
    return by_channel(values, layout, "int64").reshape(-1, VECTOR // 2, 2).transpose(0, 2, 1).ravel()


def _floats(*values: float) -> Maker:
    return partial(np.array, values, np.float32)


def _flat(values: torch.Tensor, dtype: str = "int32") -> Maker:
    return partial(np.array, values.numpy().ravel(), dtype)


def _table(node: ir.Table, source: Layout, result: Layout, target: CpuTarget) -> Kernel:
    if _bytes_to_bytes(source, result, target):
        return _byte_table(node, source, result)
    by_byte, entries = partial(_byte_results, node, source, result), _flat(node.table, result.dtype)
    size, made = (len(node.table), entries) if source.dtype == "int32" else (256, by_byte)
    return Kernel(PixelSpec("table", source, result, entries=size), (node.input_low,), (made,))


def is_lookup(node: ir.Node) -> bool:
    """Whether an operator is one function of an integer for all elements, which a table of bytes can hold."""
    if isinstance(node, ir.PRelu):
        return node.positive.multiplier.ndim == node.negative.multiplier.ndim == 0
    return isinstance(node, ir.Table | ir.Requantize)


def _bytes_to_bytes(source: Layout, result: Layout, target: CpuTarget) -> bool:
    """Whether all of a row, in a slice of a pixel, is looked up 64 bytes at a time: faster than any arithmetic."""
    values = result.stored if source.shared or result.shared else result.width * result.stored
    return target.vbmi and "int32" not in (source.dtype, result.dtype) and values >= 64


def _byte_results(node: ir.Table | ir.Requantize | ir.PRelu, source: Layout, result: Layout) -> np.ndarray:
    """The node's value for whatever a byte may hold: its input's range, and what spare channels have beyond it."""
    values = torch.from_numpy(np.arange(256, dtype=np.uint8).view(source.dtype).astype(np.int64))
    if isinstance(node, ir.Table):
        values = values.clamp(node.input_low, node.input_low + len(node.table) - 1)
    return node.run(values).numpy().astype(result.dtype)


def _byte_table(node: ir.Table | ir.Requantize | ir.PRelu, source: Layout, result: Layout) -> Kernel:
    spec = PixelSpec("table", source, result, entries=256, vbmi=True)
    return Kernel(spec, (), (partial(_byte_results, node, source, result),))


def _average(node: ir.AvgPool | ir.FloatAvgPool, source: Layout, result: Layout) -> Kernel:
    params: tuple[Any, ...] = ()
    if isinstance(node, ir.AvgPool):
        op, factors, dtype, high = "avg_pool", node.requant.multiplier, "int32", node.requant.shift >= 32
        params = (node.input_zero_point, node.requant.shift, *_limits(node.type))
    else:
        op, factors, dtype, high = "float_avg_pool", node.factors, "float32", False
    spec = partial(PoolSpec, op, source, result, by_pixel=factors.numel() > 1, high=high)
    rows, columns, made = _regular(node.rows), _regular(node.columns), _flat(factors, dtype)
    if rows is not None and columns is not None:
        return Kernel(spec(kernel=(rows[0], columns[0]), stride=(rows[1], columns[1])), params, (made,))
    return Kernel(spec(windows=True), params, (_flat(node.rows), _flat(node.columns), made))


def _regular(bounds: torch.Tensor) -> tuple[int, int] | None:
    """``(size, stride)`` of windows that begin at 0 and are all equal, else None."""
    first, end = bounds.T.tolist()
    size, stride = end[0] - first[0], first[1] - first[0] if len(first) > 1 else 1
    wanted = [(i * stride, i * stride + size) for i in range(len(first))]
    return (size, stride) if list(zip(first, end, strict=True)) == wanted else None


def _gather(node: ir.Gather, source: Layout, result: Layout) -> Kernel:
    constants: list[Maker] = []
    firsts = (0,) if node.channels is None else _runs(node.channels.tolist())
    if firsts is None:
        assert node.channels is not None
        constants.append(_flat(node.channels))
    pixels = node.rows is not None or node.columns is not None
    if pixels:
        for index, size in ((node.rows, source.height), (node.columns, source.width)):
            constants.append(_flat(torch.arange(size) if index is None else index))
    spec = MoveSpec("gather", (source,), result, "runs" if firsts else "index", firsts or (), pixels)
    return Kernel(spec, (node.type.zero_point if node.type.is_integer else 0,), tuple(constants))


def _move(node: ir.Move, source: Layout, result: Layout) -> Kernel:
    shape = result.channels, result.height, result.width
    index = node.index.numpy().reshape(shape).transpose(1, 2, 0)
    places = np.where(index < 0, -1, source.places().ravel()[index])
    for run in (64, 32, 16, 8, 4, 2, 1):
        if result.channels % run == 0 and run * np.dtype(source.dtype).itemsize <= LONGEST_RUN:
            runs = places.reshape(-1, run)
            steps = np.where(runs[:, :1] < 0, 0, np.arange(run))
            if (runs == runs[:, :1] + steps).all():
                break
    spec = MoveSpec("move", (source,), result, run=run, absent=bool((places < 0).any()))
    constants = (partial(np.array, runs[:, 0], np.int32),)
    return Kernel(spec, (node.type.zero_point if node.type.is_integer else 0,), constants)


def _runs(channels: list[int]) -> tuple[int, ...] | None:
    """The first channels of as few runs as, by turns, give all channels; None if it takes more than 8."""
    for turns in range(1, 9):
        firsts = channels[:turns]
        wanted = [first + step for step in range(len(channels) // turns) for first in firsts]
        if min(firsts) >= 0 and channels == wanted:
            return tuple(firsts)
    return None


def _reach(kind: ir.TensorType, zero_point: int) -> int:
    """The largest distance from the zero point."""
    return max(abs((kind.low or 0) - zero_point), abs((kind.high or 0) - zero_point))


def _requantize_width(node: ir.Requantize, kind: ir.TensorType) -> tuple[bool, bool]:
    """Whether all products, with the rounding constant, fit 32 bits; else, whether upper halves are enough."""
    m, shift, reach = int(node.requant.multiplier), node.requant.shift, _reach(kind, node.input_zero_point)
    narrow = shift < 31 and reach * abs(m) + (1 << (shift - 1)) + abs(node.type.zero_point) <= INT32_MAX
    return narrow, not narrow and shift >= 32 and reach <= INT32_MAX


def narrow_add(node: ir.Add, kinds: list[ir.TensorType]) -> bool:
    """Whether the sum, its offset and the rounding constant fit 32 bits."""
    if node.shift >= 31:
        return False
    reach = abs(node.offset) + (1 << (node.shift - 1)) + abs(node.type.zero_point)
    for kind, m in zip(kinds, node.multipliers, strict=True):
        reach += max(abs(kind.low or 0), abs(kind.high or 0)) * abs(m)
    return reach <= INT32_MAX
