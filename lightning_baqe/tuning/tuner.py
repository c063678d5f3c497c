"""Tuning: measure a network's kernels with several knobs each, so that the next build takes the fastest.

Each kernel is compiled here and measured on the device, on random data, and its result is compared with a
plain computation. What is in the records is not measured again.

A figure is the fastest of many short samples. Even so, the lowest of several noisy figures is too low (the winner's
curse), so that the winner is measured again, interleaved with the default knobs, until the fastest record is one that
was confirmed so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import BuildError, ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.specs import TunableSpec
from lightning_baqe.measurement.database import KernelRecord
from lightning_baqe.measurement.device import Device
from lightning_baqe.measurement.local import Local
from lightning_baqe.scratch import temporary_folder
from lightning_baqe.tuning.bench import KernelBench, kernel_space
from lightning_baqe.tuning.strategies import KernelSpace, Ranked, Strategy

BATCH = 4  # proposals at a time: models are fitted once for each
PEAK_ATTEMPTS = 2


@dataclass(frozen=True)
class Step:
    """What the tuner just did.

    Args:
        done, total: candidates of this run; ``total`` shrinks where a kernel has fewer knobs than were asked for.
        layer: the first that calls the kernel.
        record: what was measured.
        gmacs: 1e9 multiply-accumulates a second, None if it failed.
        share: of the measured peak of all threads.
    """

    done: int
    total: int
    layer: str
    record: KernelRecord
    gmacs: float | None
    share: float | None


Progress = Callable[[Step], None]


@dataclass(frozen=True)
class TunedKernel:
    """What is known of one kernel's knobs.

    Args:
        spec: the kernel.
        layers: that call it.
        default_us: latency with the default knobs, microseconds; None if it was not measured or failed.
        best_us: latency with the best knobs, at most ``default_us``; None if every candidate failed.
        knobs: the best ones.
        peak_gmacs: what the arithmetic of all threads reaches in registers, in 1e9 multiply-accumulates a second; None
            where nothing was ever measured.
        known: candidates in the records, those of earlier runs included.
        inexact: how many of them gave a wrong result.
        measured, failed: candidates of this run.
    """

    spec: TunableSpec
    layers: tuple[str, ...]
    default_us: float | None
    best_us: float | None
    knobs: dict[str, Any] | None
    peak_gmacs: float | None
    known: int = 0
    inexact: int = 0
    measured: int = 0
    failed: int = 0

    @property
    def speedup(self) -> float:
        """Default over best; 1.0 where one is unknown."""
        return self.default_us / self.best_us if self.default_us and self.best_us else 1.0

    @property
    def gmacs(self) -> float | None:
        """1e9 multiply-accumulates a second with the best knobs."""
        return self.spec.macs / self.best_us / 1e3 if self.best_us else None

    @property
    def share(self) -> float | None:
        """Of the peak; above 1 only where the machine was busy whenever the peak was measured."""
        return self.gmacs / self.peak_gmacs if self.gmacs and self.peak_gmacs else None


@dataclass(frozen=True)
class TuneResult:
    """A tuning run.

    Args:
        kernels: one entry for each distinct kernel with knobs, most work first.
        seconds: wall clock.
        complete: whether every kernel now has its number of candidates; False where the budget ended it.
    """

    kernels: tuple[TunedKernel, ...]
    seconds: float
    complete: bool

    @property
    def measured(self) -> int:
        """Candidates that this run measured."""
        return sum(kernel.measured for kernel in self.kernels)

    @property
    def default_us(self) -> float:
        """Sum over all layers with the default knobs, of kernels whose figures are known."""
        return sum(len(k.layers) * k.default_us for k in self.kernels if k.default_us and k.best_us)

    @property
    def best_us(self) -> float:
        """Sum over all layers with the best knobs, of kernels whose figures are known."""
        return sum(len(k.layers) * k.best_us for k in self.kernels if k.default_us and k.best_us)


def tune(
    graph: IntegerGraph,
    options: BuildOptions | None = None,
    candidates: int = 8,
    budget_s: float | None = None,
    device: Device | None = None,
    strategy: Strategy | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Measure knobs of a network's kernels; :func:`build` then takes the best.

    Half of the candidates are spread evenly over the kernels, half by their share of the network's
    multiply-accumulates; each kernel gets its default first. Every record is written as soon as it is measured;
    failures are kept with their reason and not tried again.

    Args:
        graph: whose kernels.
        options: what the kernels are compiled for; None: one thread of this CPU.
        candidates: knobs to know of each kernel, on average.
        budget_s: stop proposing after so many seconds; confirming the winners comes on top. None: no limit.
        device: measures, and keeps the records; by default this machine with the user's.
        strategy: proposes the knobs; by default :class:`~lightning_baqe.tuning.strategies.Ranked`.
        progress: called after each measurement.

    Raises:
        ConfigError: candidates below 1, or more threads than cores.
        BuildError: a target that the device does not run, or an operator without a kernel.
    """
    if candidates < 1:
        raise ConfigError(f"candidates must be at least 1, got {candidates}")
    options = options or BuildOptions()
    target = options.target
    device = device or Local()
    if not device.can_run(target):
        raise BuildError(
            f"{device.info()['cpu']} does not run {target.path} code ({target.mcpu}): tune on a machine that does"
        )
    started = time.monotonic()
    layers = tunable_layers(graph, options)
    with temporary_folder() as folder:
        states = [
            _Kernel(KernelBench(spec, target, device, Path(folder) / str(i)), names)
            for i, (spec, names) in enumerate(layers.items())
        ]
        counts = allotment([state.work for state in states], candidates * len(states))
        for state, wanted in zip(states, counts, strict=True):
            state.wanted = wanted
        deadline = None if budget_s is None else started + budget_s
        complete = _measure_all(states, strategy or Ranked(), deadline, progress)
        for state in states:
            state.bench.confirm()
        kernels = tuple(state.summary() for state in states)
    return TuneResult(kernels, time.monotonic() - started, complete)


def tunable_layers(graph: IntegerGraph, options: BuildOptions) -> dict[TunableSpec, tuple[str, ...]]:
    """The distinct kernels with knobs and the layers that call them, most work first."""
    layers: dict[TunableSpec, list[str]] = {}
    for layer, spec in make_plan(graph, options).tunable().items():
        layers.setdefault(spec, []).append(layer)
    return {spec: tuple(layers[spec]) for spec in sorted(layers, key=lambda spec: -spec.macs * len(layers[spec]))}


def allotment(work: Sequence[float], total: int) -> list[int]:
    """How many of ``total`` candidates each kernel gets: one, then by D'Hondt's method, half evenly, half by work."""
    weights = _weights(work)
    counts = [1] * len(work)
    for _ in range(total - len(work)):
        counts[max(range(len(work)), key=lambda i: weights[i] / (counts[i] + 1))] += 1
    return counts


def _weights(work: Sequence[float]) -> list[float]:
    return [1 / len(work) + one / sum(work) for one in work]


class _Kernel:
    """One kernel of a run."""

    def __init__(self, bench: KernelBench, layers: tuple[str, ...]) -> None:
        self.bench, self.layers = bench, layers
        self.space: KernelSpace = kernel_space(bench.spec)
        self.tried = bench.tried()
        self.wanted = 0
        self._dot = (bench.spec.dot, bench.spec.chain)

    @property
    def peak_gmacs(self) -> float | None:
        """Of all threads, as the records know it."""
        peak = self.bench.records.peak(self.bench.target, *self._dot)
        return peak * self.bench.spec.threads if peak else None

    @property
    def work(self) -> float:
        return float(self.bench.spec.macs * len(self.layers))

    def measure(self, knobs: dict[str, Any]) -> KernelRecord:
        record = self.bench.measure(knobs)
        self.tried = self.bench.tried()
        gmacs = self.gmacs(record)
        for _ in range(PEAK_ATTEMPTS):
            # A kernel above the peak says that the machine was busy when the peak was measured.
            if self.peak_gmacs is not None and self.peak_gmacs >= (gmacs or 0.0):
                break
            peak = self.bench.device.measure_peak(self.bench.target, *self._dot)
            self.bench.records.add_peak(self.bench.target, *self._dot, peak)
        return record

    def gmacs(self, record: KernelRecord) -> float | None:
        """1e9 multiply-accumulates a second of a record; None if it failed."""
        return self.bench.spec.macs / record.latency_us / 1e3 if record.usable and record.latency_us else None

    def summary(self) -> TunedKernel:
        """What the records now say."""
        bench = self.bench
        found = bench.records.kernels(bench.spec, bench.target)
        good = [record for record in found if record.usable]
        default_us = next((record.latency_us for record in good if record.knobs == bench.default), None)
        best_us, knobs = (good[0].latency_us, good[0].knobs) if good else (None, None)
        return TunedKernel(
            bench.spec, self.layers, default_us, best_us, knobs, self.peak_gmacs, len(found),
            sum(record.exact is False for record in found), bench.measured, bench.failed,
        )  # fmt: skip


def _measure_all(kernels: list[_Kernel], strategy: Strategy, deadline: float | None, progress: Progress | None) -> bool:
    """Let the kernels take turns until each has its candidates or the time is up; whether each has them."""
    weights = dict(zip(kernels, _weights([kernel.work for kernel in kernels]), strict=True))
    done = 0

    def late() -> bool:
        return deadline is not None and time.monotonic() >= deadline

    while missing := [kernel for kernel in kernels if len(kernel.tried) < kernel.wanted]:
        if late():
            return False
        kernel = max(missing, key=lambda one: (not one.tried, weights[one] / (len(one.tried) + 1)))
        count = min(BATCH, kernel.wanted - len(kernel.tried)) if kernel.tried else 1
        others = [(other.space, other.tried) for other in kernels if other is not kernel]
        proposed = strategy.propose(kernel.space, kernel.tried, count, others)
        if len(proposed) < count:
            kernel.wanted = len(kernel.tried) + len(proposed)
        for knobs in proposed:
            if late():
                return False
            record = kernel.measure(knobs)
            done += 1
            if progress is not None:
                left = sum(max(0, one.wanted - len(one.tried)) for one in kernels)
                gmacs, peak = kernel.gmacs(record), kernel.peak_gmacs
                share = gmacs / peak if gmacs and peak else None
                progress(Step(done, done + left, kernel.layers[0], record, gmacs, share))
    return True
