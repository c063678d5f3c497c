"""What a CPU's arithmetic does at most: a dot product's multiply-accumulates with everything in registers and L1."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as B

from lightning_baqe.errors import BuildError
from lightning_baqe.hardware.target import CpuTarget, obstacle
from lightning_baqe.kernels.x86.arithmetic import ARITHMETICS, TileProducts
from lightning_baqe.kernels.x86.emit import arguments
from lightning_baqe.kernels.x86.tiles import BYTES, COLUMNS, REGISTERS, ROWS, How, Tiles

_STEPS, _PASSES = 32, 64
_TILE_STEPS = 8
_TILE_ARRAYS = (  # input values, 16 KiB of weights, sums
    (2 * ROWS * BYTES, "uint8"),
    (_TILE_STEPS * 2 * ROWS * BYTES, "int8"),
    (4 * ROWS * COLUMNS, "int32"),
)


def _tile_kernel(how: How) -> Any:
    """Blocks of 2 x 2 tiles, all that is loaded in the fastest cache."""
    tile = ROWS * BYTES
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        X, W, Y = arguments("main", *_TILE_ARRAYS)
        tiles = Tiles(how, [ROWS] * REGISTERS)
        for sums in range(4):
            tiles.begin(sums, Y, 0)
        with B.serial(_PASSES), B.serial(_TILE_STEPS) as s:
            for side in range(2):
                tiles.load(4 + side, X, side * tile, BYTES)
                tiles.load(6 + side, W, (2 * s + side) * tile, BYTES)
            for sums in range(4):
                tiles.add(sums, 4 + sums // 2, 6 + sums % 2)
        for sums in range(4):
            tiles.store(sums, Y, sums * ROWS * COLUMNS, COLUMNS)
        tiles.release()
    return builder.get().with_attr("global_symbol", "main")


def _peak_kernel(dot: str, chain: int, lanes: int, accumulators: int) -> Any:
    arithmetic = ARITHMETICS[dot]
    width = lanes * arithmetic.quad // arithmetic.vectors  # values of one weight vector
    vectors = chain * arithmetic.vectors  # weight vectors of one step

    def one(acc: Any, words: Any, weights: Any, index: Any, at: Any) -> Any:
        inputs = [words[(index + k) % accumulators] for k in range(chain)]
        loaded = [weights[T.ramp((at * vectors + v) * width, 1, width)] for v in range(vectors)]
        return arithmetic.step(acc, inputs, loaded, lanes)

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        weights = (_STEPS * vectors * width, arithmetic.weight_dtype)
        X, W, Y = arguments("main", (accumulators, arithmetic.dtype), weights, (accumulators * lanes, arithmetic.dtype))
        acc = B.alloc_buffer((accumulators, lanes), arithmetic.dtype)
        vector = T.ramp(0, 1, lanes)
        with B.unroll(accumulators) as a:
            B.buffer_store(acc, Y[T.ramp(a * lanes, 1, lanes)], [a, vector])
        with B.serial(_PASSES), B.serial(_STEPS) as s, B.unroll(accumulators) as a:
            B.buffer_store(acc, one(acc[a, vector], X, W, a, s), [a, vector])
        with B.unroll(accumulators) as a:
            B.buffer_store(Y, acc[a, vector], [T.ramp(a * lanes, 1, lanes)])
    return builder.get().with_attr("global_symbol", "main")


@functools.cache
def _peak_library(target: CpuTarget, dot: str, chain: int, accumulators: int) -> tuple[Any, float, list[np.ndarray]]:
    """The kernel, its multiply-accumulates, and arrays to run it on."""
    arithmetic = ARITHMETICS[dot]
    if isinstance(arithmetic, TileProducts):
        function, products = _tile_kernel(arithmetic.how), 4 * ROWS * COLUMNS * BYTES
        steps, kinds = _TILE_STEPS, list(_TILE_ARRAYS)
    else:
        function, steps = _peak_kernel(dot, chain, target.lanes, accumulators), _STEPS
        products = accumulators * chain * target.lanes * arithmetic.quad
        weights = _STEPS * chain * target.lanes * arithmetic.quad
        kinds = [(accumulators, arithmetic.dtype), (weights, arithmetic.weight_dtype)]
        kinds.append((accumulators * target.lanes, arithmetic.dtype))
    arrays = [np.ones(size, dtype) for size, dtype in kinds]
    arrays[2][:] = 0
    library = tvm.compile(tvm.IRModule({"main": function}), target=Target(target.tvm))
    return library, float(steps * _PASSES * products), arrays


def peak_gmacs(target: CpuTarget, dot: str, chain: int, seconds: float = 0.1, fastest: bool = False) -> float:
    """Multiply-accumulates per second, in 1e9, that the arithmetic of a dot reaches on cached data.

    The best of several numbers of accumulators, each the median of many runs.

    Args:
        target: which instructions.
        dot, chain: see :mod:`lightning_baqe.kernels.x86.arithmetic`.
        seconds: to spend.
        fastest: take the fastest of many short runs instead of the median of a few long ones: what the machine can do,
            not what it does while it is busy.

    Raises:
        BuildError: this process cannot execute the target's code.
    """
    if (why := obstacle(target.path, target.vbmi)) is not None:
        raise BuildError(f"the peak of {target.path} cannot be measured here: it uses instructions {why}")
    best = 0.0
    on_tiles = isinstance(ARITHMETICS[dot], TileProducts)
    for accumulators in (4,) if on_tiles else (4, 8, 12, 16) if target.registers == 32 else (4, 6, 8, 10):
        library, macs, arrays = _peak_library(target, dot, chain, accumulators)
        function = library.mod
        repeat, length_ms = (25, int(seconds * 10)) if fastest else (5, int(seconds * 50))
        timer = function.time_evaluator("main", tvm.cpu(), number=1, repeat=repeat, min_repeat_ms=length_ms)
        times = timer(*(tvm.runtime.tensor(array) for array in arrays))
        taken = times.min if fastest else times.median
        best = max(best, macs / taken / 1e9)
    return best


def pinned_peak_gmacs(target: CpuTarget, dot: str, chain: int, core: int, fastest: bool = False) -> float:
    """:func:`peak_gmacs`, measured on one core; where the system cannot pin, on any."""
    if not hasattr(os, "sched_setaffinity"):
        return peak_gmacs(target, dot, chain, fastest=fastest)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        return peak_gmacs(target, dot, chain, fastest=fastest)
    finally:
        os.sched_setaffinity(0, before)
