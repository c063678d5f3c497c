"""What measures. A device knows how to reach itself, what it is, and keeps its own records.

Everybody else measures through this interface, so that a board behind a cable, a machine of a farm, or figures that a
test makes up take the place of this process's CPU (:class:`~lightning_baqe.measurement.local.Local`).
"""

from __future__ import annotations

import copy
import functools
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.plan import Schedules
from lightning_baqe.errors import ConfigError, MeasurementError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.specs import Spec
from lightning_baqe.measurement.build import build_with
from lightning_baqe.measurement.confidence import median_interval, relative_half_width
from lightning_baqe.measurement.database import Records

PRECISION = 0.02
REPEATS = 16  # samples of a kernel's turn


@dataclass(frozen=True)
class Measurement:
    """Latency of one inference of one image.

    Args:
        latency_us: median of the samples, microseconds.
        samples_us: every sample in order.
        device: the fingerprint: CPU, flags, cores, threads.
        cached: whether it came from the records.
        reference_us: of a fixed piece of work that was timed in between, once before every ten samples; it follows the
            clock alone.
    """

    latency_us: float
    samples_us: tuple[float, ...]
    device: dict[str, Any]
    cached: bool = False
    reference_us: tuple[float, ...] = ()

    @property
    def spread(self) -> float:
        """Interquartile range over median; above 0.1 the machine was noisy."""
        if len(self.samples_us) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.samples_us, n=4)
        return (high - low) / self.latency_us

    @property
    def interval_us(self) -> tuple[float, float]:
        """95 % confidence interval of the median (:func:`~lightning_baqe.measurement.confidence.median_interval`)."""
        return median_interval(self.samples_us)

    @property
    def noisy(self) -> bool:
        """Whether the interval reaches further than 2 % from the median: the machine was noisy, or samples were few."""
        return relative_half_width(self.samples_us, self.latency_us) > PRECISION

    @property
    def drift(self) -> float:
        """How much slower the clock became: median of the reference's second half over that of its first, minus 1."""
        half = len(self.reference_us) // 2
        if half == 0:
            return 0.0
        return statistics.median(self.reference_us[-half:]) / statistics.median(self.reference_us[:half]) - 1.0


@dataclass(frozen=True)
class Sampling:
    """How a whole network is sampled; the arguments are those of :func:`lightning_baqe.measure`.

    Raises:
        ConfigError: one cannot be right.
    """

    repeats: int = 50
    warmup: int = 10
    timeout_s: float = 60.0
    precision: float | None = None
    limit_s: float = 10.0
    cold: bool = False

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.warmup < 0:
            raise ConfigError(f"repeats must be at least 1 and warmup at least 0, got {self.repeats} and {self.warmup}")
        if (self.precision is not None and not self.precision > 0) or not 0 < self.limit_s < self.timeout_s:
            raise ConfigError(
                "precision must be positive and limit_s between 0 and timeout_s, got "
                f"{self.precision}, {self.limit_s}, {self.timeout_s}"
            )


@dataclass(frozen=True)
class Kernel:
    """One kernel that is to be measured.

    Args:
        files: makes the compiled library (function ``main``) and the file of its arguments and right result; a device
            that has no use for them never asks, and nothing is compiled.
        threads: that it runs on.
        spec, knobs: what it is; None where it is none of this package's.
    """

    files: Callable[[], tuple[Path, Path]]
    threads: int = 1
    spec: Spec | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelTurn:
    """What one turn of a kernel gave: :data:`REPEATS` samples, microseconds, and whether its result was right."""

    samples_us: tuple[float, ...]
    exact: bool

    def __post_init__(self) -> None:
        if self.exact and len(self.samples_us) != REPEATS:
            raise MeasurementError(f"a turn of a kernel has {REPEATS} samples, the device gave {len(self.samples_us)}")


class Device(ABC):
    """A device that kernels and networks are measured on.

    Args:
        records: path of its records database; None: the user's.
    """

    def __init__(self, records: Path | str | None = None) -> None:
        self._path = records

    @functools.cached_property
    def records(self) -> Records:
        """All that was ever measured on it; opened when it is first needed."""
        return Records(self._path, self.info)

    def keeping(self, records: Path) -> Self:
        """The same device, which keeps its figures in another database."""
        other = copy.copy(self)
        vars(other).pop("records", None)
        other._path = records
        return other

    @abstractmethod
    def info(self, threads: int = 1) -> dict[str, Any]:
        """Its identity with so many threads; keys as in :func:`~lightning_baqe.hardware.identity.device_info`."""

    @abstractmethod
    def can_run(self, target: CpuTarget) -> bool:
        """Whether it executes the code of a target."""

    def build(self, graph: IntegerGraph, options: BuildOptions, schedules: Schedules | str | None = None) -> Artifact:
        """Compile a network for it, with the best knobs of its own records where none are given; raises what
        :func:`lightning_baqe.build` does.
        """
        return build_with(graph, options, schedules, self.records)

    @abstractmethod
    def run(self, artifact: Artifact, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of float images, shape ``(n, *graph.output.type.shape)``, computed there."""

    @abstractmethod
    def verify(self, artifact: Artifact, x: torch.Tensor) -> dict[str, int]:
        """As :func:`lightning_baqe.verify`, computed there."""

    @abstractmethod
    def measure_artifact(self, artifact: Artifact, folder: Path, sampling: Sampling) -> Measurement:
        """Measure a network, batch 1, whatever the records say; it is saved in ``folder``.

        ConfigError for more threads than the device has, MeasurementError where it crashed or took too long.
        """

    @abstractmethod
    def measure_kernel(self, kernel: Kernel) -> KernelTurn:
        """Measure one turn of a kernel, whatever the records say. BuildError where it does not compile,
        MeasurementError where it crashed, or took too long.
        """

    @abstractmethod
    def measure_peak(self, target: CpuTarget, dot: str, chain: int) -> float:
        """What one core's arithmetic reaches in registers, 1e9 multiply-accumulates a second."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what reaching it needs; the next measurement takes it up again."""
