"""Tuning: measure a network's kernels with several knobs each, so that the next build takes the fastest.

Each kernel is compiled here and measured in the measuring process, on random data, and its result is compared with a
plain computation. What is in the records is not measured again.

The lowest of several noisy figures is too low (the winner's curse), so that the winner is measured again, interleaved
with the default knobs, until the fastest record is one that was confirmed so.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.target import Target

from lightning_baqe.deploy.conv_template import ConvSpec, build_conv, check_knobs, default_knobs, knob_space
from lightning_baqe.deploy.kernels import kernel_key
from lightning_baqe.deploy.measure import worker
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.deploy.records import KernelRecord, Records
from lightning_baqe.deploy.sample import KernelSample, sample_kernel
from lightning_baqe.deploy.target import CpuTarget, can_run, get_target
from lightning_baqe.errors import BuildError, ConfigError, MeasurementError
from lightning_baqe.integer.graph import IntegerGraph

REPEATS, MIN_REPEAT_MS = 7, 5
CONFIRM_ROUNDS = 3
TIMEOUT_S = 30.0
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TunedKernel:
    """What is known of one convolution's knobs.

    Args:
        spec: the kernel.
        layers: that call it.
        default_us: latency with the default knobs, microseconds; None if it was not measured or failed.
        best_us: latency with the best knobs, at most ``default_us``; None if every candidate failed.
        knobs: the best ones.
        measured, failed: candidates of this run.
    """

    spec: ConvSpec
    layers: tuple[str, ...]
    default_us: float | None
    best_us: float | None
    knobs: dict[str, Any] | None
    measured: int = 0
    failed: int = 0

    @property
    def speedup(self) -> float:
        """Default over best; 1.0 where one is unknown."""
        return self.default_us / self.best_us if self.default_us and self.best_us else 1.0


@dataclass(frozen=True)
class TuneResult:
    """A tuning run.

    Args:
        kernels: one entry for each distinct convolution, most work first.
        seconds: wall clock.
        complete: whether every kernel now has its number of candidates; False where the budget ended it.
    """

    kernels: tuple[TunedKernel, ...]
    seconds: float
    complete: bool

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
    target: str | CpuTarget = "native",
    threads: int = 1,
    candidates: int = 8,
    budget_s: float | None = None,
    records: Records | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TuneResult:
    """Measure knobs of a network's dense convolutions and matrix products; :func:`build` then takes the best.

    Every record is written as soon as it is measured; failures are kept with their reason and not tried again.

    Args:
        graph: whose kernels.
        target, threads: as :func:`lightning_baqe.build` will get them.
        candidates: knobs to know of each kernel: the default, best-ranked tiles, random ones.
        budget_s: stop proposing after so many seconds; confirming the winners comes on top. None: no limit.
        records: the database; by default the user's.
        seed: of random knobs.
        progress: called with (candidates done, candidates to do, a line of text) after each measurement.

    Raises:
        ConfigError: candidates below 1.
        BuildError: a target that this CPU does not run, or an operator without a kernel.
    """
    if candidates < 1:
        raise ConfigError(f"candidates must be at least 1, got {candidates}")
    chosen = get_target(target) if isinstance(target, str) else target
    if not can_run(chosen.path):
        raise BuildError(f"this CPU does not run {chosen.path} code ({chosen.mcpu}): tune on a machine that does")
    started = time.monotonic()
    known = records if records is not None else Records()
    layers: dict[ConvSpec, list[str]] = {}
    for call in make_plan(graph, chosen, None, threads).calls:
        if isinstance(call.spec, ConvSpec) and call.layer is not None:
            layers.setdefault(call.spec, []).append(call.layer)
    specs = sorted(layers, key=lambda spec: -spec.macs * len(layers[spec]))
    with tempfile.TemporaryDirectory(prefix="lightning_baqe-") as folder:
        benches = [_Bench(spec, chosen, known, Path(folder) / str(i)) for i, spec in enumerate(specs)]
        missing = {b.spec: list(_proposals(b, candidates, seed)) for b in benches}
        total, done, complete = sum(map(len, missing.values())), 0, True
        for turn in range(candidates):  # the kernels take turns, so that a budget serves all of them
            for bench in benches:
                if turn >= len(missing[bench.spec]):
                    continue
                if budget_s is not None and time.monotonic() - started > budget_s:
                    complete = False
                    continue
                record = bench.measure(missing[bench.spec][turn])
                done += 1
                if progress is not None:
                    figure = record.error or f"{record.latency_us:.1f} us"
                    progress(done, total, f"{layers[bench.spec][0]} {_text(record.knobs)}: {figure}")
        for bench in benches:
            bench.confirm()
        kernels = tuple(bench.summary(tuple(layers[bench.spec])) for bench in benches)
    return TuneResult(kernels, time.monotonic() - started, complete)


def _text(knobs: dict[str, Any]) -> str:
    return " ".join(str(value) for value in knobs.values())


@dataclass(eq=False)
class _Bench:
    """Compiles and measures the candidates of one kernel."""

    spec: ConvSpec
    target: CpuTarget
    records: Records
    folder: Path
    measured: int = 0
    failed: int = 0
    _sample: KernelSample | None = None
    _confirmed: dict[str, KernelRecord] = field(default_factory=dict)

    @property
    def default(self) -> dict[str, Any]:
        return check_knobs(self.spec, default_knobs(self.spec))

    def measure(self, knobs: dict[str, Any]) -> KernelRecord:
        """Measure one candidate and keep its record."""
        self.measured += 1
        try:
            answer = self._ask(knobs)
        except (BuildError, MeasurementError) as error:
            self.failed += 1
            record = KernelRecord(knobs, None, [], None, str(error))
        else:
            samples = answer["samples_us"]
            reason = None if answer["exact"] else "its result differs from the reference"
            self.failed += reason is not None
            record = KernelRecord(knobs, statistics.median(samples), samples, answer["exact"], reason)
        self.records.add_kernel(self.spec, self.target, record)
        return record

    def confirm(self) -> None:
        """Measure the fastest and the default again, in turns, until the fastest record is a confirmed one."""
        default = self.records.kernel(self.spec, self.target, self.default)
        if not self.measured or default is None or default.error is not None:
            return
        while True:
            best = self.records.best_knobs(self.spec, self.target)
            if best is None or kernel_key(self.spec, best) in self._confirmed:
                return
            pair = [self.default] if best == self.default else [self.default, best]
            samples: list[list[float]] = [[] for _ in pair]
            for _ in range(CONFIRM_ROUNDS):
                for index, knobs in enumerate(pair):
                    try:
                        samples[index] += self._ask(knobs)["samples_us"]
                    except (BuildError, MeasurementError) as error:
                        self.records.add_kernel(self.spec, self.target, KernelRecord(knobs, None, [], None, str(error)))
                        return
            for knobs, figures in zip(pair, samples, strict=True):
                record = KernelRecord(knobs, statistics.median(figures), figures, True)
                self._confirmed[kernel_key(self.spec, knobs)] = record
                self.records.add_kernel(self.spec, self.target, record)

    def summary(self, layers: tuple[str, ...]) -> TunedKernel:
        """What the records now say."""
        default = self.records.kernel(self.spec, self.target, self.default)
        good = [r for r in self.records.kernels(self.spec, self.target) if r.error is None and r.exact is not False]
        default_us = default.latency_us if default is not None and default.error is None else None
        best_us, knobs = (good[0].latency_us, good[0].knobs) if good else (None, None)
        return TunedKernel(self.spec, layers, default_us, best_us, knobs, self.measured, self.failed)

    def _ask(self, knobs: dict[str, Any]) -> dict[str, Any]:
        library, arguments = self._prepared(knobs)
        request = {
            "kernel": str(library),
            "arguments": str(arguments),
            "repeats": REPEATS,
            "min_repeat_ms": MIN_REPEAT_MS,
        }
        return worker(self.spec.threads).ask(request, TIMEOUT_S)

    def _prepared(self, knobs: dict[str, Any]) -> tuple[Path, Path]:
        """The compiled kernel and its arguments, as files; made once."""
        key = kernel_key(self.spec, knobs)
        library, arguments = self.folder / f"{key}.so", self.folder / f"{key}.npz"
        if not library.exists():
            if self._sample is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._sample = sample_kernel(self.spec)
            arrays = {f"a{i}": array for i, array in enumerate(self._sample.arguments(knobs))}
            np.savez(arguments, result=self._sample.result, **arrays)  # type: ignore[arg-type]
            compile_kernel(self.spec, self.target, knobs, library)
        return library, arguments


def compile_kernel(spec: ConvSpec, target: CpuTarget, knobs: dict[str, Any], path: Path) -> None:
    """Compile one kernel into a library with the function ``main``.

    Raises:
        BuildError: TVM, LLVM or the linker refuses it.
    """
    function = build_conv(spec, tuple(sorted(knobs.items()))).with_attr("global_symbol", "main")
    try:
        compiled = tvm.compile(tvm.IRModule({"main": function}), target=Target(target.tvm))
        compiled.export_library(str(path))
    except (tvm.TVMError, ValueError, RuntimeError) as error:
        raise BuildError(f"the kernel with knobs {knobs} does not compile for {target.mcpu}: {error}") from error


def _proposals(bench: _Bench, candidates: int, seed: int) -> Iterator[dict[str, Any]]:
    """Knobs to measure until so many are known: the default, best-ranked tiles, then random ones."""
    spec = bench.spec
    known = {kernel_key(spec, record.knobs) for record in bench.records.kernels(spec, bench.target)}
    wanted = candidates - len(known)
    rng = random.Random(f"{seed} {kernel_key(spec, {})}")
    space = knob_space(spec)
    ranked = [{**bench.default, "tile": tile} for tile in space["tile"]][: 1 + candidates // 2]
    drawn = ({name: rng.choice(values) for name, values in space.items()} for _ in range(20 * candidates))
    for proposal in (bench.default, *ranked, *drawn):
        if wanted <= 0:
            return
        knobs = check_knobs(spec, proposal)
        key = kernel_key(spec, knobs)
        if key not in known:
            known.add(key)
            wanted -= 1
            yield knobs
