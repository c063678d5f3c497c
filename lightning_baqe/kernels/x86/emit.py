"""Expressions and loops that several kernel templates share. Vectors of one lane are scalars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def arguments(name: str, *kinds: Layout | tuple[Any, str]) -> list[Any]:
    """Emit a kernel's head: its name and its buffers, given by layout or by shape and type."""
    B.func_name(name)
    shapes = [(kind.length, kind.dtype) if isinstance(kind, Layout) else kind for kind in kinds]
    buffers = [B.arg(f"A{i}", B.buffer(shape, dtype)) for i, (shape, dtype) in enumerate(shapes)]
    B.func_attr({"tirx.noalias": True})  # a kernel's buffers never overlap
    return buffers


def named(params: Any, names: Sequence[str]) -> dict[str, Any]:
    """The numbers of the int64 buffer ``params`` by their names."""
    return {name: params[index] for index, name in enumerate(names)}


def param(params: Any, index: int, dtype: str, lanes: int) -> Any:
    """A number of the int64 buffer ``params`` in all lanes."""
    return splat(T.Cast(dtype, params[index]), lanes)


@contextmanager
def tile_loops(channels: int, rows: int, by_channel: bool, threads: int) -> Iterator[tuple[Any, Any]]:
    """Loops over tiles of channels and of rows, in one order or the other; threads share their product, because one of
    them alone may be too short.
    """
    first, second = (channels, rows) if by_channel else (rows, channels)
    if threads > 1:
        with B.parallel(first * second) as both:
            loops = T.floordiv(both, second), T.floormod(both, second)
            yield loops if by_channel else loops[::-1]
    else:
        with B.serial(first) as outer, B.serial(second) as inner:
            yield (outer, inner) if by_channel else (inner, outer)


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
    if not any(layout.halo):
        return
    pad = T.Cast(layout.dtype, value)
    if layout.shared:
        _fill_slice_halo(layout, buffer, pad)
        return
    sides = layout.halo[1] * layout.stored
    edge = layout.halo[0] * layout.row + sides
    # Top rows with the first left edge; then right edge plus next left edge, row by row; the last right edge and below.
    with B.serial(edge) as i:
        B.buffer_store(buffer, pad, [i])
    if sides:
        with B.serial(layout.height - 1) as y, B.serial(2 * sides) as i:
            B.buffer_store(buffer, pad, [edge + layout.width * layout.stored + y * layout.row + i])
    with B.serial(edge) as i:
        B.buffer_store(buffer, pad, [(layout.height + layout.halo[0]) * layout.row - sides + i])


def _fill_slice_halo(layout: Layout, buffer: Any, pad: Any) -> None:
    """Pixel by pixel, because the channels between belong to others."""
    (above, left), (_, width), start = layout.halo, layout.full, layout.origin(*layout.halo)
    right = (layout.width + left) * layout.pitch
    areas = [  # first pixel, rows, columns
        (start, above, width),
        (start + above * layout.row, layout.height, left),
        (start + above * layout.row + right, layout.height, left),
        (start + (layout.height + above) * layout.row, above, width),
    ]
    for first, rows, columns in [area for area in areas if area[1] * area[2]]:
        with B.serial(rows) as y, B.serial(columns) as x, B.serial(layout.stored // VECTOR) as v:
            pixel = first + y * layout.row + x * layout.pitch
            put(buffer, splat(pad, VECTOR), pixel + v * VECTOR, VECTOR)


def fill_spare(layout: Layout, buffer: Any, pixel: Any) -> None:
    """Emit the loop that zeroes one pixel's spare channels, if they must be 0: those of floats."""
    if layout.dtype == "float32" and layout.stored > layout.channels:
        with B.serial(layout.stored - layout.channels) as i:
            B.buffer_store(buffer, T.float32(0), [pixel + layout.channels + i])
