"""The schedule template of dense and grouped convolutions and matrix products, integer and float.

The kernel holds a tile of ``oct`` register-wide blocks of output channels x ``oht`` x ``owt`` pixels in registers and
walks the window: rows of the kernel outside, runs of ``kernel_w * channels`` contiguous input values inside. A tile
that would pass the edge is shifted back over its neighbour, so any size works without a branch.

A block of a grouped convolution takes only the channels of its own groups; depthwise ones have a template of their own.

Kernels are emitted with TVM's IR builder: TVMScript's parser would take 40 times as long, most of a build.

Knobs (in BAQE's terms, section III-B):

| knob | values | meaning |
| --- | --- | --- |
| tile | ``"oct x oht x owt"`` | tile sizes over output channels (in register widths), height and width |
| order | ``channels``, ``pixels`` | the outermost loop: a block's weights stay in cache, or a tile's inputs |
| unroll | 1, 2, 4 | steps of the reduction in one loop body; of a chain, in pairs |
| weights | ``bytes``, ``packed`` | 4-bit weights widened to bytes on load of the artifact, or expanded in registers |
| reduction | ``window``, ``channels/64`` | outermost in the sum: rows of the window, or tiles of 64 channels |
| intrinsic | ``on``, ``off`` | the dot-product instructions, or plain 32-bit arithmetic |
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B  # the same names as T's, as functions that build; no source is parsed

from lightning_baqe.deploy.dot import pair_products, quad_of, step, widened_sum
from lightning_baqe.deploy.emit import fill_halo, prefetch, tile_loops, tile_start
from lightning_baqe.deploy.layout import Layout
from lightning_baqe.deploy.requantize import (
    clipped,
    cut,
    packed_bytes,
    requantized,
    requantized_wide,
    store_bytes,
)
from lightning_baqe.errors import ConfigError

Knobs = Mapping[str, Any]
LINE = 64  # bytes of a cache line
CHANNEL_TILES = (16, 32, 64, 128, 256)
CHOICES = {"order": ("channels", "pixels"), "weights": ("bytes", "packed"), "intrinsic": ("on", "off")}
FETCHED_AHEAD = 2**17  # bytes of weights; fewer stay in the second-level cache from one inference to the next
PARAMS = ("shift", "zero_point", "low", "high", "m_conv", "m_residual", "add_shift", "add_offset", "add_zero_point",
          "add_low", "add_high", "pad")  # fmt: skip


@dataclass(frozen=True)
class ConvSpec:
    """Everything that a kernel's code depends on, knobs apart. Numbers such as scales are data, not code.

    Args:
        dot, chain: see :mod:`lightning_baqe.deploy.dot`.
        lanes, registers: of the target.
        source, result: layouts of input and output; the output's channels are stored.
        kernel, stride, dilation: ``(height, width)``.
        top, left: padding before the first row and column.
        epilogue: ``acc`` (int32 accumulators), ``requant``, ``requant_add``, ``float``, ``float_relu``.
        narrow: the requantized value fits 32 bits before it is clipped.
        residual: layout of the other operand of a fused residual sum.
        narrow_add: the residual sum fits 32 bits.
        weight_bits: that storage needs, 4 or 8: the code for 3 bits is that for 4, and measured once. 32 = float.
        threads: that share the tiles.
        groups: of channels; of more than one, a block reads ``span`` channels of each pixel.
        high: the shift of the requantization is 32 or more.
    """

    dot: str
    chain: int
    lanes: int
    registers: int
    source: Layout
    result: Layout
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    top: int
    left: int
    epilogue: str
    narrow: bool = True
    residual: Layout | None = None
    narrow_add: bool = True
    weight_bits: int = 8
    threads: int = 1
    groups: int = 1
    high: bool = False

    @property
    def blocks(self) -> int:
        """Register-wide blocks of output channels."""
        return self.result.stored // self.lanes

    @property
    def packs_bytes(self) -> bool:
        """Whether results are requantized to unsigned bytes, four vectors at a time."""
        packs = self.epilogue.startswith("requant") and self.result.dtype == "uint8" and self.dot != "portable"
        return packs and (self.narrow or self.high or self.residual is not None)

    @property
    def whole_rows(self) -> bool:
        """Whether a row of the window is one run of input values."""
        neighbours = self.kernel[1] == 1 or not self.source.shared
        return self.dilation[1] == 1 and self.groups == 1 and neighbours

    @property
    def span(self) -> int:
        """Neighbouring input channels that a block reads: those of all groups that it has a channel of."""
        if self.groups == 1:
            return self.source.stored
        inner, outer = self.source.channels // self.groups, self.result.channels // self.groups
        ends = [min(first + self.lanes, self.result.channels) for first in range(0, self.result.channels, self.lanes)]
        return max(-(-end // outer) - b * self.lanes // outer for b, end in enumerate(ends)) * inner

    def first_channel(self, block: Any) -> Any:
        """The first input channel that a block reads; a number, or an expression of one."""
        if self.groups == 1:
            return 0
        inner, outer = self.source.channels // self.groups, self.result.channels // self.groups
        if isinstance(block, int):
            return min(block * self.lanes // outer * inner, self.source.stored - self.span)
        return T.min(T.floordiv(block * self.lanes, outer) * inner, self.source.stored - self.span)

    def segments(self, inner: int = 0) -> int:
        """Contiguous runs of input values under the window; ``inner``: input channels of a tile, 0 for no tiles."""
        height, width = self.kernel
        if inner:
            return self.span // inner * height * width
        return height if self.whole_rows else height * width

    def run(self, inner: int = 0) -> int:
        """Values in one run."""
        return inner or self.span * (self.kernel[1] if self.whole_rows else 1)

    def steps(self, packed: bool, inner: int = 0) -> int:
        """Quads of one run, rounded up to whole groups."""
        quads = -(-self.run(inner) // quad_of(self.dot))
        return -(-quads // self.group(packed)) * self.group(packed)

    def group(self, packed: bool) -> int:
        """Quads that one step of the inner loop takes."""
        return max(self.chain, 2 if packed else 1)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the logical convolution."""
        out = self.result
        inner = self.source.channels // self.groups
        return out.channels * out.height * out.width * inner * self.kernel[0] * self.kernel[1]


def channel_tiles(spec: ConvSpec) -> list[int]:
    """Tiles of input channels that an outer loop of the sum may take: whole ones, and more than one of them."""
    if spec.groups > 1 or spec.kernel == (1, 1):  # of one pixel, the order is the same
        return []
    return [inner for inner in CHANNEL_TILES if inner < spec.source.stored and spec.source.stored % inner == 0]


def inner_channels(knobs: Knobs) -> int:
    """Input channels of a tile, 0 where the window's rows are the outer loop."""
    return 0 if knobs["reduction"] == "window" else int(knobs["reduction"].removeprefix("channels/"))


def with_intrinsic(spec: ConvSpec, knobs: Knobs) -> ConvSpec:
    """The spec whose dot product the knobs ask for."""
    return spec if knobs["intrinsic"] == "on" else dataclasses.replace(spec, dot="portable", chain=1)


def _keeps_groups(spec: ConvSpec, packed: bool, inner: int) -> bool:
    """Whether tiles of input channels leave every group whole: its sum was proven exact as it is."""
    group = spec.group(packed) * quad_of(spec.dot)
    return inner % group == 0 and spec.source.stored % group == 0


def _unrolls(spec: ConvSpec, packed: bool, inner: int, unroll: int) -> bool:
    """Whether an unroll factor divides its loop: over the pairs of a chain, without one over groups."""
    if unroll == 1:
        return True
    if spec.dot == "maddubs" and spec.chain > 1:
        return spec.chain % (2 * unroll) == 0
    return spec.steps(packed, inner) // spec.group(packed) % unroll == 0


def tiles(spec: ConvSpec) -> list[tuple[int, int, int]]:
    """Every tile that fits the registers: accumulators, one weight vector a channel block, one input word."""
    found = []
    for oct_ in (1, 2, 3, 4, 6, 8):
        for oht in (1, 2, 4):
            for owt in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14):
                if oct_ > spec.blocks or oht > spec.result.height or owt > spec.result.width:
                    continue
                if oct_ * oht * owt + oct_ + 1 <= spec.registers:
                    found.append((oct_, oht, owt))
    return found


def knob_space(spec: ConvSpec, limit: int = 16) -> dict[str, list[Any]]:
    """The values of each knob, best guess first.

    Args:
        spec: the kernel.
        limit: how many tiles to offer, by estimated cost.
    """
    ranked = sorted(tiles(spec), key=lambda tile: (tile_cost(spec, tile), tile))
    space: dict[str, list[Any]] = {
        "tile": ["x".join(map(str, tile)) for tile in ranked[:limit]],
        "order": ["channels", "pixels"],
        "unroll": [u for u in (1, 2, 4) if _unrolls(spec, False, 0, u)],
        "weights": ["bytes"],
    }
    if spec.weight_bits <= 4 and spec.dot in ("vnni", "maddubs"):
        space["weights"].append("packed")
    inner = [tile for tile in channel_tiles(spec) if _keeps_groups(spec, False, tile)]
    space["reduction"] = ["window", *(f"channels/{tile}" for tile in inner)]
    space["intrinsic"] = ["on"] if spec.dot in ("fma", "portable") else ["on", "off"]
    return space


def tile_cost(spec: ConvSpec, tile: tuple[int, int, int]) -> float:
    """Estimated cycles of one pass over the output: multiply steps against loads, recomputed edges counted."""
    oct_, oht, owt = tile
    pixels = oht * owt
    passes = -(-spec.blocks // oct_) * -(-spec.result.height // oht) * -(-spec.result.width // owt)
    outer = spec.result.channels // spec.groups
    shared = 1 if spec.groups == 1 or outer % (oct_ * spec.lanes) == 0 else oct_  # blocks of one group read the same
    words, vectors = pixels * shared, oct_ * pixels
    if spec.dot == "maddubs":  # products and int16 sums; once a chain, the widening
        spilled = max(0, vectors + oct_ + 3 - spec.registers)
        return passes * (vectors * (2.0 + 3.0 / spec.chain) + 0.5 * (oct_ + words) + 2.0 * spilled)
    if spec.dot == "madd16":  # two products, two sums; each word becomes two vectors of int16
        spilled = max(0, vectors + 2 * oct_ + 4 - spec.registers)
        return passes * (vectors * 4.0 + oct_ + 3.0 * words + 2.0 * spilled)
    multiplies = (2.0 if spec.dot == "portable" else 1.0) * vectors
    # Latency of a multiply-accumulate chain needs enough independent accumulators in flight.
    return passes * (max(multiplies, 8.0) + (2.0 if spec.dot == "portable" else 0.1) * (oct_ + words))


def default_knobs(spec: ConvSpec) -> dict[str, Any]:
    """Good knobs without tuning."""
    space = knob_space(spec, limit=1)
    # Of madd16, a second step in one body wants more registers than there are.
    unroll = 2 if 2 in space["unroll"] and spec.dot != "madd16" else 1
    fixed = {"order": "channels", "weights": "bytes", "reduction": "window", "intrinsic": "on"}
    return {"tile": space["tile"][0], "unroll": unroll, **fixed}


def check_knobs(spec: ConvSpec, knobs: Knobs) -> dict[str, Any]:
    """Knobs with the default for each one missing; all but ``tile`` and ``order`` fall to the next value that this
    kernel has, because the same knobs serve a layer at every bit-width.

    Raises:
        ConfigError: an unknown knob, or a tile that does not fit.
    """
    full = default_knobs(spec)
    unknown = set(knobs) - set(full)
    if unknown:
        raise ConfigError(f"unknown knob {sorted(unknown)}; a convolution has {sorted(full)}")
    full.update(knobs)
    allowed = {"x".join(map(str, tile)) for tile in tiles(spec)}
    if full["tile"] not in allowed:
        raise ConfigError(
            f"tile {full['tile']!r} does not fit {spec.blocks} blocks of {spec.lanes} channels, "
            f"{spec.result.height}x{spec.result.width} pixels and {spec.registers} registers; choose one of "
            f"{sorted(allowed)}"
        )
    for knob, values in CHOICES.items():
        if full[knob] not in values:
            raise ConfigError(f"{knob} is {' or '.join(values)}, got {full[knob]!r}")
    orders = ["window", *(f"channels/{tile}" for tile in channel_tiles(spec))]
    if full["reduction"] not in orders:
        raise ConfigError(
            f"reduction {full['reduction']!r} does not fit {spec.source.stored} stored input channels and a window of "
            f"{spec.kernel[0]}x{spec.kernel[1]}; choose one of {orders}"
        )
    if spec.dot in ("fma", "portable"):
        full["intrinsic"] = "on"
    spec = with_intrinsic(spec, full)
    if full["weights"] == "packed" and (spec.weight_bits > 4 or spec.dot not in ("vnni", "maddubs")):
        full["weights"] = "bytes"
    packed = full["weights"] == "packed"
    if full["reduction"] != "window" and not _keeps_groups(spec, packed, inner_channels(full)):
        full["reduction"] = "window"
    if full["unroll"] not in (1, 2, 4):
        raise ConfigError(f"unroll is 1, 2 or 4, got {full['unroll']!r}")
    while not _unrolls(spec, packed, inner_channels(full), full["unroll"]):
        full["unroll"] //= 2
    return full


def weight_quads(spec: ConvSpec, weight: np.ndarray, channels: int = 0) -> np.ndarray:
    """Weights ``(out, in / groups, kh, kw)`` by channel, run and quad: ``(stored out, segments, quads, quad)``.

    Args:
        channels: input channels of a tile, if tiles are the outer loop of the sum.
    """
    quad = quad_of(spec.dot)
    out, inner, kh, kw = weight.shape
    full = np.zeros((spec.result.stored, kh, kw, spec.span), dtype=weight.dtype)
    if spec.groups == 1:
        full[:out, :, :, :inner] = weight.transpose(0, 2, 3, 1)
    else:
        for channel in range(out):
            first = channel // (out // spec.groups) * inner - spec.first_channel(channel // spec.lanes)
            full[channel, :, :, first : first + inner] = weight[channel].transpose(1, 2, 0)
    if channels:
        tiled = full.reshape(spec.result.stored, kh * kw, spec.span // channels, channels)
        full = tiled.transpose(0, 2, 1, 3)
    segments, run = spec.segments(channels), spec.run(channels)
    quads = -(-run // quad)
    padded = np.zeros((spec.result.stored, segments, quads * quad), dtype=weight.dtype)
    padded[:, :, :run] = full.reshape(spec.result.stored, segments, run)
    return padded.reshape(spec.result.stored, segments, quads, quad)


def pack_weights(spec: ConvSpec, knobs: Knobs, weight: np.ndarray) -> np.ndarray:
    """Weights in the order in which the kernel reads them, flat."""
    spec, packed, inner = with_intrinsic(spec, knobs), knobs["weights"] == "packed", inner_channels(knobs)
    quads = weight_quads(spec, weight, inner)
    segments, steps = spec.segments(inner), spec.steps(packed, inner)
    full = np.zeros((*quads.shape[:2], steps, quads.shape[3]), dtype=weight.dtype)
    full[:, :, : quads.shape[2]] = quads
    blocks = full.reshape(spec.blocks, spec.lanes, segments, steps, -1).transpose(0, 2, 3, 1, 4)
    if spec.dot == "fma":
        return np.ascontiguousarray(blocks, dtype=np.float32).ravel()
    if spec.dot == "madd16":  # (lanes, 4) -> even pair of every lane, then odd pair
        return np.ascontiguousarray(np.stack([blocks[..., 0::2], blocks[..., 1::2]], axis=3), dtype=np.int16).ravel()
    if packed:  # the nibbles of one byte belong to two consecutive quads, offset by 8
        shifted = np.ascontiguousarray(blocks).reshape(spec.blocks, segments, steps // 2, 2, spec.lanes * 4) + 8
        return np.ascontiguousarray(shifted[..., 0, :] | (shifted[..., 1, :] << 4)).astype(np.uint8).ravel()
    return np.ascontiguousarray(blocks, dtype=np.int8).ravel()


def weight_dtype(spec: ConvSpec, knobs: Knobs) -> str:
    """Storage type of the packed weights."""
    if knobs["weights"] == "packed":
        return "uint8"
    return {"fma": "float32", "madd16": "int16"}.get(spec.dot, "int8")


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

    Numbers are those of :func:`~lightning_baqe.deploy.requantize.requant_numbers`.
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
