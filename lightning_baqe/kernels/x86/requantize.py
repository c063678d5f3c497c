"""Requantization in registers: 32-bit sums to bytes, exactly.

A sum times its channel's multiplier plus a term needs 64 bits. Even and odd lanes are multiplied apart, as the
instructions do it, so the numbers of a block of channels lie in memory by even and odd lanes, widened: nothing is
rearranged when they are read.

Four vectors of results become one of bytes: two saturating steps (32 to 16 bits, 16 to 8), which also clip to 0..255,
and one permutation, which undoes that these instructions work within 128 bits each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from lightning_baqe.kernels.x86.emit import cast, halves, splat

PACKED = 4  # vectors of 32-bit results that become one of bytes
_PACKSSDW = {8: "llvm.x86.avx2.packssdw", 16: "llvm.x86.avx512.packssdw.512"}
_PACKUSWB = {8: "llvm.x86.avx2.packuswb", 16: "llvm.x86.avx512.packuswb.512"}


def requant_numbers(multipliers: np.ndarray, fractions: np.ndarray, shift: int, stored: int, lanes: int) -> np.ndarray:
    """What :func:`requantized` reads, int64, flat: for each block its multipliers, then its terms, even lanes first.

    Args:
        multipliers, fractions: int32 by channel; a term is the fraction and the half that rounds.
        shift: of the requantization, 1 or more.
        stored: channels in memory.
        lanes: channels of a block.
    """
    full = np.zeros((2, stored), np.int64)
    full[:, : len(multipliers)] = multipliers, fractions
    full[1] += 1 << (shift - 1)
    blocks = full.reshape(2, stored // lanes, lanes // 2, 2)
    return np.ascontiguousarray(blocks.transpose(1, 0, 3, 2)).ravel()


def requantized(acc: Any, numbers: Any, block: Any, shift: Any, lanes: int, high: bool) -> Any:
    """``(acc * multiplier + term) >> shift`` as int32, for results that fit 32 bits.

    Args:
        acc: int32 vector.
        numbers: buffer of :func:`requant_numbers`.
        block: which block of channels.
        shift: an int64 scalar.
        lanes: of ``acc``.
        high: the shift is 32 or more, so that only the upper halves of the sums matter.
    """
    sums = _sums(acc, numbers, block, lanes)
    if high:
        merged = _merged(sums, 1, lanes)
        return T.shift_right(merged, T.broadcast(T.Cast("int32", shift - T.int64(32)), lanes))
    return _merged([T.shift_right(value, T.broadcast(shift, lanes // 2)) for value in sums], 0, lanes)


def requantized_wide(acc: Any, numbers: Any, block: Any, shift: Any, bounds: tuple[Any, Any, Any], lanes: int) -> Any:
    """:func:`requantized` plus the zero point and clipped, where 32 bits hold it only then.

    Args:
        bounds: zero point, low and high as int64 scalars.
    """
    half = lanes // 2
    shifted = [T.shift_right(value, T.broadcast(shift, half)) for value in _sums(acc, numbers, block, lanes)]
    return _merged([clipped(value, *bounds, "int64", half) for value in shifted], 0, lanes)


def _sums(acc: Any, numbers: Any, block: Any, lanes: int) -> list[Any]:
    """The int64 sums of even and of odd lanes."""
    half = lanes // 2

    def load(index: int) -> Any:
        return numbers[T.ramp((block * 4 + index) * half, 1, half)]

    def factor(index: int) -> Any:
        """Known to fit 32 bits, so that LLVM takes the short multiplication."""
        thirty_two = T.broadcast(T.int64(32), half)
        return T.shift_right(T.shift_left(load(index), thirty_two), thirty_two)

    return [value * factor(i) + load(2 + i) for i, value in enumerate(halves(acc, lanes))]


def cut(value: Any, lanes: int) -> Any:
    """An int64 vector as int32, cut to 30 bits and a sign: for what is clipped to bytes later."""
    limit = 2**30
    value = T.min(T.max(value, T.broadcast(T.int64(-limit), lanes)), T.broadcast(T.int64(limit), lanes))
    return cast("int32", lanes, value)


def _merged(sums: Sequence[Any], part: int, lanes: int) -> Any:
    """The lower (0) or upper (1) halves of the sums of even and of odd lanes, in order."""
    pieces = [T.reinterpret(value, dtype=f"int32x{lanes}") for value in sums]
    return T.Shuffle(pieces, [index for lane in range(part, lanes, 2) for index in (lane, lanes + lane)])


def packed_bytes(values: Sequence[Any], zero_point: Any, low: Any, high: Any, lanes: int) -> Any:
    """Four int32 vectors plus the zero point, clipped to ``low..high`` within 0..255, as ``4 * lanes`` bytes in order.

    Args:
        zero_point, low, high: int64 scalars, 0..255.
        lanes: 8 or 16, of each vector.
    """
    words = []
    for first, second in zip(values[::2], values[1::2], strict=True):
        pair = _intrinsic(_PACKSSDW[lanes], first, second, dtype=f"int16x{2 * lanes}")
        point = T.broadcast(T.Cast("int16", zero_point), 2 * lanes)
        words.append(_intrinsic("llvm.sadd.sat", pair, point, dtype=f"int16x{2 * lanes}"))
    result = _intrinsic(_PACKUSWB[lanes], *words, dtype=f"uint8x{4 * lanes}")
    bounds = (T.broadcast(T.Cast("uint8", bound), 4 * lanes) for bound in (low, high))
    result = T.min(T.max(result, next(bounds)), next(bounds))
    quads = lanes // 4  # of bytes, of one vector: one in each 128 bits
    order = [j * 4 + vector for vector in range(4) for j in range(quads)]
    moved = T.Shuffle([T.reinterpret(result, dtype=f"int32x{lanes}")], order)
    return T.reinterpret(moved, dtype=f"uint8x{4 * lanes}")


def store_bytes(buffer: Any, values: Sequence[Any], places: Sequence[Any], pack: Any, lanes: int) -> None:
    """Emit the requantized bytes of any number of vectors.

    Args:
        buffer: uint8.
        values: int32 vectors, not clipped.
        places: ``(group, index)`` of each: vectors of one group that follow one another are neighbours in memory.
        pack: from four vectors to their bytes.
        lanes: of a vector.
    """
    for first in range(0, len(values), PACKED):
        part, where = list(values[first : first + PACKED]), places[first : first + PACKED]
        result = B.Bind(pack(part + [part[-1]] * (PACKED - len(part))))
        start = 0
        while start < len(part):
            end = start + 1
            while end < len(part) and where[end][0] == where[start][0]:
                end += 1
            length = end - start
            chosen = result
            if length < PACKED:
                chosen = T.Shuffle([result], list(range(start * lanes, end * lanes)))
            B.buffer_store(buffer, chosen, [T.ramp(where[start][1], 1, length * lanes)])
            start = end


def clipped(value: Any, zero_point: Any, low: Any, high: Any, dtype: str, lanes: int) -> Any:
    """A vector plus the zero point, clipped; all of one type, the scalars int64."""
    value = value + splat(T.Cast(dtype, zero_point), lanes)
    return T.min(T.max(value, splat(T.Cast(dtype, low), lanes)), splat(T.Cast(dtype, high), lanes))


def _intrinsic(name: str, *args: Any, dtype: str) -> Any:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)
