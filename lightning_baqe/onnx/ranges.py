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
    assert kind.low is not None
    assert kind.high is not None
    return max(abs(kind.low - kind.zero_point), abs(kind.high - kind.zero_point))


def bounds_of(kind: TensorType) -> Reach:
    """A tensor's range in real values, exactly as DequantizeLinear computes its ends in float32."""
    assert kind.low is not None
    assert kind.high is not None
    scale = np.float32(step(kind))
    return float(np.float32(kind.low - kind.zero_point) * scale), float(np.float32(kind.high - kind.zero_point) * scale)


def outer_bounds(kind: TensorType, reach: Reach | None) -> Reach:
    """Where the values of a tensor beyond 8 bits have to be clipped: infinite ends where they need not be."""
    assert kind.low is not None
    assert kind.high is not None
    low, high = bounds_of(kind)
    smallest, largest = reach or (-math.inf, math.inf)
    return (
        low if kind.zero_point - kind.low < UNBOUNDED and smallest < low else -math.inf,
        high if kind.high - kind.zero_point < UNBOUNDED and largest > high else math.inf,
    )


def storage_of(kind: TensorType) -> type[np.uint8 | np.int8] | None:
    """The 8-bit type that holds a tensor's range and its zero point, None if there is none."""
    assert kind.low is not None
    assert kind.high is not None
    for storage in (np.uint8, np.int8):
        limits = np.iinfo(storage)
        if limits.min <= min(kind.low, kind.zero_point) and max(kind.high, kind.zero_point) <= limits.max:
            return storage
    return None


def needs_clip(kind: TensorType, storage: type[np.uint8 | np.int8], reach: Reach | None) -> bool:
    """Whether QuantizeLinear alone can leave a tensor's range."""
    assert kind.low is not None
    assert kind.high is not None
    limits = np.iinfo(storage)
    low, high = int(limits.min), int(limits.max)
    if reach is not None:
        low = max(low, round(max(reach[0] / kind.scale, -1e9)) + kind.zero_point)
        high = min(high, round(min(reach[1] / kind.scale, 1e9)) + kind.zero_point)
    return low < kind.low or high > kind.high
