"""The schedule template of dense and grouped convolutions and matrix products, integer and float.

The kernel holds a tile of ``oct`` register-wide blocks of output channels x ``oht`` x ``owt`` pixels in registers and
walks the window: rows of the kernel outside, runs of ``kernel_w * channels`` contiguous input values inside. A tile
that would pass the edge is shifted back over its neighbour, so any size works without a branch.

A block of a grouped convolution takes only the channels of its own groups; depthwise ones have a template of their own.

Kernels are emitted with TVM's IR builder: TVMScript's parser would take 40 times as long, most of a build.

Its knobs are those of :mod:`lightning_baqe.kernels.x86.conv_knobs`.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B  # the same names as T's, as functions that build; no source is parsed

from lightning_baqe.kernels.x86.arithmetic import pair_products, quad_of, step, widened_sum
from lightning_baqe.kernels.x86.conv_knobs import check_knobs, inner_channels, with_intrinsic
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.conv_weights import weight_dtype
from lightning_baqe.kernels.x86.emit import fill_halo, prefetch, tile_loops, tile_start
from lightning_baqe.kernels.x86.requantize import (
    clipped,
    cut,
    packed_bytes,
    requantized,
    requantized_wide,
    store_bytes,
)

LINE = 64  # bytes of a cache line
FETCHED_AHEAD = 2**17  # bytes of weights; fewer stay in the second-level cache from one inference to the next
PARAMS = ("shift", "zero_point", "low", "high", "m_conv", "m_residual", "add_shift", "add_offset", "add_zero_point",
          "add_low", "add_high", "pad")  # fmt: skip


def _load_words(spec: ConvSpec, source: Any, offset: Any) -> Any:
    if spec.dot == "fma":
        return source[offset]
    if spec.dot == "portable":
        return T.Cast("int32", source[offset])
    return T.reinterpret(source[T.ramp(offset, 1, 4)], dtype="int32")


def _load_weights(spec: ConvSpec, packed: bool, weights: Any, quad: Any, index: int) -> list[Any]:
    """The weight vectors of quad ``quad + index``, where ``quad`` begins a group."""
    lanes = spec.lanes
    if packed:
        byte = weights[T.ramp((quad + index - index % 2) * (lanes * 2), 1, lanes * 4)]
        if index % 2:
            nibble = T.shift_right(byte, T.broadcast(T.uint8(4), lanes * 4))
        else:
            nibble = T.bitwise_and(byte, T.broadcast(T.uint8(15), lanes * 4))
        return [T.reinterpret(nibble, dtype=f"int8x{lanes * 4}") - T.broadcast(T.int8(8), lanes * 4)]
    if spec.dot == "madd16":
        base = (quad + index) * (lanes * 4)
        return [weights[T.ramp(base, 1, lanes * 2)], weights[T.ramp(base + lanes * 2, 1, lanes * 2)]]
    width = lanes * quad_of(spec.dot)
    return [weights[T.ramp((quad + index) * width, 1, width)]]


def _reduce(spec: ConvSpec, packed: bool, acc: Any, source: Any, weights: Any, offset: Any, quad: Any) -> Any:
    """The accumulators after one group of quads, none of them in a chain, as one expression."""
    for index in range(spec.group(packed)):
        word = _load_words(spec, source, offset + index * quad_of(spec.dot))
        acc = step(spec.dot, spec.lanes, acc, [word], _load_weights(spec, packed, weights, quad, index))
    return acc


def _add_chains(
    spec: ConvSpec, packed: bool, unroll: int, acc: Any, source: Any, weights: Any, offsets: Any, quads: Any
) -> None:
    """Emit one group of quads in chains of int16 sums.

    All sums of the tile grow together, quad by quad: one after the other, each would want its weights again, and all of
    them would be kept in registers that there are not.

    Args:
        acc: ``{(row, column, block): buffer}``.
        unroll: of the loop over a chain, in pairs of quads.
        offsets: ``{(row, column): of the first input value}``.
        quads: ``{block: the first quad}``.
    """
    wide = 2 * spec.lanes
    halves = T.ramp(0, 1, wide)
    sums = {at: B.alloc_buffer((wide,), "int16") for at in acc}
    body = min(spec.chain, 2 * unroll)
    for first in range(0, spec.group(packed), spec.chain):
        for at in acc:
            B.buffer_store(sums[at], T.broadcast(T.int16(0), wide), [halves])
        with B.serial(spec.chain // body) as part:
            for index in range(body):
                at_quad = part * body + first
                vectors = {
                    c: B.Bind(_load_weights(spec, packed, weights, quad + at_quad, index)[0])
                    for c, quad in quads.items()
                }
                for (h, w), offset in offsets.items():
                    word = _load_words(spec, source, offset + (at_quad + index) * quad_of(spec.dot))
                    word = B.Bind(word)
                    for c, vector in vectors.items():
                        total = sums[h, w, c][halves] + pair_products(word, vector, spec.lanes)
                        B.buffer_store(sums[h, w, c], total, [halves])
        for at, buffer in acc.items():
            vector = T.ramp(0, 1, spec.lanes)
            B.buffer_store(buffer, widened_sum(buffer[vector], sums[at][halves], spec.lanes), [vector])


def _readers_of_one(spec: ConvSpec, blocks: int) -> list[list[int]]:
    """The blocks of a tile, by those that read the same input channels for sure."""
    return [list(range(blocks))] if spec.groups == 1 else [[block] for block in range(blocks)]


def _param(params: Any, name: str) -> Any:
    return params[PARAMS.index(name)]


def _bounds(params: Any, prefix: str = "") -> tuple[Any, Any, Any]:
    zero_point, low, high = (_param(params, prefix + name) for name in ("zero_point", "low", "high"))
    return zero_point, low, high


def _residual_sum(spec: ConvSpec, value: Any, residual: Any, params: Any) -> Any:
    """The sum with the other operand, int32: clipped, or before zero point and clipping where bytes are packed."""
    lanes, width = spec.lanes, "int32" if spec.narrow_add else "int64"

    def scalar(number: Any) -> Any:
        return T.broadcast(T.Cast(width, number), lanes)

    shift = _param(params, "add_shift")
    rounding = _param(params, "add_offset") + T.shift_left(T.int64(1), shift - T.int64(1))
    total = (
        T.Cast(f"{width}x{lanes}", value) * scalar(_param(params, "m_conv"))
        + T.Cast(f"{width}x{lanes}", residual) * scalar(_param(params, "m_residual"))
        + scalar(rounding)
    )
    total = T.shift_right(total, scalar(shift))
    if spec.packs_bytes:
        return total if spec.narrow_add else cut(total, lanes)
    return T.Cast(f"int32x{lanes}", clipped(total, *_bounds(params, "add_"), width, lanes))


def _int32_results(spec: ConvSpec, acc: Any, numbers: Any, block: Any, residual: Any, params: Any) -> Any:
    """One vector of requantized results, int32, before the last zero point and clipping where bytes are packed."""
    lanes, shift = spec.lanes, _param(params, "shift")
    if not (spec.narrow or spec.high):
        value = requantized_wide(acc, numbers, block, shift, _bounds(params), lanes)
    else:
        value = requantized(acc, numbers, block, shift, lanes, spec.high)
        if not spec.packs_bytes or spec.residual is not None:
            value = clipped(value, *_bounds(params), "int32", lanes)
    return value if spec.residual is None else _residual_sum(spec, value, residual, params)


@functools.lru_cache(maxsize=4096)
def build_conv(spec: ConvSpec, knobs_items: tuple[tuple[str, Any], ...]) -> Any:
    """The kernel as a TIR function of (source, weights, bias, numbers, params, residual, result).

    Numbers are those of :func:`~lightning_baqe.kernels.x86.requantize.requant_numbers`.
    """
    knobs = check_knobs(spec, dict(knobs_items))
    spec, inner = with_intrinsic(spec, knobs), inner_channels(knobs)
    oct_, oht, owt = map(int, knobs["tile"].split("x"))
    packed, unroll = knobs["weights"] == "packed", knobs["unroll"]
    lanes = spec.lanes
    vector = T.ramp(0, 1, lanes)
    tile = list(itertools.product(range(oht), range(owt), range(oct_)))
    source, result = spec.source, spec.result
    residual = spec.residual or source
    has_residual = spec.residual is not None
    is_float = spec.dot == "fma"
    kind = "float32" if is_float else "int32"
    quad, group, steps = quad_of(spec.dot), spec.group(packed), spec.steps(packed, inner)
    chained = spec.dot == "maddubs" and spec.chain > 1
    outer = steps // (group if chained else group * unroll)
    segments = spec.segments(inner)
    kh, kw = spec.kernel
    sh, sw = spec.stride
    start = source.origin(spec.top, spec.left)
    channel_tiles, row_tiles, column_tiles = -(-spec.blocks // oct_), -(-result.height // oht), -(-result.width // owt)
    by_channel = knobs["order"] == "channels"
    first_extent = channel_tiles if by_channel else row_tiles
    second_extent = row_tiles if by_channel else channel_tiles
    block_length = segments * steps * (lanes * (quad if not packed else 2))
    weights_length = spec.blocks * block_length
    weights_dtype = weight_dtype(spec, knobs)
    itemsize = np.dtype(weights_dtype).itemsize
    # While a tile's weights are used, again and again, those of the next tile come from memory.
    passes = column_tiles * (row_tiles if by_channel else 1)
    fetches = -(-oct_ * block_length * itemsize // (LINE * passes * segments * outer))
    if weights_length * itemsize < FETCHED_AHEAD or channel_tiles == 1:
        fetches = 0
    row_dilation, column_dilation = spec.dilation

    def segment_offset(segment: Any) -> Any:
        if inner:
            tap = T.floormod(segment, kh * kw)
            return T.floordiv(segment, kh * kw) * inner + tap_offset(tap)
        return segment * (row_dilation * source.row) if spec.whole_rows else tap_offset(segment)

    def tap_offset(segment: Any) -> Any:
        return T.floordiv(segment, kw) * (row_dilation * source.row) + T.floormod(segment, kw) * (
            column_dilation * source.pitch
        )

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("conv")
        X = B.arg("X", B.buffer((source.length,), source.dtype))
        W = B.arg("W", B.buffer((weights_length,), weights_dtype))
        bias = B.arg("B", B.buffer((result.stored,), kind))
        M = B.arg("M", B.buffer((2 * result.stored,), "int64"))
        P = B.arg("P", B.buffer((len(PARAMS),), "int64"))
        R = B.arg("R", B.buffer((residual.length,), residual.dtype))
        Y = B.arg("Y", B.buffer((result.length,), result.dtype))
        B.func_attr({"tirx.noalias": True})
        fill_halo(result, Y, P[PARAMS.index("pad")])
        with tile_loops(first_extent, second_extent, spec.threads) as (first, second), B.serial(column_tiles) as tw:
            # One buffer for each: from 1024 bytes on, and in scope "local", TVM takes them from a workspace.
            acc = {at: B.alloc_buffer((lanes,), kind) for at in tile}
            block = B.Bind(tile_start(first if by_channel else second, spec.blocks, oct_))
            oy = B.Bind(tile_start(second if by_channel else first, result.height, oht))
            ox = B.Bind(tile_start(tw, result.width, owt))
            for h, w, c in tile:
                B.buffer_store(acc[h, w, c], bias[T.ramp((block + c) * lanes, 1, lanes)], [vector])
            with B.serial(segments) as s, B.serial(outer) as r:
                if fetches:
                    done = ((second * column_tiles + tw if by_channel else tw) * segments + s) * outer + r
                    line = (block + oct_) * (block_length * itemsize // LINE) + done * fetches
                    for index in range(fetches):
                        prefetch(W, T.min((line + index) * (LINE // itemsize), T.int32(weights_length - 1)))

                def offset_of(h: int, w: int, c: int, groups: Any, s: Any = s) -> Any:
                    offset = start + (oy + h) * (sh * source.row) + (ox + w) * (sw * source.pitch) + segment_offset(s)
                    return offset + spec.first_channel(block + c) + groups * (group * quad)

                def quad_index(c: int, groups: Any, s: Any = s) -> Any:
                    return ((block + c) * segments + s) * steps + groups * group

                if chained:
                    for blocks in _readers_of_one(spec, oct_):
                        offsets = {(h, w): offset_of(h, w, blocks[0], r) for h in range(oht) for w in range(owt)}
                        part = {at: buffer for at, buffer in acc.items() if at[2] in blocks}
                        quads = {c: quad_index(c, r) for c in blocks}
                        _add_chains(spec, packed, unroll, part, X, W, offsets, quads)
                else:
                    for u, (h, w, c) in itertools.product(range(unroll), tile):
                        groups = r * unroll + u
                        total = _reduce(
                            spec, packed, acc[h, w, c][vector], X, W, offset_of(h, w, c, groups), quad_index(c, groups)
                        )
                        B.buffer_store(acc[h, w, c], total, [vector])
            if spec.epilogue.startswith("requant"):
                values, places = [], []
                for h, w, c in tile:
                    channel = (block + c) * lanes
                    to = result.origin() + (oy + h) * result.row + (ox + w) * result.pitch + channel
                    other = residual.origin() + (oy + h) * residual.row + (ox + w) * residual.pitch + channel
                    extra = R[T.ramp(other, 1, lanes)] if has_residual else None
                    values.append(_int32_results(spec, acc[h, w, c][vector], M, block + c, extra, P))
                    places.append(((h, w), to))
                if spec.packs_bytes:
                    bounds = _bounds(P, "add_" if has_residual else "")
                    store_bytes(Y, values, places, lambda part: packed_bytes(part, *bounds, lanes), lanes)
                else:
                    for value, (_, to) in zip(values, places, strict=True):
                        B.buffer_store(Y, T.Cast(f"{result.dtype}x{lanes}", value), [T.ramp(to, 1, lanes)])
            else:
                for h, w, c in tile:
                    to = result.origin() + (oy + h) * result.row + (ox + w) * result.pitch + (block + c) * lanes
                    total = acc[h, w, c][vector]
                    if spec.epilogue == "float_relu":
                        total = T.max(total, T.broadcast(T.float32(0), lanes))
                    B.buffer_store(Y, total, [T.ramp(to, 1, lanes)])
    return builder.get()
