"""Requantization in registers: 32-bit sums to bytes, exactly.

A sum times its channel's multiplier plus a term needs 64 bits. Even and odd lanes are multiplied apart, as the
instructions do it, so the numbers of a block of channels lie in memory by even and odd lanes, widened: nothing is
rearranged when they are read.

Four vectors of results become one of bytes: two saturating steps (32 to 16 bits, 16 to 8), which also clip to 0..255,
and one permutation, which undoes that these instructions work within 128 bits each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from lightning_baqe.kernels.x86.arithmetic import intrinsic
from lightning_baqe.kernels.x86.emit import cast, splat

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


def bounds(params: Mapping[str, Any], prefix: str = "") -> tuple[Any, Any, Any]:
    """Zero point and limits of a result."""
    return params[prefix + "zero_point"], params[prefix + "low"], params[prefix + "high"]


def requantized(
    acc: Any, numbers: Any, block: Any, params: Mapping[str, Any], lanes: int, narrow: bool, high: bool, clips: bool
) -> Any:
    """``(acc * multiplier + term) >> shift`` as int32; plus the zero point and clipped, if wanted or if 32 bits hold it
    only then.

    Args:
        acc: int32 vector.
        numbers: buffer of :func:`requant_numbers`.
        block: which block of channels.
        params: ``shift``, ``zero_point``, ``low`` and ``high`` as int64 scalars.
        lanes: of ``acc``.
        narrow: the result fits 32 bits before it is clipped.
        high: the shift is 32 or more, so that only the upper halves of the sums matter.
        clips: clip in any case.
    """
    half, shift, sums = lanes // 2, params["shift"], _sums(acc, numbers, block, lanes)
    if high:
        value = _upper(sums, shift, lanes)
    else:
        shifted = [T.shift_right(value, T.broadcast(shift, half)) for value in sums]
        if not narrow:
            return _merged([clipped(value, *bounds(params), "int64", half) for value in shifted], 0, lanes)
        value = _merged(shifted, 0, lanes)
    return clipped(value, *bounds(params), "int32", lanes) if clips else value


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


def halves(value: Any, lanes: int) -> tuple[Any, Any]:
    """The even and the odd lanes of an int32 vector, widened to int64."""
    thirty_two = T.broadcast(T.int64(32), lanes // 2)

    def widened(lower: Any) -> Any:
        pairs = T.reinterpret(lower, dtype=f"int64x{lanes // 2}")
        return T.shift_right(T.shift_left(pairs, thirty_two), thirty_two)

    # A shift of the pairs by 32 would do for the odd lanes, too; but LLVM multiplies its result in 64 bits on AVX2.
    return widened(value), widened(T.Shuffle([value], [lane | 1 for lane in range(lanes)]))


def rounding_shift(value: Any, amount: Any, dtype: str, lanes: int) -> Any:
    """``(value + 2^(amount-1)) >> amount``; ``amount`` is an int64 scalar."""
    count = T.Cast(dtype, amount)
    one = T.int64(1) if dtype == "int64" else T.int32(1)
    half = splat(T.shift_left(one, count - one), lanes)
    return T.shift_right(value + half, splat(count, lanes))


def requantized_high(value: Any, multipliers: Any, terms: tuple[Any, Any] | None, amount: Any, lanes: int) -> Any:
    """``(value * multipliers + terms + 2^(amount-1)) >> amount`` as int32, for an amount of 32 or more; the terms are
    int64, by even and odd lanes.
    """
    half = T.broadcast(T.shift_left(T.int64(1), amount - T.int64(1)), lanes // 2)
    added = (half, half) if terms is None else (terms[0] + half, terms[1] + half)
    factors = zip(halves(value, lanes), halves(multipliers, lanes), added, strict=True)
    return _upper([a * m + term for a, m, term in factors], amount, lanes)


def rescaled(
    value: Any, factor: Any, shift: Any, limits: tuple[Any, Any, Any], width: str, high: bool, lanes: int
) -> Any:
    """The value times one factor, both of ``width``, on another grid; ``limits`` are zero point, low and high."""
    if high:
        scaled = requantized_high(value, factor, None, shift, lanes)
    else:
        scaled = rounding_shift(value * factor, shift, width, lanes)
    return clipped(scaled, *limits, width, lanes)


def cut(value: Any, lanes: int) -> Any:
    """An int64 vector as int32, cut to 30 bits and a sign: for what is clipped to bytes later."""
    limit = 2**30
    value = T.min(T.max(value, T.broadcast(T.int64(-limit), lanes)), T.broadcast(T.int64(limit), lanes))
    return cast("int32", lanes, value)


def _upper(sums: Sequence[Any], shift: Any, lanes: int) -> Any:
    """Sums shifted by 32 or more: one 32-bit shift finishes the upper halves of both."""
    return T.shift_right(_merged(sums, 1, lanes), T.broadcast(T.Cast("int32", shift - T.int64(32)), lanes))


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
        pair = intrinsic(_PACKSSDW[lanes], first, second, dtype=f"int16x{2 * lanes}")
        point = T.broadcast(T.Cast("int16", zero_point), 2 * lanes)
        words.append(intrinsic("llvm.sadd.sat", pair, point, dtype=f"int16x{2 * lanes}"))
    result = intrinsic(_PACKUSWB[lanes], *words, dtype=f"uint8x{4 * lanes}")
    result = clip(result, low, high, "uint8", 4 * lanes)
    quads = lanes // 4  # of bytes, of one vector: one in each 128 bits
    order = [j * 4 + vector for vector in range(4) for j in range(quads)]
    moved = T.Shuffle([T.reinterpret(result, dtype=f"int32x{lanes}")], order)
    return T.reinterpret(moved, dtype=f"uint8x{4 * lanes}")


def store_bytes(
    buffer: Any, values: Sequence[Any], places: Sequence[Any], limits: tuple[Any, Any, Any], lanes: int
) -> None:
    """Emit the requantized bytes of any number of vectors.

    Args:
        buffer: uint8.
        values: int32 vectors, not clipped.
        places: ``(group, index)`` of each: vectors of one group that follow one another are neighbours in memory.
        limits: zero point, low and high, as :func:`packed_bytes` takes them.
        lanes: of a vector.
    """
    for first in range(0, len(values), PACKED):
        part, where = list(values[first : first + PACKED]), places[first : first + PACKED]
        result = B.Bind(packed_bytes(part + [part[-1]] * (PACKED - len(part)), *limits, lanes))
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


def clip(value: Any, low: Any, high: Any, dtype: str, lanes: int) -> Any:
    """A vector within two int64 scalars."""
    return T.min(T.max(value, splat(T.Cast(dtype, low), lanes)), splat(T.Cast(dtype, high), lanes))


def clipped(value: Any, zero_point: Any, low: Any, high: Any, dtype: str, lanes: int) -> Any:
    """A vector plus the zero point, clipped; all of one type, the scalars int64."""
    return clip(value + splat(T.Cast(dtype, zero_point), lanes), low, high, dtype, lanes)
