"""Compile one kernel with several knobs, measure each on the device, and check each result.

A kernel's figure is its fastest sample. Samples are short, so that some of them fall between the time slices of other
processes: those, and clocks that go down, only ever add time, while a median tells how busy the machine was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_baqe.deploy.objects import KernelObjects, link
from lightning_baqe.errors import BuildError, MeasurementError
from lightning_baqe.hardware.target import CpuTarget
from lightning_baqe.kernels.sample import KernelSample, sample_kernel
from lightning_baqe.kernels.specs import TunableSpec, build_kernel, kernel_key
from lightning_baqe.kernels.tunable import template_of
from lightning_baqe.measurement.database import KernelRecord, Records
from lightning_baqe.measurement.device import REPEATS, Device, Kernel, KernelTurn
from lightning_baqe.resources import shortage
from lightning_baqe.tuning.strategies import KernelSpace, Tried

CONFIRM_ROUNDS = 3


@dataclass(eq=False)
class KernelBench:
    """Compiles and measures the candidates of one kernel. Every figure is in the records before the next is taken.

    Args:
        device: measures, and keeps the figures.
        folder: for compiled kernels and their arguments.
        measured, failed: candidates so far.
    """

    spec: TunableSpec
    target: CpuTarget
    device: Device
    folder: Path
    measured: int = 0
    failed: int = 0
    _sample: KernelSample | None = None

    @property
    def records(self) -> Records:
        """Of the device."""
        return self.device.records

    @property
    def default(self) -> dict[str, Any]:
        """The shipped knobs."""
        return template_of(self.spec).check_knobs(self.spec, {})

    def tried(self) -> list[Tried]:
        """All that the records hold of this kernel."""
        return [
            Tried(record.knobs, record.latency_us if record.usable else None)
            for record in self.records.kernels(self.spec, self.target)
        ]

    def measure(self, knobs: dict[str, Any]) -> KernelRecord:
        """Measure one candidate and keep its record; a failure is a record with its reason."""
        (record,) = interleaved([(self, knobs)], 1)
        self.measured += 1
        self.failed += record.error is not None
        return record

    def confirm(self) -> None:
        """Measure the fastest and the default again, in turns, until the fastest record is a confirmed one."""
        default = self.records.kernel(self.spec, self.target, self.default)
        while default is not None and default.usable:
            best = next((r for r in self.records.kernels(self.spec, self.target) if r.usable), None)
            if best is None or len(best.samples_us) >= CONFIRM_ROUNDS * REPEATS:  # so many tell that it had its turns
                return
            pair = [self.default] if best.knobs == self.default else [self.default, best.knobs]
            default = interleaved([(self, knobs) for knobs in pair])[0]

    def ask(self, knobs: dict[str, Any]) -> KernelTurn:
        """One turn of a candidate on the device. BuildError or MeasurementError where it does not compile, or run."""
        files = functools.partial(self._prepared, knobs)
        return self.device.measure_kernel(Kernel(files, self.spec.threads, self.spec, knobs))

    def keep(self, knobs: dict[str, Any], turns: KernelRecord) -> KernelRecord:
        """Put what the turns of a candidate gave into the records, as what is now known of it."""
        record = replace(turns, knobs=knobs)
        self.records.add_kernel(self.spec, self.target, record)
        return record

    def _prepared(self, knobs: dict[str, Any]) -> tuple[Path, Path]:
        """The compiled kernel and its arguments, as files; made once."""
        key = kernel_key(self.spec, knobs)
        library, arguments = self.folder / f"{key}.so", self.folder / f"{key}.npz"
        if not library.exists():
            if self._sample is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._sample = sample_kernel(self.spec)
            save_arguments(arguments, self._sample.arguments(knobs), self._sample.result)
            compile_kernel(self.spec, self.target, knobs, library)
        return library, arguments


def in_turns(questions: Sequence[Callable[[], KernelTurn]], rounds: int) -> list[KernelRecord]:
    """Ask each question, such as :meth:`KernelBench.ask` of a candidate, once a round. One that failed, or whose result
    was wrong, is not asked again.

    Returns:
        for each question a record without knobs: the fastest sample, all of them, whether the result was the right one
        (None if it never ran), and why it has no more turns.
    """
    samples: list[list[float]] = [[] for _ in questions]
    exact: list[bool | None] = [None] * len(questions)
    reasons: dict[int, str] = {}
    for _ in range(rounds):
        for index, question in enumerate(questions):
            if index in reasons:
                continue
            try:
                answer = question()
            except (BuildError, MeasurementError) as error:
                if shortage(error):
                    raise  # no word on the kernel
                reasons[index] = str(error)
                continue
            samples[index] += answer.samples_us
            exact[index] = answer.exact
            if not answer.exact:
                reasons[index] = "its result differs from the reference"
    return [
        KernelRecord({}, min(taken, default=None), taken, exact[index], reasons.get(index))
        for index, taken in enumerate(samples)
    ]


def interleaved(
    candidates: Sequence[tuple[KernelBench, dict[str, Any]]], rounds: int = CONFIRM_ROUNDS
) -> list[KernelRecord]:
    """Measure knobs of kernels, ``(the kernel's bench, knobs)``, in turns, so that a clock that drifts does so for all;
    keeps their records.
    """
    turns = in_turns([functools.partial(bench.ask, knobs) for bench, knobs in candidates], rounds)
    return [bench.keep(knobs, one) for (bench, knobs), one in zip(candidates, turns, strict=True)]


def save_arguments(path: Path, arguments: Sequence[np.ndarray], result: np.ndarray) -> None:
    """Write a kernel's arguments and its right result as the measuring process reads them."""
    arrays = {f"a{i}": array for i, array in enumerate(arguments)}
    np.savez(path, result=result, **arrays)  # type: ignore[arg-type]


def compile_kernel(spec: TunableSpec, target: CpuTarget, knobs: dict[str, Any], path: Path) -> None:
    """Link one kernel, compiled if it never was, into a library with the function ``main``. BuildError where TVM, LLVM
    or the linker refuses it.
    """
    build = functools.partial(build_kernel, spec, knobs)
    try:
        link(KernelObjects().library(kernel_key(spec, knobs), target, build), path)
    except (RuntimeError, ValueError) as error:
        raise BuildError(f"the kernel with knobs {knobs} does not compile for {target.mcpu}: {error}") from error


def kernel_space(spec: TunableSpec) -> KernelSpace:
    """A kernel's knobs as strategies see them."""
    template = template_of(spec)
    source, result = spec.source, spec.result
    sizes = (source.channels, result.channels, result.height, result.width, *spec.kernel, *spec.stride, spec.macs)
    return KernelSpace(
        name=kernel_key(spec, {}),
        values=template.knob_space(spec),
        default=template.check_knobs(spec, {}),
        check=lambda knobs: template.check_knobs(spec, knobs),
        cost=lambda knobs: template.cost(spec, knobs),
        context=tuple(float(np.log2(size)) for size in sizes),
    )
