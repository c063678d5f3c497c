"""Pooling kernels: regular windows as loops of fixed size, any other windows by their bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from lightning_baqe.kernels.x86.emit import arguments, cast, fill_halo, param, splat
from lightning_baqe.kernels.x86.layout import VECTOR, Layout
from lightning_baqe.kernels.x86.requantize import rescaled

POOL_PARAMS = 6  # int64: input zero point, shift, zero point, low, high, the halo's value


@dataclass(frozen=True)
class PoolSpec:
    """Everything that the code of such a kernel depends on.

    Args:
        op: ``max_pool``, ``avg_pool``, ``float_avg_pool``.
        source, result: layouts.
        kernel, stride, padding, dilation: ``(height, width)``, of regular windows.
        windows: bounds of rows and columns come as data.
        by_pixel: so many factors as pixels, else one.
        high: the shift is 32 or more.
    """

    op: str
    source: Layout
    result: Layout
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    windows: bool = False
    by_pixel: bool = False
    high: bool = False

    @property
    def lanes(self) -> int:
        """Channels that are taken together: a maximum needs no more bits than its values."""
        wide = self.op == "max_pool" and self.source.dtype == "uint8"
        return next(n for n in (64, 32, VECTOR) if self.result.stored % n == 0) if wide else VECTOR

    @property
    def vectors(self) -> int:
        """Vectors of channels whose windows are walked together, so that the loops over them are worth their while."""
        blocks = self.result.stored // self.lanes
        return next(n for n in (6, 5, 4, 3, 2, 1) if blocks % n == 0)


def emit_pool(spec: PoolSpec) -> None:
    """Emit a function of the source, for windows their int32 bounds (rows, then columns, first and end of each), for
    averages the factors (int32 multipliers, or float32), params and result.
    """
    source, result = spec.source, spec.result
    is_max, is_float = spec.op == "max_pool", result.dtype == "float32"
    kind = source.dtype if is_max else "float32" if is_float else "int32"
    lanes, vectors = spec.lanes, spec.vectors

    windows = [(2 * result.height, "int32"), (2 * result.width, "int32")] if spec.windows else []
    factors = [] if is_max else [(result.height * result.width if spec.by_pixel else 1, kind)]
    X, *constants, P, Y = arguments("pool", source, *windows, *factors, (POOL_PARAMS, "int64"), result)
    acc = B.alloc_buffer((vectors, lanes), kind)
    lane = T.ramp(0, 1, lanes)
    fill_halo(result, Y, P[POOL_PARAMS - 1])
    groups = result.stored // (lanes * vectors)
    with B.serial(result.height) as y, B.serial(result.width) as x, B.serial(groups) as group:
        start = T.min_value(kind) if is_max else T.float32(0) if is_float else T.int32(0)
        with B.unroll(vectors) as v:
            B.buffer_store(acc, splat(start, lanes), [v, lane])

        def load(row: Any, column: Any, v: Any) -> Any:
            channel = (group * vectors + v) * lanes
            return X[T.ramp(source.origin() + row * source.row + column * source.pitch + channel, 1, lanes)]

        if spec.windows:
            rows, columns = constants[:2]
            with (
                B.serial(rows[2 * y], rows[2 * y + 1]) as i,
                B.serial(columns[2 * x], columns[2 * x + 1]) as j,
                B.unroll(vectors) as v,
            ):
                B.buffer_store(acc, _accumulated(spec, acc[v, lane], load(i, j, v), P), [v, lane])
        else:
            with B.serial(spec.kernel[0]) as i, B.serial(spec.kernel[1]) as j, B.unroll(vectors) as v:
                row, rows_in = _tap(spec, 0, y, i)
                column, columns_in = _tap(spec, 1, x, j)
                total = _accumulated(spec, acc[v, lane], load(row, column, v), P)
                for inside in (rows_in, columns_in):
                    if inside is not None:
                        total = T.Select(splat(inside, lanes), total, acc[v, lane])
                B.buffer_store(acc, total, [v, lane])
        factor = None if is_max else constants[-1][y * result.width + x if spec.by_pixel else 0]
        with B.unroll(vectors) as v:
            to = result.origin() + y * result.row + x * result.pitch + (group * vectors + v) * lanes
            B.buffer_store(Y, _finished(spec, acc[v, lane], factor, P), [T.ramp(to, 1, lanes)])


def _tap(spec: PoolSpec, axis: int, out: Any, tap: Any) -> tuple[Any, Any]:
    """The row (column) under one tap of a window within the image, and whether the tap lies there; None for always.

    A window without holes needs no test: the pixel at the image's edge is one of it, and a maximum may take it twice.
    """
    size = (spec.source.height, spec.source.width)[axis]
    outs = (spec.result.height, spec.result.width)[axis]
    kernel, stride, padding, dilation = (pair[axis] for pair in (spec.kernel, spec.stride, spec.padding, spec.dilation))
    index = out * stride - padding + tap * dilation
    if padding == 0 and (outs - 1) * stride + (kernel - 1) * dilation < size:
        return index, None
    clamped = T.max(T.min(index, T.int32(size - 1)), T.int32(0))
    return clamped, None if dilation == 1 else T.And(index >= 0, index < size)


def _accumulated(spec: PoolSpec, acc: Any, value: Any, params: Any) -> Any:
    if spec.op == "max_pool":
        return T.max(acc, value)
    if spec.op == "float_avg_pool":
        return acc + value
    return acc + cast("int32", VECTOR, value) - param(params, 0, "int32", VECTOR)


def _finished(spec: PoolSpec, acc: Any, factor: Any, params: Any) -> Any:
    if spec.op == "max_pool":
        return cast(spec.result.dtype, spec.lanes, acc)
    if spec.op == "float_avg_pool":
        return acc * splat(factor, VECTOR)
    width = "int32" if spec.high else "int64"
    if not spec.high:
        acc, factor = cast(width, VECTOR, acc), T.Cast(width, factor)
    limits = params[2], params[3], params[4]
    out = rescaled(acc, splat(factor, VECTOR), params[1], limits, width, spec.high, VECTOR)
    return cast(spec.result.dtype, VECTOR, out)
