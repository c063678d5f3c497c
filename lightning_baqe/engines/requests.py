"""What the engines of :mod:`lightning_baqe.benchmarks.deploy` are given and give; without torch, as most peers are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CALIBRATION_IMAGES, PROBE_IMAGES = 8, 4
INPUT, OUTPUT = "x", "y"
Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class EngineRequest:
    """What an engine prepares.

    Args:
        engine: its name, see :mod:`lightning_baqe.engines.engine_process`.
        model: a name of torchvision or timm.
        weights: file with its state dict.
        onnx: the float network as ONNX.
        size: of the square input image.
        bits: file with the bit-config of ``ours-mixed``, or None.
    """

    engine: str
    model: str
    weights: str
    onnx: str
    threads: int
    size: int
    bits: str | None = None


@dataclass
class Prepared:
    """An engine that is ready.

    Args:
        run: one float32 image ``(1, 3, size, size)`` to logits ``(1, classes)``.
        info: what the table tells of it.
        channels_last: it wants the image's memory in the order height, width, channels.
        profile: runs the network on an image for so many seconds, with a clock around each kernel; kernels in the order
            of execution: ``{"name", "names", "op", "us"}``, the mean of these runs.
        exactness: checks its integer arithmetic, see :func:`lightning_baqe.engines.saturation.difference`.
    """

    run: Run
    info: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    profile: Callable[[np.ndarray, float], list[dict[str, Any]]] | None = None
    exactness: Callable[[], list[dict[str, Any]]] | None = None


def _images(count: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, size, size), np.float32)


def calibration_images(size: int) -> np.ndarray:
    """Seeded random images, float32 ``(n, 3, size, size)``."""
    return _images(CALIBRATION_IMAGES, size, 1)


def probe_images(size: int) -> np.ndarray:
    """Other random images, that no engine is calibrated on."""
    return _images(PROBE_IMAGES, size, 2)
