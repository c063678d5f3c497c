"""The rows of the accuracy benchmark: float training, tuning with a teacher, lowering, compiling, classifying."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_baqe.callbacks import Distillation
from lightning_baqe.data import GlyphsDataModule
from lightning_baqe.deploy.verify import verify
from lightning_baqe.errors import BuildError
from lightning_baqe.files import Rows
from lightning_baqe.hardware.identity import device_info, versions
from lightning_baqe.integer.lowering import lower
from lightning_baqe.measurement.build import build
from lightning_baqe.quantization.calibration import calibrate
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.runs.evaluation import deployed_accuracy, module_accuracy
from lightning_baqe.tasks import ImageClassifier, fit_to_checkpoint, network

BITS = {"w8a8": (8, 8), "w4a4": (4, 4)}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Training:
    """One training: AdamW with a schedule over all its steps.

    Args:
        epochs: of the training split.
        learning_rate: the largest.
        weight_decay: of weights.
        scheduler: see :class:`~lightning_baqe.tasks.ImageClassifier`.
    """

    epochs: int
    learning_rate: float
    weight_decay: float
    scheduler: str = "onecycle"


@dataclass(frozen=True)
class Settings:
    """How one network is trained.

    Args:
        float_training: of the float network.
        tuning: by bits, of the quantized ones.
        batch_size: of both.
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
        changed = self
        if float_epochs is not None:
            changed = replace(changed, float_training=replace(self.float_training, epochs=float_epochs))
        if tuning_epochs is not None:
            tuning = {bits: replace(training, epochs=tuning_epochs) for bits, training in self.tuning.items()}
            changed = replace(changed, tuning=tuning)
        return changed


@dataclass(frozen=True)
class Sizes:
    """Images of each split."""

    train: int = 16000
    val: int = 2000
    test: int = 10000


SMALLEST = Sizes(32, 16, 16)


@dataclass(frozen=True)
class Request:
    """What one row is measured on.

    Args:
        network: torchvision's name.
        bits: a key of :data:`BITS`.
        seed: of the images, the weights and the order of training.
        sizes: of the splits.
        settings: of the training.
    """

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
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
        return folder / f"{self.network}-{self.bits if quantized else 'float'}-seed{self.seed}-{digest}.ckpt"


def find_row(rows: Rows, request: Request) -> dict[str, Any] | None:
    """The row of this very request, the latest one; None: not finished."""
    return next((row for row in reversed(rows.read()) if row["key"] == request.key), None)


quiet_trainer = partial(
    pl.Trainer, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
)


class _Curve(pl.Callback):
    """Accuracy and seconds of each epoch, kept beside the checkpoint, over interruptions, too."""

    def __init__(self, path: Path, metric: str, say: Say) -> None:
        self.path, self.metric, self.say = path, metric, say
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
        self.curve.append(round(float(trainer.callback_metrics[self.metric]), 6))
        self.seconds += time.perf_counter() - self._started
        self.say(f"  {self.path.stem} epoch {len(self.curve)}/{trainer.max_epochs}: validation {self.curve[-1]:.2%}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.path.write_text(json.dumps(self.state_dict()))


@dataclass
class _Trained:
    """A network and how it came about."""

    net: nn.Module
    curve: list[float]
    seconds: float
    accuracy: dict[str, float] = field(default_factory=dict)


def measure_row(request: Request, folder: Path, threads: int, say: Say) -> dict[str, Any]:
    """Train what is not trained yet, deploy, and take every accuracy.

    Args:
        request: what to measure.
        folder: of the checkpoints; what an interrupted call left there is gone on from.
        threads: of the compiled network.
        say: told of every epoch.

    Returns:
        the row: ``key``, accuracies 0..1 of ``val`` and ``test``, curves of the validation accuracy by epoch, seconds.

    Raises:
        BuildError: the compiled network differs from its integer reference.
    """
    data = GlyphsDataModule(
        request.sizes.train,
        request.sizes.val,
        request.sizes.test,
        min(request.settings.batch_size, request.sizes.train),
        request.seed,
    )
    data.prepare_data()
    float_net = _float(request, data, folder, say)
    tuned = _tuned(request, data, float_net, folder, say)
    assert isinstance(tuned.net, QuantizedModel)
    start = time.perf_counter()
    graph = lower(tuned.net)
    artifact = build(graph, threads=threads)
    built = time.perf_counter()
    wrong = verify(artifact, next(iter(data.val_dataloader()))[0][:1])
    if any(wrong.values()):
        raise BuildError(
            f"the compiled network differs from its reference at { {k: v for k, v in wrong.items() if v} }; please "
            f"report it with {request.checkpoint(folder, quantized=True)}"
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


def _float(request: Request, data: GlyphsDataModule, folder: Path, say: Say) -> _Trained:
    pl.seed_everything(request.seed, verbose=False)
    net = network(request.network, data.num_classes).to(memory_format=torch.channels_last)
    training = request.settings.float_training
    task = task_of(net, data, training)
    return _fit(task, data, request.checkpoint(folder, quantized=False), training, [], say)


def _tuned(request: Request, data: GlyphsDataModule, teacher: _Trained, folder: Path, say: Say) -> _Trained:
    pl.seed_everything(request.seed, verbose=False)
    weight, activation = BITS[request.bits]
    settings = request.settings
    task = task_of(copy.deepcopy(teacher.net), data, settings.tuning[request.bits])
    quantized = task.quantize(BitConfig.uniform(teacher.net, weight, activation), data.example_input)
    calibrate(quantized, data.train_dataloader(), settings.calibration_batches)
    distillation = Distillation("net", teacher.net, settings.weight, settings.temperature)
    checkpoint = request.checkpoint(folder, quantized=True)
    return _fit(task, data, checkpoint, settings.tuning[request.bits], [distillation], say)


def task_of(net: nn.Module, data: GlyphsDataModule, training: Training) -> ImageClassifier:
    """The task of one training."""
    return ImageClassifier(
        net, data.num_classes, training.learning_rate, training.weight_decay, scheduler=training.scheduler
    )


def _fit(
    task: ImageClassifier,
    data: GlyphsDataModule,
    checkpoint: Path,
    training: Training,
    callbacks: list[pl.Callback],
    say: Say,
) -> _Trained:
    """Train to the epoch of best validation accuracy, or read what was trained; then both accuracies."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    curve = _Curve(checkpoint.with_suffix(".json"), "val/acc", say)

    def trainer(**options: Any) -> pl.Trainer:
        options["callbacks"] = [*options["callbacks"], curve, *callbacks]
        return quiet_trainer(**options)

    fit_to_checkpoint(task, data, checkpoint, training.epochs, trainer)
    kept = json.loads(curve.path.read_text())
    device = torch.device("cpu")
    accuracy = {split: module_accuracy(task.net, loader, device) for split, loader in _loaders(data).items()}
    return _Trained(task.net, kept["curve"], kept["seconds"], accuracy)


def _loaders(data: GlyphsDataModule) -> dict[str, Any]:
    return {"val": data.val_dataloader(), "test": data.test_dataloader()}
