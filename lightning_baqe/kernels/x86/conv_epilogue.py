"""What the kernels of dense and grouped convolutions and matrix products do with finished sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.emit import at, cast, put
from lightning_baqe.kernels.x86.requantize import bounds, clipped, cut, requantized, store_bytes

PARAMS = ("shift", "zero_point", "low", "high", "m_conv", "m_residual", "add_shift", "add_offset", "add_zero_point",
          "add_low", "add_high", "pad")  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """One vector of sums, and where its results belong.

    Args:
        sums: of ``lanes`` channels of a pixel.
        block: which block of channels.
        pixel: which pixel; vectors of one pixel that follow one another are neighbours in memory.
        place: in the result's buffer.
        other: in the residual's buffer, if there is one.
    """

    sums: Any
    block: Any
    pixel: Any
    place: Any
    other: Any = None


def finish(
    spec: ConvSpec, vectors: Sequence[Finished], numbers: Any, params: dict[str, Any], other: Any, out: Any
) -> None:
    """Emit results: requantized, rectified or as they are.

    Args:
        numbers: of :func:`~lightning_baqe.kernels.x86.requantize.requant_numbers`.
        params: the numbers of :data:`PARAMS` by name.
        other, out: buffers of the residual and of the result.
    """
    lanes, values = spec.lanes, []
    for vector in vectors:
        value = vector.sums
        if spec.requantizes:  # int32, before the last zero point and clipping where bytes are packed
            clips = not spec.packs_bytes or spec.residual is not None
            value = requantized(value, numbers, vector.block, params, lanes, spec.narrow, spec.high, clips)
            if spec.residual is not None:
                value = _residual_sum(spec, value, at(other, vector.other, lanes), params)
        elif spec.epilogue == "float_relu":
            value = T.max(value, T.broadcast(T.float32(0), lanes))
        values.append(value)
    if spec.packs_bytes:
        places = [(vector.pixel, vector.place) for vector in vectors]
        store_bytes(out, values, places, bounds(params, "" if spec.residual is None else "add_"), lanes)
    else:
        for value, vector in zip(values, vectors, strict=True):
            put(out, cast(spec.result.dtype, lanes, value) if spec.requantizes else value, vector.place, lanes)


def _residual_sum(spec: ConvSpec, value: Any, residual: Any, params: dict[str, Any]) -> Any:
    """The sum with the other operand, int32: clipped, or before zero point and clipping where bytes are packed."""
    lanes, width = spec.lanes, "int32" if spec.narrow_add else "int64"

    def scalar(number: Any) -> Any:
        return T.broadcast(T.Cast(width, number), lanes)

    shift = params["add_shift"]
    rounding = params["add_offset"] + T.shift_left(T.int64(1), shift - T.int64(1))
    total = (
        T.Cast(f"{width}x{lanes}", value) * scalar(params["m_conv"])
        + T.Cast(f"{width}x{lanes}", residual) * scalar(params["m_residual"])
        + scalar(rounding)
    )
    total = T.shift_right(total, scalar(shift))
    if spec.packs_bytes:
        return total if spec.narrow_add else cut(total, lanes)
    return T.Cast(f"int32x{lanes}", clipped(total, *bounds(params, "add_"), width, lanes))
