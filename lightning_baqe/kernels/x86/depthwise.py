"""The kernel of depthwise convolutions, integer and float: one output channel for each input channel.

Channels are innermost in memory, so that a register holds neighbouring channels of one pixel, and no value is needed
in another lane. A tile of pixels is in registers; columns under it are loaded once, and used by all its rows. Rows
under the tile are taken ``taps`` at a time, where an instruction sums over neighbouring bytes or words of a lane; a
pixel has weights of 0 for rows that are not its own.

Knobs:

| knob | values | meaning |
| --- | --- | --- |
| tile | ``"oht x owt"`` | tile sizes over height and width |
| order | ``pixels``, ``channels`` | the outermost loop: rows of tiles, or blocks of channels |
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from lightning_baqe.errors import ConfigError
from lightning_baqe.kernels.x86.arithmetic import ARITHMETICS, Arithmetic
from lightning_baqe.kernels.x86.conv_knobs import Knobs, sizes
from lightning_baqe.kernels.x86.emit import arguments, cast, fill_halo, named, tile_loops, tile_start
from lightning_baqe.kernels.x86.layout import Layout
from lightning_baqe.kernels.x86.requantize import bounds, packed_bytes, requantized, store_bytes

DEPTHWISE_PARAMS = ("shift", "zero_point", "low", "high", "pad")  # int64


@dataclass(frozen=True)
class DepthwiseSpec:
    """Everything that the code of such a kernel depends on.

    Args:
        dot: see :mod:`lightning_baqe.kernels.x86.arithmetic`.
        lanes, registers: of the target.
        source, result: layouts with the same stored channels.
        kernel, stride, dilation: ``(height, width)``.
        top, left: padding.
        epilogue: ``acc``, ``requant``, ``float`` or ``float_relu``.
        narrow: the requantized value fits 32 bits before it is clipped.
        high: its shift is 32 or more.
        threads: of the outermost loop, over rows.
        vbmi: rows are put together by one permutation of bytes.
    """

    dot: str
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
    high: bool = False
    threads: int = 1
    vbmi: bool = False

    @property
    def arithmetic(self) -> Arithmetic:
        """What ``dot`` names."""
        return ARITHMETICS[self.dot]

    @property
    def chain(self) -> int:
        """Steps that are added in 16 bits, as in :mod:`lightning_baqe.kernels.x86.arithmetic`: one alone."""
        return 1

    @property
    def taps(self) -> int:
        """Rows of the window that one word holds."""
        return self.arithmetic.taps

    @property
    def packs_bytes(self) -> bool:
        """Whether results are requantized to unsigned bytes, four vectors at a time."""
        packs = self.epilogue == "requant" and self.result.dtype == "uint8" and not self.arithmetic.plain
        return packs and (self.narrow or self.high)

    def rows(self, tile_height: int) -> list[int]:
        """Input rows under a tile of so many rows, counted from the first."""
        window = [tap * self.dilation[0] for tap in range(self.kernel[0])]
        return sorted({row * self.stride[0] + tap for row in range(tile_height) for tap in window})

    def words(self, tile_height: int) -> int:
        """Words over the rows under a tile."""
        return -(-len(self.rows(tile_height)) // self.taps)

    def tap_rows(self, tile_height: int) -> np.ndarray:
        """Which row of the kernel each row of the tile has at each tap of each word, ``(tile, words, taps)``; or -1."""
        found = np.full((tile_height, self.words(tile_height) * self.taps), -1)
        rows = self.rows(tile_height)
        for row, tap in itertools.product(range(tile_height), range(self.kernel[0])):
            found[row, rows.index(row * self.stride[0] + tap * self.dilation[0])] = tap
        return found.reshape(tile_height, -1, self.taps)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        out = self.result
        return out.channels * out.height * out.width * self.kernel[0] * self.kernel[1]


def depthwise_tiles(spec: DepthwiseSpec) -> list[tuple[int, int]]:
    """Every tile whose sums fit half of the registers; weights and what is being packed want the others."""
    found = []
    for height, width in itertools.product((1, 2, 4), (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14)):
        fits = height * width <= spec.registers // 2
        if fits and height <= spec.result.height and width <= spec.result.width:
            found.append((height, width))
    return found


def depthwise_cost(spec: DepthwiseSpec, tile: tuple[int, ...]) -> float:
    """Estimated instructions of one pass over the output: loads of columns, multiplications, recomputed edges."""
    height, width = tile
    passes = -(-spec.result.height // height) * -(-spec.result.width // width)
    columns = (width - 1) * spec.stride[1] + (spec.kernel[1] - 1) * spec.dilation[1] + 1
    words = _words_of_rows(spec, height).sum()
    load = spec.words(height) * (1 if spec.vbmi else 2 * spec.taps - 1) + len(spec.rows(height))
    return passes * (columns * load + 1.5 * words * width * spec.kernel[1] + 10 * height * width + 8)


def depthwise_knob_space(spec: DepthwiseSpec) -> dict[str, list[Any]]:
    """The values of each knob, best guess first."""
    ranked = sorted(depthwise_tiles(spec), key=lambda tile: (depthwise_cost(spec, tile), tile))
    return {"tile": ["x".join(map(str, tile)) for tile in ranked], "order": ["pixels", "channels"]}


def default_depthwise_knobs(spec: DepthwiseSpec) -> dict[str, Any]:
    """Good knobs without tuning."""
    return {knob: values[0] for knob, values in depthwise_knob_space(spec).items()}


def check_depthwise_knobs(spec: DepthwiseSpec, knobs: Knobs) -> dict[str, Any]:
    """Knobs with the default for each one missing.

    Raises:
        ConfigError: an unknown knob, or a value that it has not.
    """
    space, full = depthwise_knob_space(spec), default_depthwise_knobs(spec)
    unknown = set(knobs) - set(full)
    if unknown:
        raise ConfigError(f"unknown knob {sorted(unknown)}; a depthwise convolution has {sorted(full)}")
    full.update(knobs)
    for knob, value in full.items():
        if value not in space[knob]:
            raise ConfigError(f"{knob}={value!r}, but a depthwise convolution of this size has {space[knob]}")
    return full


def pack_depthwise(spec: DepthwiseSpec, knobs: Knobs, weight: np.ndarray) -> np.ndarray:
    """Weights ``(channels, 1, kh, kw)`` as the kernel reads them, flat: by block, row of the tile, word, column of the
    window, lane and tap.
    """
    height, _ = sizes(knobs)
    taps = spec.tap_rows(height)
    full = np.zeros((spec.result.stored, spec.kernel[0] + 1, spec.kernel[1]), spec.arithmetic.weight_dtype)
    full[: len(weight), :-1] = weight[:, 0]  # the row behind the last stays 0, for taps of no row
    blocks = full[:, taps].reshape(-1, spec.lanes, *taps.shape, spec.kernel[1])
    return np.ascontiguousarray(blocks.transpose(0, 2, 3, 5, 1, 4)).ravel()


def _words_of_rows(spec: DepthwiseSpec, height: int) -> np.ndarray:
    """Which words each row of a tile has taps in, bool ``(height, words)``."""
    return np.asarray((spec.tap_rows(height) >= 0).any(2))


@functools.lru_cache(maxsize=1024)
def build_depthwise(spec: DepthwiseSpec, knobs_items: tuple[tuple[str, Any], ...]) -> Any:
    """A TIR function of (source, weights, bias, numbers where it requantizes, params, result).

    Numbers are those of :func:`~lightning_baqe.kernels.x86.requantize.requant_numbers`.
    """
    knobs = check_depthwise_knobs(spec, dict(knobs_items))
    height, width = sizes(knobs)
    source, result, lanes = spec.source, spec.result, spec.lanes
    blocks, window = result.stored // lanes, height * spec.words(height) * spec.kernel[1]
    row_tiles, column_tiles = -(-result.height // height), -(-result.width // width)
    by_channel = knobs["order"] == "channels"
    extents = (blocks, row_tiles) if by_channel else (row_tiles, blocks)
    tile = list(itertools.product(range(height), range(width)))

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        X, W, bias, *numbers, params, Y = arguments(
            "depthwise", source, (blocks * window * lanes * spec.taps, spec.arithmetic.weight_dtype),
            (result.stored, spec.arithmetic.dtype), *[(2 * result.stored, "int64")] * (spec.epilogue == "requant"),
            (len(DEPTHWISE_PARAMS), "int64"), result,
        )  # fmt: skip
        P = named(params, DEPTHWISE_PARAMS)
        fill_halo(result, Y, P["pad"])
        with tile_loops(*extents, spec.threads) as (first, second), B.serial(column_tiles) as column_tile:
            block, row_tile = (first, second) if by_channel else (second, first)
            y = B.Bind(tile_start(row_tile, result.height, height))
            x = B.Bind(tile_start(column_tile, result.width, width))
            channel = block * lanes
            start = source.origin(spec.top, spec.left) + channel
            start = B.Bind(start + y * (spec.stride[0] * source.row) + x * (spec.stride[1] * source.pitch))
            acc = dict.fromkeys(tile, bias[T.ramp(channel, 1, lanes)])
            _accumulate(spec, acc, X, start, W, block * window)
            to = result.origin() + y * result.row + x * result.pitch + channel
            values = [_finished(spec, acc[at], numbers, block, P) for at in tile]
            places = [((row, column), to + row * result.row + column * result.pitch) for row, column in tile]
            if spec.packs_bytes:
                store_bytes(Y, values, places, lambda part: packed_bytes(part, *bounds(P), lanes), lanes)
            else:
                for value, (_, index) in zip(values, places, strict=True):
                    B.buffer_store(Y, cast(result.dtype, lanes, value), [T.ramp(index, 1, lanes)])
    return builder.get()


def _accumulate(
    spec: DepthwiseSpec, acc: dict[tuple[int, int], Any], source: Any, start: Any, weights: Any, first: Any
) -> None:
    """Add all products to the tile's sums: each column under it is loaded once, and used at once."""
    height, width = (1 + max(positions) for positions in zip(*acc, strict=True))
    words, used = spec.words(height), _words_of_rows(spec, height)
    uses: dict[int, list[tuple[int, int]]] = {}
    for pixel, tap in itertools.product(range(width), range(spec.kernel[1])):
        uses.setdefault(pixel * spec.stride[1] + tap * spec.dilation[1], []).append((pixel, tap))
    for word in range(words):
        at_row = {
            (row, tap): B.Bind(_weights(spec, weights, first + (row * words + word) * spec.kernel[1] + tap))
            for row, tap in itertools.product(range(height), range(spec.kernel[1]))
            if used[row, word]
        }
        for column in sorted(uses):
            value = B.Bind(_load(spec, source, start + column * spec.source.pitch, spec.rows(height), word))
            for (pixel, tap), row in itertools.product(uses[column], range(height)):
                if used[row, word]:
                    acc[row, pixel] = B.Bind(spec.arithmetic.add(acc[row, pixel], value, at_row[row, tap], spec.lanes))


def _load(spec: DepthwiseSpec, source: Any, at: Any, under: list[int], word: int) -> Any:
    """One column of a word's rows: neighbouring channels in lanes, rows in their bytes or words."""
    lanes = spec.lanes
    rows = under[word * spec.taps : (word + 1) * spec.taps]
    if spec.vbmi:
        loaded = [source[T.ramp(at + row * spec.source.row, 1, lanes)] for row in rows]
        loaded += [T.broadcast(T.uint8(0), lanes)] * (spec.taps - len(loaded))
        mixed = T.Shuffle(loaded, [row * lanes + lane for lane in range(lanes) for row in range(spec.taps)])
        return T.reinterpret(mixed, dtype=f"int32x{lanes}")
    parts = [cast(spec.arithmetic.dtype, lanes, source[T.ramp(at + row * spec.source.row, 1, lanes)]) for row in rows]
    total = parts[0]
    for index, part in enumerate(parts[1:], 1):
        total = T.bitwise_or(total, T.shift_left(part, T.broadcast(T.int32(index * 32 // spec.taps), lanes)))
    return total


def _weights(spec: DepthwiseSpec, weights: Any, index: Any) -> Any:
    width = spec.lanes * spec.taps
    return weights[T.ramp(index * width, 1, width)]


def _finished(spec: DepthwiseSpec, acc: Any, numbers: list[Any], block: Any, params: dict[str, Any]) -> Any:
    """One vector of results; those that are packed to bytes before zero point and clipping."""
    if spec.epilogue == "float_relu":
        return T.max(acc, T.broadcast(T.float32(0), spec.lanes))
    if spec.epilogue != "requant":
        return acc
    return requantized(acc, numbers[0], block, params, spec.lanes, spec.narrow, spec.high, not spec.packs_bytes)
