"""The schedule template of dense and grouped convolutions and matrix products, integer and float.

The kernel holds a tile of ``oct`` register-wide blocks of output channels x ``oht`` x ``owt`` pixels in registers and
walks the window: rows of the kernel outside, runs of ``kernel_w * channels`` contiguous input values inside. A tile
that would pass the edge is shifted back over its neighbour, so any size works without a branch.

A block of a grouped convolution takes only the channels of its own groups; depthwise ones have a template of their own.

Its knobs are those of :mod:`lightning_baqe.kernels.x86.conv_knobs`.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B  # the same names as T's, as functions that build; no source is parsed

from lightning_baqe.kernels.x86.conv_epilogue import PARAMS, Finished, finish
from lightning_baqe.kernels.x86.conv_knobs import Knobs, inner_channels, sizes, with_intrinsic
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.emit import arguments, at, fill_halo, named, prefetch, put, tile_loops, tile_start
from lightning_baqe.kernels.x86.layout import Layout

Sums = dict[tuple[int, int, int], Any]  # buffers of a tile's accumulators, by row, column and block
LINE = 64  # bytes of a cache line
FETCHED_AHEAD = 2**17  # bytes of weights; fewer stay in the second-level cache from one inference to the next


class _Tiled:
    """A spec with its knobs: the sizes of the kernel's loops and of its weights."""

    def __init__(self, spec: ConvSpec, knobs: Knobs) -> None:
        self.spec = spec = with_intrinsic(spec, knobs)
        self.packed, self.unroll, self.inner = knobs["weights"] == "packed", knobs["unroll"], inner_channels(knobs)
        self.blocks, self.rows, self.columns = sizes(knobs)
        self.by_channel = knobs["order"] == "channels"
        self.channel_tiles = -(-spec.blocks // self.blocks)
        self.row_tiles, self.column_tiles = -(-spec.result.height // self.rows), -(-spec.result.width // self.columns)
        self.segments, self.group = spec.segments(self.inner), spec.group(self.packed)
        self.steps = spec.steps(self.packed, self.inner)
        self.turns = self.steps // (self.group if spec.chain > 1 else self.group * self.unroll)
        self.block_length = self.segments * self.steps * (spec.lanes * (2 if self.packed else spec.arithmetic.quad))
        self.weight_dtype = "uint8" if self.packed else spec.arithmetic.weight_dtype

    def weights(self, buffer: Any, quad: Any, index: int) -> list[Any]:
        """The weight vectors of quad ``quad + index``, where ``quad`` begins a group."""
        lanes = self.spec.lanes
        if not self.packed:
            return self.spec.arithmetic.weights(buffer, quad + index, lanes)
        byte = buffer[T.ramp((quad + index - index % 2) * (lanes * 2), 1, lanes * 4)]
        if index % 2:
            nibble = T.shift_right(byte, T.broadcast(T.uint8(4), lanes * 4))
        else:
            nibble = T.bitwise_and(byte, T.broadcast(T.uint8(15), lanes * 4))
        return [T.reinterpret(nibble, dtype=f"int8x{lanes * 4}") - T.broadcast(T.int8(8), lanes * 4)]

    def prefetch_next(self, weights: Any, block: Any, tile: Any, segment: Any, turn: Any) -> None:
        """Emit hints for the next tile's weights, while a tile's own are used again and again.

        Args:
            weights: the buffer.
            block: the tile's first.
            tile, segment, turn: how often these weights were used, and how much of them this time.
        """
        itemsize, length = np.dtype(self.weight_dtype).itemsize, self.spec.blocks * self.block_length
        if length * itemsize < FETCHED_AHEAD or self.channel_tiles == 1:
            return
        passes = self.column_tiles * (self.row_tiles if self.by_channel else 1)
        fetches = -(-self.blocks * self.block_length * itemsize // (LINE * passes * self.segments * self.turns))
        done = (tile * self.segments + segment) * self.turns + turn
        line = (block + self.blocks) * (self.block_length * itemsize // LINE) + done * fetches
        for index in range(fetches):
            prefetch(weights, T.min((line + index) * (LINE // itemsize), T.int32(length - 1)))


def _accumulate(
    tiled: _Tiled, acc: Sums, source: Any, weights: Any, corner: tuple[Any, Any, Any], segment: Any, turn: Any
) -> None:
    """Emit one turn of the innermost loop, for all sums of a tile; ``corner`` is its first block, row and column."""
    spec, arithmetic, (block, y, x) = tiled.spec, tiled.spec.arithmetic, corner
    layout, (stride_y, stride_x), vector = spec.source, spec.stride, T.ramp(0, 1, spec.lanes)

    def offset_of(h: int, w: int, c: int, group: Any) -> Any:
        offset = layout.origin(spec.top, spec.left) + (y + h) * (stride_y * layout.row)
        offset = offset + (x + w) * (stride_x * layout.pitch) + spec.segment_offset(segment, tiled.inner)
        return offset + spec.first_channel(block + c) + group * (tiled.group * arithmetic.quad)

    def quad_of(c: int, group: Any) -> Any:
        return ((block + c) * tiled.segments + segment) * tiled.steps + group * tiled.group

    if spec.chain > 1:
        # Blocks that read the same input channels for sure share their words.
        for blocks in [range(tiled.blocks)] if spec.groups == 1 else [[block] for block in range(tiled.blocks)]:
            part = {place: buffer for place, buffer in acc.items() if place[2] in blocks}
            offsets = {(h, w): offset_of(h, w, blocks[0], turn) for h, w, c in part if c == blocks[0]}
            _add_chains(tiled, part, source, weights, offsets, {c: quad_of(c, turn) for c in blocks})
        return
    for u, (h, w, c) in itertools.product(range(tiled.unroll), acc):
        group = turn * tiled.unroll + u
        total, offset, quad = acc[h, w, c][vector], offset_of(h, w, c, group), quad_of(c, group)
        for index in range(tiled.group):
            word = arithmetic.word(source, offset + index * arithmetic.quad)
            total = arithmetic.step(total, [word], tiled.weights(weights, quad, index), spec.lanes)
        B.buffer_store(acc[h, w, c], total, [vector])


def _add_chains(
    tiled: _Tiled, acc: Sums, source: Any, weights: Any, offsets: dict[tuple[int, int], Any], quads: dict[int, Any]
) -> None:
    """Emit one group of quads in chains of int16 sums.

    All sums of the tile grow together, quad by quad: one after the other, each would want its weights again, and all of
    them would be kept in registers that there are not.

    ``offsets`` are ``{(row, column): of the first input value}``, ``quads`` are ``{block: the first quad}``.
    """
    spec, arithmetic = tiled.spec, tiled.spec.arithmetic
    lanes, halves = spec.lanes, T.ramp(0, 1, 2 * spec.lanes)
    sums = {at: B.alloc_buffer((2 * lanes,), "int16") for at in acc}
    body = min(spec.chain, 2 * tiled.unroll)  # in pairs of quads
    for first in range(0, tiled.group, spec.chain):
        for short in sums.values():
            B.buffer_store(short, T.broadcast(T.int16(0), 2 * lanes), [halves])
        with B.serial(spec.chain // body) as part:
            for index in range(body):
                at_quad = part * body + first
                vectors = {c: B.Bind(tiled.weights(weights, quad + at_quad, index)[0]) for c, quad in quads.items()}
                for (h, w), offset in offsets.items():
                    word = B.Bind(arithmetic.word(source, offset + (at_quad + index) * arithmetic.quad))
                    for c, weight in vectors.items():
                        products = arithmetic.short(T.broadcast(word, lanes), weight, lanes)
                        B.buffer_store(sums[h, w, c], sums[h, w, c][halves] + products, [halves])
        for place, buffer in acc.items():
            put(buffer, arithmetic.widened(at(buffer, 0, lanes), sums[place][halves], lanes), 0, lanes)


def _store(
    spec: ConvSpec, acc: Sums, corner: tuple[Any, Any, Any], numbers: Any, params: dict[str, Any], other: Any, out: Any
) -> None:
    """Emit a tile's results."""
    block, y, x = corner

    def place(layout: Layout, h: int, w: int, c: int) -> Any:
        return layout.origin() + (y + h) * layout.row + (x + w) * layout.pitch + (block + c) * spec.lanes

    residual = spec.residual
    finish(
        spec,
        [
            Finished(
                at(sums, 0, spec.lanes),
                block + c,
                (h, w),
                place(spec.result, h, w, c),
                None if residual is None else place(residual, h, w, c),
            )
            for (h, w, c), sums in acc.items()
        ],
        *(numbers, params, other, out),
    )


def emit_conv(spec: ConvSpec, knobs: Knobs) -> None:
    """Emit the kernel, a function of (source, weights, bias, numbers, params, residual, result); the knobs are checked.

    Numbers are those of :func:`~lightning_baqe.kernels.x86.requantize.requant_numbers`.
    """
    tiled = _Tiled(spec, knobs)
    spec, lanes, dtype = tiled.spec, tiled.spec.lanes, tiled.spec.arithmetic.dtype
    source, result = spec.source, spec.result
    X, W, bias, M, params, R, Y = arguments(
        "conv", source, (spec.blocks * tiled.block_length, tiled.weight_dtype), (result.stored, dtype),
        (2 * result.stored, "int64"), (len(PARAMS), "int64"), spec.residual or source, result,
    )  # fmt: skip
    P = named(params, PARAMS)
    fill_halo(result, Y, P["pad"])
    extents = tiled.channel_tiles, tiled.row_tiles
    with (
        tile_loops(*extents, tiled.by_channel, spec.threads) as (channel_tile, row_tile),
        B.serial(tiled.column_tiles) as column_tile,
    ):
        # One buffer for each: from 1024 bytes on, and in scope "local", TVM takes them from a workspace.
        tile = itertools.product(range(tiled.rows), range(tiled.columns), range(tiled.blocks))
        acc = {place: B.alloc_buffer((lanes,), dtype) for place in tile}
        block = B.Bind(tile_start(channel_tile, spec.blocks, tiled.blocks))
        y = B.Bind(tile_start(row_tile, result.height, tiled.rows))
        x = B.Bind(tile_start(column_tile, result.width, tiled.columns))
        for (_, _, c), sums in acc.items():
            put(sums, at(bias, (block + c) * lanes, lanes), 0, lanes)
        with B.serial(tiled.segments) as segment, B.serial(tiled.turns) as turn:
            done = row_tile * tiled.column_tiles + column_tile if tiled.by_channel else column_tile
            tiled.prefetch_next(W, block, done, segment, turn)
            _accumulate(tiled, acc, X, W, (block, y, x), segment, turn)
        _store(spec, acc, (block, y, x), M, P, R, Y)
