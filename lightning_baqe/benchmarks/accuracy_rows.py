"""The rows of the accuracy benchmark: float training, tuning with a teacher, lowering, compiling, classifying."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.callbacks import Distillation
from lightning_baqe.data import GlyphsDataModule
from lightning_baqe.deploy.verify import verify
from lightning_baqe.errors import BuildError
from lightning_baqe.files import Rows
from lightning_baqe.hardware.identity import device_info, digest, versions
from lightning_baqe.integer.lowering import lower
from lightning_baqe.measurement.build import build
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.runs.evaluation import deployed_accuracy, module_accuracy
from lightning_baqe.tasks import ImageClassifier, fit_to_checkpoint, network

BITS = {"w8a8": (8, 8), "w4a4": (4, 4)}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Training:
    """One training: AdamW with a schedule over all its steps, at this largest rate."""

    epochs: int
    learning_rate: float
    weight_decay: float
    scheduler: str = "onecycle"


@dataclass(frozen=True)
class Settings:
    """How one network is trained.

    Args:
        tuning: by bits, of the quantized networks.
        weight, temperature: of :class:`~lightning_baqe.callbacks.Distillation`.
        calibration_batches: training batches that the quantizers start from.
    """

    float_training: Training
    tuning: dict[str, Training]
    batch_size: int = 128
    weight: float = 0.9
    temperature: float = 2.0
    calibration_batches: int = 8

    def with_epochs(self, float_epochs: int | None, tuning_epochs: int | None) -> Settings:
        """The same with other numbers of epochs; None: as they are."""
        float_training, tuning = self.float_training, self.tuning
        if float_epochs is not None:
            float_training = replace(float_training, epochs=float_epochs)
        if tuning_epochs is not None:
            tuning = {bits: replace(training, epochs=tuning_epochs) for bits, training in tuning.items()}
        return replace(self, float_training=float_training, tuning=tuning)


@dataclass(frozen=True)
class Sizes:
    """Images of each split."""

    train: int = 16000
    val: int = 2000
    test: int = 10000


SMALLEST = Sizes(32, 16, 16)


@dataclass(frozen=True)
class Request:
    """What one row is measured on; ``bits`` are a key of :data:`BITS`, the seed draws images, weights and order."""

    network: str
    bits: str
    seed: int
    sizes: Sizes
    settings: Settings

    @property
    def float_key(self) -> dict[str, Any]:
        """All that the float network depends on."""
        return {
            "network": self.network,
            "seed": self.seed,
            "sizes": asdict(self.sizes),
            "batch_size": self.settings.batch_size,
            "float_training": asdict(self.settings.float_training),
        }

    @property
    def key(self) -> dict[str, Any]:
        """All that the row depends on, but for the machine and the code."""
        return {
            **self.float_key,
            "bits": self.bits,
            "tuning": asdict(self.settings.tuning[self.bits]),
            "distillation": {"weight": self.settings.weight, "temperature": self.settings.temperature},
            "calibration_batches": self.settings.calibration_batches,
        }

    def checkpoint(self, folder: Path, quantized: bool) -> Path:
        """Where the weights are kept; its name follows from all that they depend on."""
        key = self.key if quantized else self.float_key
        return folder / f"{self.network}-{self.bits if quantized else 'float'}-seed{self.seed}-{digest(key)[:8]}.ckpt"


def find_row(rows: Rows, request: Request) -> dict[str, Any] | None:
    """The row of this very request, the latest one; None: not finished."""
    return next((row for row in reversed(rows.read()) if row["key"] == request.key), None)


quiet_trainer = partial(
    pl.Trainer, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
)


class _Curve(pl.Callback):
    """Accuracy and seconds of each epoch, kept beside the checkpoint, over interruptions, too."""

    def __init__(self, path: Path, say: Say) -> None:
        self.path, self.say = path, say
        self.curve: list[float] = []
        self.seconds = 0.0
        self._started = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve, self.seconds = list(state_dict["curve"]), float(state_dict["seconds"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The epoch's checkpoint is written after this.
        self.curve.append(round(float(trainer.callback_metrics["val/acc"]), 6))
        self.seconds += time.perf_counter() - self._started
        self.say(f"  {self.path.stem} epoch {len(self.curve)}/{trainer.max_epochs}: validation {self.curve[-1]:.2%}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.path.write_text(json.dumps(self.state_dict()))


@dataclass(frozen=True)
class _Trained:
    """A network and how it came about; accuracies of the validation and the test split."""

    net: nn.Module
    curve: list[float]
    seconds: float
    accuracy: dict[str, float]


def measure_row(request: Request, folder: Path, threads: int, say: Say) -> dict[str, Any]:
    """Train what is not trained yet, deploy, and take every accuracy.

    What an interrupted call left in the folder is gone on from; ``say`` is told of every epoch.

    Returns:
        the row: ``key``, accuracies 0..1 of ``val`` and ``test``, curves of the validation accuracy by epoch, seconds.

    Raises:
        BuildError: the compiled network differs from its integer reference.
    """
    settings = request.settings
    data, task = float_task(request.network, settings, request.sizes, request.seed)
    data.prepare_data()
    kept = request.checkpoint(folder, quantized=False)
    float_net = _fit(task, data, kept, settings.float_training.epochs, [], say)
    pl.seed_everything(request.seed, verbose=False)
    tuning = settings.tuning[request.bits]
    task = _task(copy.deepcopy(float_net.net), data, tuning)
    quantized = task.quantize(BitConfig.uniform(float_net.net, *BITS[request.bits]), data.example_input)
    calibrate(quantized, data.train_dataloader(), settings.calibration_batches)
    teacher = Distillation("net", float_net.net, settings.weight, settings.temperature)
    kept = request.checkpoint(folder, quantized=True)
    tuned = _fit(task, data, kept, tuning.epochs, [teacher], say)
    assert isinstance(tuned.net, QuantizedModel)
    start = time.perf_counter()
    graph = lower(tuned.net)
    artifact = build(graph, threads=threads)
    built = time.perf_counter()
    wrong = verify(artifact, next(iter(data.val_dataloader()))[0][:1])
    if any(wrong.values()):
        raise BuildError(
            f"the compiled network differs from its reference at { {k: v for k, v in wrong.items() if v} }; please "
            f"report it with {kept}"
        )
    deployed = {split: deployed_accuracy(artifact, loader) for split, loader in _loaders(data).items()}
    return {
        "network": request.network,
        "bits": request.bits,
        "seed": request.seed,
        "float": float_net.accuracy,
        "fake_quant": tuned.accuracy,
        "deployed": deployed,
        "float_curve": float_net.curve,
        "tuning_curve": tuned.curve,
        "epochs": {"float": len(float_net.curve), "tuning": len(tuned.curve)},
        "seconds": {
            "float": float_net.seconds,
            "tuning": tuned.seconds,
            "build": built - start,
            "classify": time.perf_counter() - built,
        },
        "size_bytes": graph.size_bytes,
        "device": device_info(threads),
        "versions": versions(),
        "key": request.key,
    }


def float_task(name: str, settings: Settings, sizes: Sizes, seed: int) -> tuple[GlyphsDataModule, ImageClassifier]:
    """A seed's images, and the task of training its float network on them."""
    data = GlyphsDataModule(sizes.train, sizes.val, sizes.test, min(settings.batch_size, sizes.train), seed)
    pl.seed_everything(seed, verbose=False)
    net = network(name, data.num_classes).to(memory_format=torch.channels_last)
    return data, _task(net, data, settings.float_training)


def _task(net: nn.Module, data: GlyphsDataModule, training: Training) -> ImageClassifier:
    return ImageClassifier(
        net, data.num_classes, training.learning_rate, training.weight_decay, scheduler=training.scheduler
    )


def _fit(
    task: ImageClassifier,
    data: GlyphsDataModule,
    checkpoint: Path,
    epochs: int,
    callbacks: list[pl.Callback],
    say: Say,
) -> _Trained:
    """Train to the epoch of best validation accuracy, or read what was trained; then both accuracies."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    curve = _Curve(checkpoint.with_suffix(".json"), say)

    def trainer(**options: Any) -> pl.Trainer:
        options["callbacks"] = [*options["callbacks"], curve, *callbacks]
        return quiet_trainer(**options)

    fit_to_checkpoint(task, data, checkpoint, epochs, trainer)
    kept = json.loads(curve.path.read_text())
    device = torch.device("cpu")
    accuracy = {split: module_accuracy(task.net, loader, device) for split, loader in _loaders(data).items()}
    return _Trained(task.net, kept["curve"], kept["seconds"], accuracy)


def _loaders(data: GlyphsDataModule) -> dict[str, Any]:
    return {"val": data.val_dataloader(), "test": data.test_dataloader()}
