"""Dot products that are exact in the instructions at hand.

A convolution's inner step multiplies groups of four neighbouring input values (a *quad*: four unsigned bytes read as
one 32-bit word and broadcast to all lanes) with the weights of as many output channels as a register has 32-bit lanes.

| dot | step | exact because |
| --- | --- | --- |
| vnni | ``vpdpbusd``: u8 x s8, four products into int32 | it does not saturate |
| maddubs | ``chain`` ``vpmaddubsw`` added in int16, ``vpmaddwd`` by ones | the weights prove that no sum overflows |
| madd16 | even and odd bytes widened to int16, two ``vpmaddwd`` | 255 * 128 * 2 fits int32 |
| portable | one value at a time, widened to int32 | plain arithmetic |
| fma | one value at a time, float32 | (float) |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script import tirx as T

from lightning_baqe.hardware.target import VNNI_PATHS, CpuTarget

_VPDPBUSD = "llvm.x86.avx512.vpdpbusd.{bits}"  # of 256 bits AVX-VNNI's, too
_PMADDUBSW = "llvm.x86.avx2.pmadd.ub.sw"
_PMADDWD = "llvm.x86.avx2.pmadd.wd"
_VPERMI2B = "llvm.x86.avx512.vpermi2var.qi.512"
INT16_MAX = 2**15 - 1
CHAINS = (32, 16, 8, 4, 2, 1)


def _intrinsic(name: str, *args: Any, dtype: str) -> Any:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)


def vpdpbusd(acc: Any, unsigned: Any, signed: Any, lanes: int) -> Any:
    """``acc`` and the four products of each lane's bytes; lanes must be 8 or 16."""
    return _intrinsic(_VPDPBUSD.format(bits=32 * lanes), acc, unsigned, signed, dtype=f"int32x{lanes}")


def vpmaddwd(a: Any, b: Any, lanes: int) -> Any:
    """The sums of the two products of each lane's int16; lanes must be 8."""
    return _intrinsic(_PMADDWD, a, b, dtype=f"int32x{lanes}")


def look_up_64(table: list[Any], index: Any) -> Any:
    """``table[index]`` for 64 bytes: four vectors of 64 entries each, by AVX512-VBMI's ``vpermi2b``."""
    low, high = (_intrinsic(_VPERMI2B, a, index, b, dtype="uint8x64") for a, b in (table[:2], table[2:]))
    return T.Select(index >= T.broadcast(T.uint8(128), 64), high, low)


def fma(acc: Any, a: Any, b: Any, lanes: int) -> Any:
    """``acc + a * b`` in float32."""
    return _intrinsic("llvm.fma", a, b, acc, dtype=f"float32x{lanes}")


def step(dot: str, lanes: int, acc: Any, activations: list[Any], weights: list[Any]) -> Any:
    """The accumulators after one step.

    Args:
        dot: a name of the table above.
        lanes: 32-bit lanes of a register.
        acc: ``int32 x lanes`` (``float32 x lanes`` for fma).
        activations: one word per quad of the chain: int32 (four bytes), or one float32 / int32 value.
        weights: as many vectors; for madd16 pairs of int16 vectors, even bytes first.
    """
    if dot == "vnni":
        a = T.reinterpret(T.broadcast(activations[0], lanes), dtype=f"int8x{4 * lanes}")
        return vpdpbusd(acc, a, weights[0], lanes)
    if dot == "maddubs":
        total: Any = None
        for a, w in zip(activations, weights, strict=True):
            products = pair_products(a, w, lanes)
            total = products if total is None else total + products
        return widened_sum(acc, total, lanes)
    if dot == "madd16":
        even_weights, odd_weights = weights
        word = T.broadcast(activations[0], lanes)
        even = T.reinterpret(T.bitwise_and(word, T.broadcast(T.int32(0x00FF00FF), lanes)), dtype=f"int16x{2 * lanes}")
        unsigned = T.reinterpret(word, dtype=f"uint16x{2 * lanes}")
        odd = T.reinterpret(T.shift_right(unsigned, T.broadcast(T.uint16(8), 2 * lanes)), dtype=f"int16x{2 * lanes}")
        return acc + vpmaddwd(even, even_weights, lanes) + vpmaddwd(odd, odd_weights, lanes)
    if dot == "portable":
        return acc + T.broadcast(activations[0], lanes) * T.Cast(f"int32x{lanes}", weights[0])
    if dot == "fma":
        return fma(acc, T.broadcast(activations[0], lanes), weights[0], lanes)
    raise AssertionError(dot)


def pair_products(word: Any, weights: Any, lanes: int) -> Any:
    """The int16 sums of two products each of a word's four unsigned bytes with each lane's signed ones."""
    words = T.reinterpret(T.broadcast(word, lanes), dtype=f"uint8x{4 * lanes}")
    return _intrinsic(_PMADDUBSW, words, weights, dtype=f"int16x{2 * lanes}")


def widened_sum(acc: Any, sums: Any, lanes: int) -> Any:
    """``acc`` and the two int16 sums of each lane."""
    return acc + vpmaddwd(sums, T.broadcast(T.int16(1), 2 * lanes), lanes)


def quad_of(dot: str) -> int:
    """Input values per weight group."""
    return 1 if dot in ("portable", "fma") else 4


def choose_dot(target: CpuTarget, make_quads: Callable[[], np.ndarray], activation_max: int) -> tuple[str, int]:
    """The fastest dot that is exact for these weights, and its chain length.

    Args:
        target: the CPU.
        make_quads: int weights by output channel and quad, ``(out, segments, quads, 4)``; asked for where they decide.
        activation_max: largest input value.

    Returns:
        ``(dot, chain)``. A chain of k is used where for every output channel, every two-byte lane and every k
        consecutive quads, ``activation_max`` times the sum of the positive (and of the negative) weights fits int16.
    """
    if target.path in VNNI_PATHS:
        return "vnni", 1
    if target.path != "avx2":
        return "portable", 1
    quads = make_quads()
    length = quads.shape[2]
    fits = exact_chains(quads, activation_max)
    if fits:
        return "maddubs", min(fits, key=lambda chain: (_chain_cost(length, chain), -chain))
    return "madd16", 1


def exact_chains(quads: np.ndarray, activation_max: int) -> list[int]:
    """The chain lengths of :data:`CHAINS` that cannot overflow, shortest first.

    Args:
        quads, activation_max: of :func:`choose_dot`, the weights made already.
    """
    length = quads.shape[2]
    padding = ((0, 0), (0, 0), (0, -length % CHAINS[0]), (0, 0))
    padded = np.pad(quads, padding).astype(np.int32) * activation_max
    positive = sum(np.maximum(padded[..., i::2], 0) for i in (0, 1))
    negative = sum(np.minimum(padded[..., i::2], 0) for i in (0, 1))
    fits: list[int] = []
    for chain in reversed(CHAINS):
        if positive.max() > INT16_MAX or negative.min() < -INT16_MAX - 1:
            break  # longer sums of one sign only grow
        fits.append(chain)
        if chain < CHAINS[0]:
            positive, negative = (sums[:, :, ::2] + sums[:, :, 1::2] for sums in (positive, negative))
    return fits


def _chain_cost(length: int, chain: int) -> float:
    """Instructions for a run of so many quads, which is filled up to whole chains: two a quad, three more a chain."""
    chains = -(-length // chain)
    return chains * (2.0 * chain + 3.0)
