"""Expressions and loops that several kernel templates share. Vectors of one lane are scalars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B  # the same names as T's, as functions that build; no source is parsed

from lightning_baqe.kernels.x86.layout import VECTOR, Layout


def cast(dtype: str, lanes: int, value: Any) -> Any:
    """The value as another type."""
    return T.Cast(f"{dtype}x{lanes}" if lanes > 1 else dtype, value)


def splat(value: Any, lanes: int) -> Any:
    """One number in all lanes."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def at(buffer: Any, index: Any, lanes: int) -> Any:
    """Consecutive values of a buffer."""
    return buffer[T.ramp(index, 1, lanes)] if lanes > 1 else buffer[index]


def put(buffer: Any, value: Any, index: Any, lanes: int) -> None:
    """Store consecutive values."""
    B.buffer_store(buffer, value, [T.ramp(index, 1, lanes) if lanes > 1 else index])


def param(params: Any, index: int, dtype: str, lanes: int) -> Any:
    """A number of the int64 buffer ``params`` in all lanes."""
    return splat(T.Cast(dtype, params[index]), lanes)


def rounding_shift(value: Any, amount: Any, dtype: str, lanes: int) -> Any:
    """``(value + 2^(amount-1)) >> amount``; ``amount`` is an int64 scalar."""
    count = T.Cast(dtype, amount)
    one = T.int64(1) if dtype == "int64" else T.int32(1)
    half = splat(T.shift_left(one, count - one), lanes)
    return T.shift_right(value + half, splat(count, lanes))


def clip(value: Any, params: Any, low: int, dtype: str, lanes: int) -> Any:
    """Clip to ``params[low] .. params[low + 1]``."""
    return T.min(T.max(value, param(params, low, dtype, lanes)), param(params, low + 1, dtype, lanes))


def halves(value: Any, lanes: int) -> tuple[Any, Any]:
    """The even and the odd lanes of an int32 vector, widened to int64."""
    thirty_two = T.broadcast(T.int64(32), lanes // 2)

    def widened(lower: Any) -> Any:
        pairs = T.reinterpret(lower, dtype=f"int64x{lanes // 2}")
        return T.shift_right(T.shift_left(pairs, thirty_two), thirty_two)

    # A shift of the pairs by 32 would do for the odd lanes, too; but LLVM multiplies its result in 64 bits on AVX2.
    return widened(value), widened(T.Shuffle([value], [lane | 1 for lane in range(lanes)]))


def requantized_high(value: Any, multipliers: Any, terms: tuple[Any, Any] | None, amount: Any, lanes: int) -> Any:
    """``(value * multipliers + terms + 2^(amount-1)) >> amount`` as int32, for an amount of 32 or more.

    Only the upper halves of the 64-bit sums matter then, so that one 32-bit shift finishes both. Even and odd lanes are
    multiplied apart, as the instructions do it.

    Args:
        value, multipliers: int32 vectors.
        terms: int64 vectors of the even and the odd lanes, or None.
        amount: an int64 scalar.
        lanes: of the int32 vectors.
    """
    half = T.broadcast(T.shift_left(T.int64(1), amount - T.int64(1)), lanes // 2)
    added = (half, half) if terms is None else (terms[0] + half, terms[1] + half)
    even, odd = (
        T.reinterpret(a * m + term, dtype=f"int32x{lanes}")
        for a, m, term in zip(halves(value, lanes), halves(multipliers, lanes), added, strict=True)
    )
    order = [index for lane in range(1, lanes, 2) for index in (lane, lanes + lane)]
    return T.shift_right(T.Shuffle([even, odd], order), T.broadcast(T.Cast("int32", amount - T.int64(32)), lanes))


@contextmanager
def tile_loops(first: int, second: int, threads: int) -> Iterator[tuple[Any, Any]]:
    """Two nested loops; threads share their product, because one of them alone may be too short."""
    if threads > 1:
        with B.parallel(first * second) as both:
            yield T.floordiv(both, second), T.floormod(both, second)
    else:
        with B.serial(first) as outer, B.serial(second) as inner:
            yield outer, inner


def tile_start(index: Any, extent: int, size: int) -> Any:
    """Where a tile begins; the last one is shifted back over its neighbour if it would pass the end."""
    return T.min(index * size, T.int32(extent - size)) if extent % size else index * size


def prefetch(buffer: Any, index: Any) -> None:
    """Emit a hint that the cache line of an element will be read soon, into the second-level cache."""
    name = T.llvm_lookup_intrinsic_id("llvm.prefetch.p0")
    read, second_level, data = T.int32(0), T.int32(2), T.int32(1)
    B.evaluate(T.call_llvm_intrin(name, T.address_of(buffer[index]), read, second_level, data, dtype="void"))


def fill_halo(layout: Layout, buffer: Any, value: Any) -> None:
    """Emit the loops that fill a buffer's halo."""
    if layout.halo == 0:
        return
    pad = T.Cast(layout.dtype, value)
    if layout.shared:
        _fill_slice_halo(layout, buffer, pad)
        return
    edge = layout.halo * layout.row + layout.halo * layout.stored
    # Top rows with the first left edge; then right edge plus next left edge, row by row; the last right edge and below.
    with B.serial(edge) as i:
        B.buffer_store(buffer, pad, [i])
    with B.serial(layout.height - 1) as y, B.serial(2 * layout.halo * layout.stored) as i:
        B.buffer_store(buffer, pad, [edge + layout.width * layout.stored + y * layout.row + i])
    with B.serial(edge) as i:
        B.buffer_store(buffer, pad, [(layout.height + layout.halo) * layout.row - layout.halo * layout.stored + i])


def _fill_slice_halo(layout: Layout, buffer: Any, pad: Any) -> None:
    """Pixel by pixel, because the channels between belong to others."""
    start = layout.origin(layout.halo, layout.halo)
    right = (layout.width + layout.halo) * layout.pitch
    areas = [  # first pixel, rows, columns
        (start, layout.halo, layout.width + 2 * layout.halo),
        (start + layout.halo * layout.row, layout.height, layout.halo),
        (start + layout.halo * layout.row + right, layout.height, layout.halo),
        (start + (layout.height + layout.halo) * layout.row, layout.halo, layout.width + 2 * layout.halo),
    ]
    for first, rows, columns in areas:
        with B.serial(rows) as y, B.serial(columns) as x, B.serial(layout.stored // VECTOR) as v:
            pixel = first + y * layout.row + x * layout.pitch
            put(buffer, splat(pad, VECTOR), pixel + v * VECTOR, VECTOR)


def fill_spare(layout: Layout, buffer: Any, pixel: Any) -> None:
    """Emit the loop that zeroes one pixel's spare channels, if they must be 0: those of floats."""
    if layout.dtype == "float32" and layout.stored > layout.channels:
        with B.serial(layout.stored - layout.channels) as i:
            B.buffer_store(buffer, T.float32(0), [pixel + layout.channels + i])
