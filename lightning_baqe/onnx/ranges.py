"""Ranges of integer tensors in real values, and the types that ONNX stores them in."""

from __future__ import annotations

import math

import numpy as np

from lightning_baqe.integer.nodes import TensorType

UNBOUNDED = 2**24  # integers that float32 does not hold: ranges that reach so far are headroom
Reach = tuple[float, float]


def step(kind: TensorType) -> float:
    """A tensor's step; accumulators, whose scale differs by channel, are counted in whole integers."""
    return kind.scale or 1.0


def span(kind: TensorType) -> float:
    """The largest distance of a tensor's integers from its zero point."""
    return max(abs(limit - kind.zero_point) for limit in kind.limits)


def bounds_of(kind: TensorType) -> Reach:
    """A tensor's range in real values, exactly as DequantizeLinear computes its ends in float32."""
    low, high = (float(np.float32(limit - kind.zero_point) * np.float32(step(kind))) for limit in kind.limits)
    return low, high


def outer_bounds(kind: TensorType, reach: Reach | None) -> Reach:
    """Where the values of a tensor beyond 8 bits have to be clipped: infinite ends where they need not be."""
    (low, high), (first, last) = bounds_of(kind), kind.limits
    smallest, largest = reach or (-math.inf, math.inf)
    return (
        low if kind.zero_point - first < UNBOUNDED and smallest < low else -math.inf,
        high if last - kind.zero_point < UNBOUNDED and largest > high else math.inf,
    )


def storage_of(kind: TensorType) -> type[np.uint8 | np.int8] | None:
    """The 8-bit type that holds a tensor's range and its zero point, None if there is none."""
    held = *kind.limits, kind.zero_point
    fitting = (t for t in (np.uint8, np.int8) if np.iinfo(t).min <= min(held) and max(held) <= np.iinfo(t).max)
    return next(fitting, None)


def needs_clip(kind: TensorType, storage: type[np.uint8 | np.int8], reach: Reach | None) -> bool:
    """Whether QuantizeLinear alone can leave a tensor's range."""
    low, high = int(np.iinfo(storage).min), int(np.iinfo(storage).max)
    if reach is not None:
        low = max(low, round(max(reach[0] / kind.scale, -1e9)) + kind.zero_point)
        high = min(high, round(min(reach[1] / kind.scale, 1e9)) + kind.zero_point)
    return low < kind.limits[0] or high > kind.limits[1]
