"""Kernels that move values and compute none: concatenation, selection, flattening, copies with another halo, and any
other rearrangement by a table.

Stored channels beyond the logical ones are never taken for data: they hold anything in integers, 0 in floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from lightning_baqe.kernels.x86.emit import arguments, at, cast, fill_halo, fill_spare, put, splat
from lightning_baqe.kernels.x86.layout import VECTOR, Layout, stored_channels

MOVE_PARAMS = 2  # int64: the value of what is absent, the halo's value


@dataclass(frozen=True)
class MoveSpec:
    """Everything that the code of such a kernel depends on.

    Args:
        op: ``concat``, ``gather``, ``flatten``, ``copy``, ``move``.
        sources: layouts; one but for ``concat``.
        result: layout.
        channels: of ``gather``: ``runs``, or ``index``, by a table.
        firsts: the first channels of runs that take turns: one is a slice, two or more are shuffled together.
        pixels: of ``gather``: rows and columns are given by tables, too.
        run: of ``move``: so many channels are neighbours in the source, too, wherever they are taken from.
        absent: of ``move``: some values are not in the source.
    """

    op: str
    sources: tuple[Layout, ...]
    result: Layout
    channels: str = "runs"
    firsts: tuple[int, ...] = (0,)
    pixels: bool = False
    run: int = 1
    absent: bool = False


def emit_move(spec: MoveSpec) -> None:
    """Emit the kernel.

    Its arguments are the sources, for ``gather`` the int32 tables of channels (where by index), rows and columns (where
    by pixel), for ``move`` one of the places in the source's buffer where runs begin, pixel by pixel (-1: absent); then
    params and result.
    """
    emit = {"concat": _concat, "gather": _gather, "copy": _gather, "flatten": _flatten, "move": _move}[spec.op]
    result = spec.result
    sizes = [result.channels] * (spec.channels == "index") + [result.height, result.width] * spec.pixels
    if spec.op == "move":
        sizes = [result.height * result.width * result.channels // spec.run]
    indices = [(size, "int32") for size in sizes]
    *values, params, out = arguments("move", *spec.sources, *indices, (MOVE_PARAMS, "int64"), result)
    sources, tables = values[: len(spec.sources)], values[len(spec.sources) :]
    fill_halo(result, out, params[MOVE_PARAMS - 1])
    emit(spec, sources, tables, params, out)


def _run(channels: int, room: int, move: Any) -> None:
    """Emit ``move(first channel, lanes)`` over a run of channels: whole vectors as far as there is room for them."""
    whole = stored_channels(channels) // VECTOR if stored_channels(channels) <= room else channels // VECTOR
    if whole:
        with B.serial(whole) as v:
            move(v * VECTOR, VECTOR)
    if whole * VECTOR < channels:
        with B.serial(channels - whole * VECTOR) as c:
            move(whole * VECTOR + c, 1)


def _concat(spec: MoveSpec, sources: list[Any], tables: list[Any], params: Any, out: Any) -> None:
    result = spec.result
    with B.serial(result.height) as y, B.serial(result.width) as x:
        pixel = result.origin() + y * result.row + x * result.pitch
        begin = 0
        for buffer, source in zip(sources, spec.sources, strict=True):

            def move(
                channel: Any, lanes: int, buffer: Any = buffer, source: Layout = source, begin: int = begin
            ) -> None:
                value = at(buffer, source.origin() + y * source.row + x * source.pitch + channel, lanes)
                put(out, cast(result.dtype, lanes, value), pixel + begin + channel, lanes)

            # What a last vector writes beyond its input's channels, the next input's first one overwrites.
            _run(source.channels, result.stored - begin, move)
            begin += source.channels
        fill_spare(result, out, pixel)


def _gather(spec: MoveSpec, sources: list[Any], tables: list[Any], params: Any, out: Any) -> None:
    result, source, buffer = spec.result, spec.sources[0], sources[0]
    absent = T.Cast(result.dtype, params[0])

    def select(present: Any, value: Any, lanes: int) -> Any:
        value = cast(result.dtype, lanes, value)
        return value if present is None else T.Select(splat(present, lanes), value, splat(absent, lanes))

    with B.serial(result.height) as y, B.serial(result.width) as x:
        pixel = result.origin() + y * result.row + x * result.pitch
        present: Any = None
        row, column = y, x
        if spec.pixels:
            row, column = tables[-2][y], tables[-1][x]
            present = T.And(row >= 0, column >= 0)
            row, column = T.max(row, 0), T.max(column, 0)
        base = source.origin() + row * source.row + column * source.pitch
        if spec.channels == "index":
            with B.serial(result.channels) as c:
                there = tables[0][c] >= 0
                there = there if present is None else T.And(there, present)
                value = buffer[base + T.max(tables[0][c], 0)]
                put(out, select(there, value, 1), pixel + c, 1)
        else:
            turns = len(spec.firsts)
            steps = result.channels // turns

            def move(step: Any, lanes: int) -> None:
                parts = [at(buffer, base + first + step, lanes) for first in spec.firsts]
                for turn, part in enumerate(parts):
                    value = part
                    if turns > 1 and lanes > 1:
                        order = [i % turns * lanes + i // turns for i in range(turn * lanes, (turn + 1) * lanes)]
                        value = T.Shuffle(parts, order)
                    put(out, select(present, value, lanes), pixel + step * turns + turn * lanes, lanes)

            # A slice may take its neighbours along as spare channels; but those of floats are 0.
            is_all = spec.firsts == (0,) and result.channels == source.channels
            may_take_more = turns == 1 and (is_all or result.dtype != "float32")
            _run(steps, source.stored - spec.firsts[0] if may_take_more else steps, move)
        fill_spare(result, out, pixel)


def _flatten(spec: MoveSpec, sources: list[Any], tables: list[Any], params: Any, out: Any) -> None:
    result, source, buffer = spec.result, spec.sources[0], sources[0]
    with B.serial(source.channels) as c, B.serial(source.height) as y, B.serial(source.width) as x:
        value = buffer[source.origin() + y * source.row + x * source.pitch + c]
        put(out, cast(result.dtype, 1, value), result.origin() + (c * source.height + y) * source.width + x, 1)
    fill_spare(result, out, result.origin())


def _move(spec: MoveSpec, sources: list[Any], tables: list[Any], params: Any, out: Any) -> None:
    result, run, absent = spec.result, spec.run, T.Cast(spec.result.dtype, params[0])
    steps = result.channels // run
    with B.serial(result.height) as y, B.serial(result.width) as x:
        pixel = result.origin() + y * result.row + x * result.pitch
        with B.serial(steps) as step:
            place = tables[0][(y * result.width + x) * steps + step]
            value = cast(result.dtype, run, at(sources[0], T.max(place, 0) if spec.absent else place, run))
            if spec.absent:
                value = T.Select(splat(place >= 0, run), value, splat(absent, run))
            put(out, value, pixel + step * run, run)
        fill_spare(result, out, pixel)
