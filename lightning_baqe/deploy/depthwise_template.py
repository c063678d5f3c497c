"""The kernel of depthwise convolutions, integer and float: one output channel for each input channel.

Channels are innermost in memory, so that a register holds neighbouring channels of one pixel, and no value is needed
in another lane. A tile of ``tile`` neighbouring pixels is in registers; columns under it are loaded once. Rows of the
window are taken ``taps`` at a time, where an instruction sums over neighbouring bytes or words of a lane:

| dot | taps | step |
| --- | --- | --- |
| vnni | 4 | four rows as the bytes of a lane, ``vpdpbusd`` |
| madd16 | 2 | two rows as the words of a lane, ``vpmaddwd``: 255 * 128 * 2 fits int32 |
| portable | 1 | widened to int32 |
| fma | 1 | (float) |
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from lightning_baqe.deploy.dot import fma, vpdpbusd, vpmaddwd
from lightning_baqe.deploy.emit import cast, fill_halo
from lightning_baqe.deploy.layout import Layout
from lightning_baqe.deploy.requantize import clipped, packed_bytes, requantized, requantized_wide, store_bytes

DEPTHWISE_PARAMS = 5  # int64: shift, zero point, low, high, the halo's value
TAPS = {"vnni": 4, "madd16": 2, "portable": 1, "fma": 1}


@dataclass(frozen=True)
class DepthwiseSpec:
    """Everything that the code of such a kernel depends on.

    Args:
        dot: of the table above.
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
    def taps(self) -> int:
        """Rows of the window that one word holds."""
        return TAPS[self.dot]

    @property
    def words(self) -> int:
        """Words over the rows of the window."""
        return -(-self.kernel[0] // self.taps)

    @property
    def packs_bytes(self) -> bool:
        """Whether results are requantized to unsigned bytes, four vectors at a time."""
        packs = self.epilogue == "requant" and self.result.dtype == "uint8" and self.dot != "portable"
        return packs and (self.narrow or self.high)

    @property
    def tile(self) -> int:
        """Neighbouring pixels in registers."""
        return min(self.result.width, 8 if self.registers > 16 else 4)

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        out = self.result
        return out.channels * out.height * out.width * self.kernel[0] * self.kernel[1]


def pack_depthwise(spec: DepthwiseSpec, weight: np.ndarray) -> np.ndarray:
    """Weights ``(channels, 1, kh, kw)`` as the kernel reads them: ``(blocks, words, kw, lanes, taps)``, flat."""
    kh, kw = spec.kernel
    full = np.zeros((spec.result.stored, spec.words * spec.taps, kw), _weight_dtype(spec))
    full[: len(weight), :kh] = weight[:, 0]
    parts = full.reshape(-1, spec.lanes, spec.words, spec.taps, kw)
    return np.ascontiguousarray(parts.transpose(0, 2, 4, 1, 3)).ravel()


def _weight_dtype(spec: DepthwiseSpec) -> str:
    return {"vnni": "int8", "madd16": "int16", "portable": "int8", "fma": "float32"}[spec.dot]


@functools.lru_cache(maxsize=1024)
def build_depthwise(spec: DepthwiseSpec) -> Any:
    """A TIR function of (source, weights, bias, numbers where it requantizes, params, result).

    Numbers are those of :func:`~lightning_baqe.deploy.requantize.requant_numbers`.
    """
    source, result, lanes = spec.source, spec.result, spec.lanes
    kw = spec.kernel[1]
    blocks = result.stored // lanes
    kind = "float32" if spec.dot == "fma" else "int32"
    tiles = -(-result.width // spec.tile)
    last = result.width - spec.tile

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("depthwise")
        X = B.arg("X", B.buffer((source.length,), source.dtype))
        W = B.arg("W", B.buffer((blocks * spec.words * kw * lanes * spec.taps,), _weight_dtype(spec)))
        bias = B.arg("B", B.buffer((result.stored,), kind))
        numbers = B.arg("M", B.buffer((2 * result.stored,), "int64")) if spec.epilogue == "requant" else None
        P = B.arg("P", B.buffer((DEPTHWISE_PARAMS,), "int64"))
        Y = B.arg("Y", B.buffer((result.length,), result.dtype))
        B.func_attr({"tirx.noalias": True})
        fill_halo(result, Y, P[DEPTHWISE_PARAMS - 1])
        rows = B.parallel(result.height) if spec.threads > 1 else B.serial(result.height)
        with rows as y, B.serial(blocks) as block, B.serial(tiles) as t:
            x = B.Bind(T.min(t * spec.tile, T.int32(last)))
            channel = block * lanes
            start = source.origin(spec.top, spec.left) + channel
            start = B.Bind(start + y * (spec.stride[0] * source.row) + x * (spec.stride[1] * source.stored))
            acc = [bias[T.ramp(channel, 1, lanes)]] * spec.tile
            for word in range(spec.words):
                weights = [_weights(spec, W, (block * spec.words + word) * kw + column) for column in range(kw)]
                acc = _accumulated(spec, acc, X, start, word, weights)
            to = result.origin() + y * result.row + x * result.stored + channel
            values = [_finished(spec, total, numbers, block, P) for total in acc]
            places = [(pixel, to + pixel * result.stored) for pixel in range(spec.tile)]
            if spec.packs_bytes:
                store_bytes(Y, values, places, lambda part: packed_bytes(part, P[1], P[2], P[3], lanes), lanes)
            else:
                for value, (_, index) in zip(values, places, strict=True):
                    B.buffer_store(Y, cast(result.dtype, lanes, value), [T.ramp(index, 1, lanes)])
    return builder.get()


def _accumulated(
    spec: DepthwiseSpec, acc: list[Any], source: Any, start: Any, word: int, weights: list[Any]
) -> list[Any]:
    """The tile's sums after one word of rows: each column under the tile is loaded once, and used at once."""
    acc = list(acc)
    uses: dict[int, list[tuple[int, int]]] = {}
    for pixel in range(spec.tile):
        for tap in range(spec.kernel[1]):
            uses.setdefault(pixel * spec.stride[1] + tap * spec.dilation[1], []).append((pixel, tap))
    for column in sorted(uses):
        value = B.Bind(_load(spec, source, start + column * spec.source.stored, word))
        for pixel, tap in uses[column]:
            acc[pixel] = B.Bind(_step(spec, acc[pixel], value, weights[tap]))
    return acc


def _load(spec: DepthwiseSpec, source: Any, at: Any, word: int) -> Any:
    """One column of a word's rows: neighbouring channels in lanes, rows in their bytes or words."""
    lanes = spec.lanes
    rows = range(word * spec.taps, min((word + 1) * spec.taps, spec.kernel[0]))
    if spec.vbmi:
        loaded = [source[T.ramp(at + row * spec.dilation[0] * spec.source.row, 1, lanes)] for row in rows]
        loaded += [T.broadcast(T.uint8(0), lanes)] * (spec.taps - len(loaded))
        mixed = T.Shuffle(loaded, [row * lanes + lane for lane in range(lanes) for row in range(spec.taps)])
        return T.reinterpret(mixed, dtype=f"int32x{lanes}")
    parts = [
        cast(
            "float32" if spec.dot == "fma" else "int32",
            lanes,
            source[T.ramp(at + row * spec.dilation[0] * spec.source.row, 1, lanes)],
        )
        for row in rows
    ]
    total = parts[0]
    for index, part in enumerate(parts[1:], 1):
        total = T.bitwise_or(total, T.shift_left(part, T.broadcast(T.int32(index * 32 // spec.taps), lanes)))
    return total


def _weights(spec: DepthwiseSpec, weights: Any, index: Any) -> Any:
    width = spec.lanes * spec.taps
    return weights[T.ramp(index * width, 1, width)]


def _step(spec: DepthwiseSpec, acc: Any, value: Any, weights: Any) -> Any:
    lanes = spec.lanes
    if spec.dot == "vnni":
        return vpdpbusd(acc, T.reinterpret(value, dtype=f"int8x{4 * lanes}"), weights, lanes)
    if spec.dot == "madd16":
        return acc + vpmaddwd(T.reinterpret(value, dtype=f"int16x{2 * lanes}"), weights, lanes)
    if spec.dot == "portable":
        return acc + value * cast("int32", lanes, weights)
    return fma(acc, value, weights, lanes)


def _finished(spec: DepthwiseSpec, acc: Any, numbers: Any, block: Any, params: Any) -> Any:
    """One vector of results; those that are packed to bytes before zero point and clipping."""
    lanes, bounds = spec.lanes, (params[1], params[2], params[3])
    if spec.epilogue == "float_relu":
        return T.max(acc, T.broadcast(T.float32(0), lanes))
    if spec.epilogue != "requant":
        return acc
    if not (spec.narrow or spec.high):
        return requantized_wide(acc, numbers, block, params[0], bounds, lanes)
    value = requantized(acc, numbers, block, params[0], lanes, spec.high)
    return value if spec.packs_bytes else clipped(value, *bounds, "int32", lanes)
