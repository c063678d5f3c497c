"""Evaluate a quantized network on the device: lower, build, check, classify, measure."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.plan import Schedules
from lightning_baqe.errors import BuildError, ConfigError, MeasurementError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.integer.lowering import lower
from lightning_baqe.measurement.device import PRECISION, Device, Measurement, Sampling
from lightning_baqe.measurement.local import Local
from lightning_baqe.measurement.memory import give_back_memory
from lightning_baqe.quantization.batches import input_and_labels, network_input
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.runs.summary import Figures

Batches = Iterable[Any]  # as quantization.batches reads them: (x, y), or a dict


@dataclass(frozen=True)
class MeasureOptions(Sampling):
    """How latency is measured: the arguments of :func:`lightning_baqe.measure`, and what is done about noise.

    Args:
        max_spread: above this interquartile range over median the machine was noisy and the figure is taken again.
        attempts: how often at most; the quietest figure counts.
    """

    precision: float | None = PRECISION
    limit_s: float = 5.0
    max_spread: float = 0.05
    attempts: int = 3

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.warmup < 0 or self.attempts < 1 or not self.timeout_s > 0:
            raise ConfigError(f"repeats, attempts and timeout_s must be positive and warmup at least 0, got {self}")
        super().__post_init__()


def deployed_accuracy(artifact: Artifact, batches: Batches, device: Device | None = None) -> float:
    """Top-1 accuracy of a compiled network on a device, by default this machine, 0..1.

    Raises:
        ConfigError: no images, or batches without images and labels.
    """
    return _accuracy(functools.partial((device or Local()).run, artifact), batches)


@torch.no_grad()
def module_accuracy(module: torch.nn.Module, batches: Batches, device: torch.device) -> float:
    """Top-1 accuracy of a module in eval mode, 0..1; its mode is restored."""
    training = module.training
    module.eval()
    try:
        return _accuracy(lambda x: module(x.to(device)).cpu(), batches)
    finally:
        module.train(training)


def _accuracy(classify: Any, batches: Batches) -> float:
    right = total = 0
    for batch in batches:
        x, y = input_and_labels(batch, "the loader that accuracy is taken on", ConfigError)
        right += int((classify(x).argmax(1) == y.cpu()).sum())
        total += len(y)
    if not total:
        raise ConfigError("accuracy needs at least one image; the loader gave none")
    return right / total


def measure_quietly(artifact: Artifact, folder: Path, options: MeasureOptions, device: Device) -> Measurement:
    """Measure until the machine is quiet or the attempts are used up; the quietest figure counts, and is kept.

    A figure of the device's records is believed if it was quiet and took at least as many samples.
    """
    known = device.records.model(artifact.plan.digest, artifact.threads)
    if known is not None and len(known[1]) >= options.repeats:
        found = Measurement(known[0], tuple(known[1]), device.info(artifact.threads), cached=True)
        if found.spread <= options.max_spread:
            return found
    best: Measurement | None = None
    for _ in range(options.attempts):
        again = device.measure_artifact(artifact, folder, options)
        best = again if best is None else min(best, again, key=lambda m: m.spread)
        if best.spread <= options.max_spread:
            break
    assert best is not None
    device.records.add_model(artifact.plan.digest, artifact.threads, list(best.samples_us), best.latency_us)
    return best


def evaluate(
    model: QuantizedModel,
    batches: Batches,
    folder: Path,
    build_options: BuildOptions,
    schedules: Schedules | str | None = None,
    device: Device | None = None,
    options: MeasureOptions | None = None,
) -> Figures:
    """Compile a fake-quantized network and take its figures on the device.

    Args:
        model: calibrated and tuned.
        batches: images and labels that accuracy is taken on; walked through twice.
        folder: where the artifact is saved.
        build_options: what it is compiled for.
        schedules: of :func:`lightning_baqe.build`.
        device: with its records; by default this machine with the user's.
        options: of the latency measurement.

    Returns:
        Its figures, with the seconds for ``build``, ``evaluate`` and ``measure``.

    Raises:
        BuildError: it cannot be compiled, or an integer node of the artifact differs from the interpreter.
        MeasurementError: no figure could be taken.
    """
    options, device = options or MeasureOptions(), device or Local()
    give_back_memory()
    sample = next((network_input(batch, "the loader", ConfigError)[:1] for batch in batches), None)
    start = time.perf_counter()
    graph = lower(model)
    artifact = device.build(graph, build_options, schedules)
    artifact.save(folder)
    built = time.perf_counter()
    try:
        wrong = device.verify(artifact, sample) if sample is not None else {}
        if any(wrong.values()):
            raise BuildError(
                "the compiled network differs from its reference at "
                f"{ {name: count for name, count in wrong.items() if count} }; "
                f"please report it with the artifact {folder}"
            )
        accuracy = deployed_accuracy(artifact, batches, device)
    finally:
        artifact.close()
    checked = time.perf_counter()
    best = measure_quietly(artifact, folder, options, device)
    if not best.latency_us > 0:
        raise MeasurementError(f"latency {best.latency_us} us is no figure; the clock of this machine is too coarse")
    seconds = {"build": built - start, "evaluate": checked - built, "measure": time.perf_counter() - checked}
    return Figures(
        accuracy=accuracy, latency_us=best.latency_us, size_bytes=graph.size_bytes, spread=best.spread,
        noisy=best.noisy, schedules=artifact.schedules, seconds=seconds,
    )  # fmt: skip
