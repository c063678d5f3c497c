"""The schedule template of convolutions and matrix products on AMX's tiles; knobs: see
:mod:`lightning_baqe.kernels.x86.tile_spec`.

Input tiles are read where the values lie: 16 pixels, each 64 neighbouring values of a row of the window. What a run
lacks to a multiple of 64 has weights of 0. A tile that would pass the edge is shifted back over its neighbour.

Tile registers reach vectors only through memory. So a block's sums are stored to a buffer, and requantized a few pixels
at a time between the products of the block after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B  # the same names as T's, as functions that build; no source is parsed

from lightning_baqe.kernels.x86.conv_epilogue import PARAMS, Finished, finish
from lightning_baqe.kernels.x86.conv_knobs import Knobs
from lightning_baqe.kernels.x86.emit import arguments, at, fill_halo, named, prefetch
from lightning_baqe.kernels.x86.layout import SLACK, Layout
from lightning_baqe.kernels.x86.requantize import PACKED
from lightning_baqe.kernels.x86.tile_spec import Geometry, TileSpec, block_of, packed_length, registers, step
from lightning_baqe.kernels.x86.tiles import BYTES, COLUMNS, REGISTERS, ROWS, Tiles

_TILE = ROWS * BYTES  # weights of a register
LINE = 64


@dataclass(frozen=True)
class _Buffers:
    """The kernel's arguments."""

    source: Any
    weights: Any
    bias: Any
    numbers: Any
    params: dict[str, Any]
    other: Any
    out: Any


@dataclass(frozen=True)
class _Block:
    """One block of tiles of sums.

    Args:
        first: its first block of 16 output channels.
        starts: of each of its tiles, the first pixel: ``(row, column)``, or the place in the row of all pixels and 0.
    """

    first: Any
    starts: list[tuple[Any, Any]]


def emit_tile_conv(spec: TileSpec, knobs: Knobs) -> None:
    """Emit the kernel, a function of (source, weights, bias, numbers, params, residual, result) like that of
    :func:`~lightning_baqe.kernels.x86.conv.emit_conv`; the knobs are checked.
    """
    X, W, bias, M, params, R, Y = arguments(
        "conv", spec.source, (packed_length(spec), "int8"), (spec.result.stored, "int32"),
        (2 * spec.result.stored, "int64"), (len(PARAMS), "int64"), spec.residual or spec.source, spec.result,
    )  # fmt: skip
    P = named(params, PARAMS)
    fill_halo(spec.result, Y, P["pad"])
    kernel = _Kernel(spec, knobs, _Buffers(X, W, bias, M, P, R, Y))
    with kernel.shares() as (begin, end):
        kernel.emit(begin, end)


class _Kernel:
    def __init__(self, spec: TileSpec, knobs: Knobs, buffers: _Buffers) -> None:
        self.spec, self.knobs, self.buffers = spec, knobs, buffers
        self.at = Geometry.of(spec, block_of(knobs), knobs["pixels"] == "flat")
        self.by_channel = knobs["order"] == "channels"
        self.groups = self.at.lines * self.at.columns
        self.channel_tiles = spec.blocks // self.at.channels
        self.inner = self.groups if self.by_channel else self.channel_tiles
        self.segments, self.steps, self.unroll = spec.segments(), spec.tile_steps, knobs["unroll"]
        self.turns = self.steps // self.unroll
        self.pixels = self.at.tiles * self.at.rows  # of a block
        self.portion = min(max(1, PACKED // self.at.channels), self.pixels)  # pixels that are finished together
        self.portions = -(-self.pixels // self.portion)

    @contextmanager
    def shares(self) -> Iterator[tuple[Any, Any]]:
        """The blocks of each thread, one after the other: all of them have some."""
        total = self.groups * self.channel_tiles
        length = -(-total // self.spec.threads)
        threads = -(-total // length)
        if threads == 1:
            yield T.int32(0), T.int32(total)
            return
        with B.parallel(threads) as thread:
            yield B.Bind(thread * length), B.Bind(T.min((thread + 1) * length, T.int32(total)))

    def emit(self, begin: Any, end: Any) -> None:
        """Emit the blocks ``begin`` to ``end``."""
        sums, values, _ = registers(self.at.tiles, self.at.channels)
        self.tiles = Tiles(self.spec.how, [self.at.rows if r in (*sums, *values) else ROWS for r in range(REGISTERS)])
        self.sums = B.alloc_buffer((self.pixels * self.at.channels * COLUMNS,), "int32")
        overlapped = self.knobs["epilogue"] == "overlapped"
        with B.serial(end - begin) as index:
            number = B.Bind(begin + index)
            block = self.block(number)
            # The first block has none before it: it finishes what the buffer holds, and then again what is right.
            before = self.block(B.Bind(T.max(number - 1, begin))) if overlapped else None
            self.begin_sums(block)
            sources = [B.Bind(self.source_at(block, start)) for start in block.starts]
            with B.serial(self.segments) as segment, B.serial(self.turns) as turn:
                done = B.Bind(segment * self.turns + turn)
                self.prefetch_next(block, number, done)
                self.multiply(block, sources, segment, turn)
                if before is not None:
                    self.finish_some(before, done)
            self.store_sums()
            if before is None:
                self.finish_all(block)
        if overlapped:
            self.finish_all(self.block(B.Bind(end - 1)))
        self.tiles.release()

    def block(self, number: Any) -> _Block:
        """The block of a number in the order of the knobs."""
        outer, inner = T.floordiv(number, self.inner), T.floormod(number, self.inner)
        channel, group = (outer, inner) if self.by_channel else (inner, outer)
        group = B.Bind(group)
        starts = [tuple(B.Bind(v) for v in self.start(group, tile)) for tile in range(self.at.tiles)]
        return _Block(B.Bind(channel * self.at.channels), [(first, second) for first, second in starts])

    def start(self, group: Any, tile: int) -> tuple[Any, Any]:
        """The first pixel of a tile of a group of pixels."""
        at = self.at
        if at.flat:
            return T.min((group * at.beside + tile) * at.rows, T.int32(at.pixels - at.rows)), T.int32(0)
        line, column = T.floordiv(group, at.columns), T.floormod(group, at.columns)
        below, beside = divmod(tile, at.beside)
        y = T.min(line * at.below + below, T.int32(self.spec.result.height - 1))
        return y, T.min((column * at.beside + beside) * at.rows, T.int32(self.spec.result.width - at.rows))

    def source_at(self, block: _Block, start: tuple[Any, Any]) -> Any:
        """Where the window of a tile's first pixel begins."""
        spec, (y, x), (down, right) = self.spec, start, self.spec.stride
        origin = spec.source.origin(spec.top, spec.left) + spec.first_channel(block.first)
        if self.at.flat:
            return origin + y * spec.source.pitch
        return origin + y * (down * spec.source.row) + x * (right * spec.source.pitch)

    def begin_sums(self, block: _Block) -> None:
        """Emit the sums of a block as the bias."""
        for tile, channel in itertools.product(range(self.at.tiles), range(self.at.channels)):
            register = tile * self.at.channels + channel
            self.tiles.begin(register, self.buffers.bias, (block.first + channel) * COLUMNS)

    def multiply(self, block: _Block, sources: list[Any], segment: Any, turn: Any) -> None:
        """Emit one turn of the innermost loop."""
        offset = B.Bind(self.spec.segment_offset(segment) + turn * (self.unroll * BYTES))
        length = self.segments * self.steps * _TILE  # of 16 output channels
        first = B.Bind(block.first * length + (segment * self.steps + turn * self.unroll) * (self.at.channels * _TILE))
        pitch = self.spec.stride[1] * self.spec.source.pitch
        for u in range(self.unroll):
            held: dict[tuple[str, int], int] = {}
            for kind, index, register in step(self.at.tiles, self.at.channels):
                if kind == "values":
                    self.tiles.load(register, self.buffers.source, sources[index] + offset + u * BYTES, pitch)
                elif kind == "weights":
                    place = first + (u * self.at.channels + index) * _TILE
                    self.tiles.load(register, self.buffers.weights, place, BYTES)
                else:
                    tile, channel = index, register
                    sums = tile * self.at.channels + channel
                    self.tiles.add(sums, held["values", tile], held["weights", channel])
                    continue
                held[kind, index] = register

    def prefetch_next(self, block: _Block, number: Any, done: Any) -> None:
        """Emit hints for the next channels' weights, a part of them in each turn."""
        if self.knobs["ahead"] == "off" or self.channel_tiles == 1:
            return
        length = self.at.channels * self.segments * self.steps * _TILE
        turns = self.segments * self.turns * (self.groups if self.by_channel else 1)
        fetches = -(-length // (LINE * turns))
        turn = T.floormod(number, self.inner) * (self.segments * self.turns) + done if self.by_channel else done
        following = T.floordiv(block.first, self.at.channels) + 1
        line = B.Bind(following * (length // LINE) + turn * fetches)
        for index in range(fetches):
            prefetch(self.buffers.weights, T.min((line + index) * LINE, T.int32(packed_length(self.spec) - 1)))

    def store_sums(self) -> None:
        """Emit a block's sums to the buffer: pixel by pixel, of each all its channels."""
        pitch = self.at.channels * COLUMNS
        for tile, channel in itertools.product(range(self.at.tiles), range(self.at.channels)):
            place = tile * self.at.rows * pitch + channel * COLUMNS
            self.tiles.store(tile * self.at.channels + channel, self.sums, place, pitch)

    def finish_some(self, block: _Block, done: Any) -> None:
        """Emit the results of a few pixels, so that all are finished after the last turn."""
        turns = self.segments * self.turns
        each = -(-self.portions // turns)
        for index in range(each):
            portion = B.Bind(done * each + index)
            if turns * each > self.portions:
                with B.If(portion < self.portions), B.Then():
                    self.finish(block, portion)
            else:
                self.finish(block, portion)

    def finish_all(self, block: _Block) -> None:
        """Emit the results of a block."""
        with B.serial(self.portions) as portion:
            self.finish(block, portion)

    def finish(self, block: _Block, portion: Any) -> None:
        """Emit the results of some pixels, all channels of the block."""
        vectors, channels = [], self.at.channels
        for index in range(self.portion):
            pixel = portion * self.portion + index
            if self.pixels % self.portion:
                pixel = T.min(pixel, T.int32(self.pixels - 1))
            pixel = B.Bind(pixel)
            place = self.place(self.spec.result, block, pixel)
            other = None if self.spec.residual is None else self.place(self.spec.residual, block, pixel)
            for channel in range(channels):
                moved = channel * COLUMNS
                sums = at(self.sums, (pixel * channels + channel) * COLUMNS, COLUMNS)
                to = None if other is None else other + moved
                vectors.append(Finished(sums, block.first + channel, index, place + moved, to))
        finish(self.spec, vectors, self.buffers.numbers, self.buffers.params, self.buffers.other, self.buffers.out)

    def place(self, layout: Layout, block: _Block, pixel: Any) -> Any:
        """Where a pixel of a block begins in a layout, at the block's channels. One of the halo, which is no result,
        lies where nobody reads: past the end.
        """
        rows = self.at.rows
        first, second = block.starts[0]
        if self.at.tiles > 1:
            tile, inside = B.Bind(T.floordiv(pixel, rows)), B.Bind(T.floormod(pixel, rows))
            for index, (y, x) in enumerate(block.starts[1:], 1):
                first = T.Select(tile >= index, y, first)
                second = T.Select(tile >= index, x, second)
        else:
            inside = pixel
        channel = block.first * COLUMNS
        if not self.at.flat:
            return B.Bind(layout.origin() + first * layout.row + (second + inside) * layout.pitch + channel)
        flat = B.Bind(first + inside)
        y = B.Bind(T.floordiv(flat, self.spec.across))
        x = B.Bind(flat - y * self.spec.across)
        place = layout.origin() + y * layout.row + x * layout.pitch + channel
        if self.spec.across == self.spec.result.width:
            return B.Bind(place)
        return B.Bind(T.Select(x < self.spec.result.width, place, T.int32(layout.length - SLACK)))
