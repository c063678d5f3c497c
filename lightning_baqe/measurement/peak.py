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

from lightning_baqe.hardware.target import CpuTarget
from lightning_baqe.kernels.x86.arithmetic import quad_of, step

_STEPS, _PASSES = 32, 64
_WEIGHTS = {"fma": "float32", "madd16": "int16"}


def _peak_kernel(dot: str, chain: int, lanes: int, accumulators: int) -> Any:
    quad = quad_of(dot)
    width = lanes * quad // (2 if dot == "madd16" else 1)  # values of one weight vector
    vectors = chain * (2 if dot == "madd16" else 1)  # weight vectors of one step
    kind = "float32" if dot == "fma" else "int32"
    weights_dtype, word = _WEIGHTS.get(dot, "int8"), "float32" if dot == "fma" else "int32"

    def one(acc: Any, words: Any, weights: Any, index: Any, at: Any) -> Any:
        inputs = [words[(index + k) % accumulators] for k in range(chain)]
        loaded = [weights[T.ramp((at * vectors + v) * width, 1, width)] for v in range(vectors)]
        return step(dot, lanes, acc, inputs, loaded)

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("main")
        X = B.arg("X", B.buffer((accumulators,), word))
        W = B.arg("W", B.buffer((_STEPS * vectors * width,), weights_dtype))
        Y = B.arg("Y", B.buffer((accumulators * lanes,), kind))
        B.func_attr({"tirx.noalias": True})
        acc = B.alloc_buffer((accumulators, lanes), kind)
        vector = T.ramp(0, 1, lanes)
        with B.unroll(accumulators) as a:
            B.buffer_store(acc, Y[T.ramp(a * lanes, 1, lanes)], [a, vector])
        with B.serial(_PASSES), B.serial(_STEPS) as s, B.unroll(accumulators) as a:
            B.buffer_store(acc, one(acc[a, vector], X, W, a, s), [a, vector])
        with B.unroll(accumulators) as a:
            B.buffer_store(Y, acc[a, vector], [T.ramp(a * lanes, 1, lanes)])
    return builder.get().with_attr("global_symbol", "main")


@functools.cache
def _peak_library(target: CpuTarget, dot: str, chain: int, accumulators: int) -> tuple[Any, float]:
    function = _peak_kernel(dot, chain, target.lanes, accumulators)
    library = tvm.compile(tvm.IRModule({"main": function}), target=Target(target.tvm))
    macs = float(_STEPS * _PASSES * accumulators * chain * target.lanes * quad_of(dot))
    return library, macs


def peak_gmacs(target: CpuTarget, dot: str, chain: int, seconds: float = 0.1, fastest: bool = False) -> float:
    """Multiply-accumulates per second, in 1e9, that the arithmetic of a dot reaches on cached data.

    The best of several numbers of accumulators, each the median of many runs.

    Args:
        target: which instructions.
        dot, chain: see :mod:`lightning_baqe.kernels.x86.arithmetic`.
        seconds: to spend.
        fastest: take the fastest of many short runs instead of the median of a few long ones: what the machine can do,
            not what it does while it is busy.
    """
    best = 0.0
    for accumulators in (4, 8, 12, 16) if target.registers == 32 else (4, 6, 8, 10):
        library, macs = _peak_library(target, dot, chain, accumulators)
        words = np.ones(accumulators, np.float32 if dot == "fma" else np.int32)
        function = library.mod
        weights = _ones(library, dot, chain, target)
        out = np.zeros(accumulators * target.lanes, np.float32 if dot == "fma" else np.int32)
        repeat, length_ms = (25, int(seconds * 10)) if fastest else (5, int(seconds * 50))
        timer = function.time_evaluator("main", tvm.cpu(), number=1, repeat=repeat, min_repeat_ms=length_ms)
        times = timer(*(tvm.runtime.tensor(array) for array in (words, weights, out)))
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


def _ones(library: Any, dot: str, chain: int, target: CpuTarget) -> np.ndarray:
    count = _STEPS * chain * target.lanes * quad_of(dot)
    return np.ones(count, _WEIGHTS.get(dot, "int8"))
