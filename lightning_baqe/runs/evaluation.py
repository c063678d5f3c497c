"""Evaluate a quantized network on the device: lower, build, check, score, measure."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torchmetrics import Metric

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.plan import Schedules
from lightning_baqe.errors import BuildError, ConfigError, MeasurementError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.integer.lowering import lower
from lightning_baqe.measurement.device import PRECISION, Device, Measurement, Sampling
from lightning_baqe.measurement.local import Local
from lightning_baqe.measurement.memory import give_back_memory
from lightning_baqe.quantization.batches import network_input
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.train_modes import evaluating
from lightning_baqe.runs.summary import Figures
from lightning_baqe.tasks.scoring import Batches, Predict, Scorer, check_outputs


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


def deployed_accuracy(
    artifact: Artifact, batches: Batches, device: Device | None = None, scorer: Scorer | None = None
) -> float:
    """The metric of a compiled network on a device, by default this machine; at most 1.

    Args:
        artifact: runs on the device.
        batches: images and targets.
        device: None: this machine.
        scorer: of the run; None: the accuracy that suits outputs and targets.

    Raises:
        ConfigError: no images, or outputs and targets that the metric does not take.
    """
    run = functools.partial((device or Local()).run, artifact)
    return (scorer or Scorer.of(run, batches)).score(run, batches)


def module_accuracy(
    module: torch.nn.Module, batches: Batches, device: torch.device, scorer: Scorer | None = None
) -> float:
    """The metric of a module in eval mode, at most 1; as :func:`deployed_accuracy`. Its modes are restored."""
    with _predicting(module, device) as predict:
        return (scorer or Scorer.of(predict, batches)).score(predict, batches)


def module_scorer(
    module: torch.nn.Module, batches: Batches, device: torch.device, metric: Metric | None = None
) -> Scorer:
    """What a float network and all that is made of it are scored by: :meth:`Scorer.of` in eval mode."""
    with _predicting(module, device) as predict:
        return Scorer.of(predict, batches, metric)


def check_module(module: torch.nn.Module, batches: Batches, metric: Metric | None = None) -> None:
    """Refuse, before its training, a module whose outputs no metric is known for, or not the given one.

    Raises:
        ConfigError: as :meth:`Scorer.of`.
    """
    with _predicting(module, torch.device("cpu")) as predict:
        check_outputs(predict, batches, metric)


@contextmanager
def _predicting(module: torch.nn.Module, device: torch.device) -> Iterator[Predict]:
    with torch.no_grad(), evaluating(module):
        yield lambda x: module(x.to(device))


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
    scorer: Scorer | None = None,
) -> Figures:
    """Compile a fake-quantized network and take its figures on the device.

    Args:
        model: calibrated and tuned.
        batches: images and targets that accuracy is taken on; walked through twice.
        folder: where the artifact is saved.
        build_options: what it is compiled for.
        schedules: of :func:`lightning_baqe.build`.
        device: with its records; by default this machine with the user's.
        options: of the latency measurement.
        scorer: what accuracy is; None: what suits outputs and targets.

    Returns:
        Its figures, with the seconds for ``build``, ``evaluate`` and ``measure``.

    Raises:
        BuildError: it cannot be compiled, or an integer node of the artifact differs from the interpreter.
        MeasurementError: no figure could be taken.
        ConfigError: as :func:`deployed_accuracy`.
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
        accuracy = deployed_accuracy(artifact, batches, device, scorer)
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
