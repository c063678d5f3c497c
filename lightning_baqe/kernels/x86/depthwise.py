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

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from lightning_baqe.errors import ConfigError
from lightning_baqe.kernels.x86.conv_knobs import COLUMNS, ROWS, Knobs, sizes
from lightning_baqe.kernels.x86.conv_spec import WindowSpec
from lightning_baqe.kernels.x86.emit import arguments, at, cast, fill_halo, named, put, tile_loops, tile_start
from lightning_baqe.kernels.x86.requantize import bounds, requantized, store_bytes

DEPTHWISE_PARAMS = ("shift", "zero_point", "low", "high", "pad")  # int64


@dataclass(frozen=True)
class DepthwiseSpec(WindowSpec):
    """Everything that the code of such a kernel depends on; both layouts have the same stored channels. With ``vbmi``
    rows are put together by one permutation of bytes.
    """

    vbmi: bool = False

    @property
    def chain(self) -> int:
        """Steps that are added in 16 bits, as in :mod:`lightning_baqe.kernels.x86.arithmetic`: one alone."""
        return 1

    @property
    def taps(self) -> int:
        """Rows of the window that one word holds."""
        return self.arithmetic.taps

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
    return [
        (height, width)
        for height, width in itertools.product(ROWS, COLUMNS)
        if height * width <= spec.registers // 2 and height <= spec.result.height and width <= spec.result.width
    ]


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


def check_depthwise_knobs(spec: DepthwiseSpec, knobs: Knobs) -> dict[str, Any]:
    """Knobs with the best guess for each one missing; ConfigError for an unknown knob, or a value that it has not."""
    space = depthwise_knob_space(spec)
    full = {knob: values[0] for knob, values in space.items()}
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


def emit_depthwise(spec: DepthwiseSpec, knobs: Knobs) -> None:
    """Emit a function of (source, weights, bias, numbers where it requantizes, params, result); the knobs are checked.

    Numbers are those of :func:`~lightning_baqe.kernels.x86.requantize.requant_numbers`.
    """
    height, width = sizes(knobs)
    source, result, lanes = spec.source, spec.result, spec.lanes
    blocks, window = result.stored // lanes, height * spec.words(height) * spec.kernel[1]
    row_tiles, column_tiles = -(-result.height // height), -(-result.width // width)
    tile = list(itertools.product(range(height), range(width)))

    X, W, bias, *numbers, params, Y = arguments(
        "depthwise", source, (blocks * window * lanes * spec.taps, spec.arithmetic.weight_dtype),
        (result.stored, spec.arithmetic.dtype), *[(2 * result.stored, "int64")] * spec.requantizes,
        (len(DEPTHWISE_PARAMS), "int64"), result,
    )  # fmt: skip
    P = named(params, DEPTHWISE_PARAMS)
    fill_halo(result, Y, P["pad"])
    loops = tile_loops(blocks, row_tiles, knobs["order"] == "channels", spec.threads)
    with loops as (block, row_tile), B.serial(column_tiles) as column_tile:
        y = B.Bind(tile_start(row_tile, result.height, height))
        x = B.Bind(tile_start(column_tile, result.width, width))
        channel = block * lanes
        start = source.origin(spec.top, spec.left) + channel
        start = B.Bind(start + y * (spec.stride[0] * source.row) + x * (spec.stride[1] * source.pitch))
        acc = dict.fromkeys(tile, at(bias, channel, lanes))
        _accumulate(spec, acc, X, start, W, block * window)
        to = result.origin() + y * result.row + x * result.pitch + channel
        values = [_finished(spec, acc[pixel], numbers, block, P) for pixel in tile]
        places = [((row, column), to + row * result.row + column * result.pitch) for row, column in tile]
        if spec.packs_bytes:
            store_bytes(Y, values, places, bounds(P), lanes)
        else:
            for value, (_, index) in zip(values, places, strict=True):
                put(Y, cast(result.dtype, lanes, value), index, lanes)


def _accumulate(
    spec: DepthwiseSpec, acc: dict[tuple[int, int], Any], source: Any, start: Any, weights: Any, first: Any
) -> None:
    """Add all products to the tile's sums: each column under it is loaded once, and used at once."""
    height, columns = (1 + max(positions) for positions in zip(*acc, strict=True))
    words, used, width = spec.words(height), _words_of_rows(spec, height), spec.lanes * spec.taps
    uses: dict[int, list[tuple[int, int]]] = {}
    for pixel, tap in itertools.product(range(columns), range(spec.kernel[1])):
        uses.setdefault(pixel * spec.stride[1] + tap * spec.dilation[1], []).append((pixel, tap))
    for word in range(words):
        at_row = {
            (row, tap): B.Bind(at(weights, (first + (row * words + word) * spec.kernel[1] + tap) * width, width))
            for row, tap in itertools.product(range(height), range(spec.kernel[1]))
            if used[row, word]
        }
        for column in sorted(uses):
            value = B.Bind(_load(spec, source, start + column * spec.source.pitch, spec.rows(height), word))
            for (pixel, tap), row in itertools.product(uses[column], range(height)):
                if used[row, word]:
                    acc[row, pixel] = B.Bind(spec.arithmetic.add(acc[row, pixel], value, at_row[row, tap], spec.lanes))


def _load(spec: DepthwiseSpec, source: Any, first: Any, under: list[int], word: int) -> Any:
    """One column of a word's rows: neighbouring channels in lanes, rows in their bytes or words."""
    lanes = spec.lanes
    rows = under[word * spec.taps : (word + 1) * spec.taps]
    loaded = [at(source, first + row * spec.source.row, lanes) for row in rows]
    if spec.vbmi:
        loaded += [T.broadcast(T.uint8(0), lanes)] * (spec.taps - len(loaded))
        mixed = T.Shuffle(loaded, [row * lanes + lane for lane in range(lanes) for row in range(spec.taps)])
        return T.reinterpret(mixed, dtype=f"int32x{lanes}")
    total, *others = (cast(spec.arithmetic.dtype, lanes, row) for row in loaded)
    for index, part in enumerate(others, 1):
        total = T.bitwise_or(total, T.shift_left(part, T.broadcast(T.int32(index * 32 // spec.taps), lanes)))
    return total


def _finished(spec: DepthwiseSpec, acc: Any, numbers: list[Any], block: Any, params: dict[str, Any]) -> Any:
    """One vector of results; those that are packed to bytes before zero point and clipping."""
    if spec.epilogue == "float_relu":
        return T.max(acc, T.broadcast(T.float32(0), spec.lanes))
    if not spec.requantizes:
        return acc
    return requantized(acc, numbers[0], block, params, spec.lanes, spec.narrow, spec.high, not spec.packs_bytes)
