"""The rows of the accuracy benchmark: float training, tuning with a teacher or corrections without training, lowering,
compiling, classifying.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import nn
from torchmetrics.classification import MulticlassRecall

from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.callbacks import Distillation
from lightning_baqe.data import ElpvDataModule, FashionMnistDataModule, GlyphsDataModule
from lightning_baqe.data.base import ImageDataModule
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.verify import verify
from lightning_baqe.errors import BuildError
from lightning_baqe.files import Rows
from lightning_baqe.hardware.identity import device_info, digest, versions
from lightning_baqe.integer.lowering import lower
from lightning_baqe.measurement.build import build
from lightning_baqe.quantization.batch_norm import freeze_batch_norm
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.runs.evaluation import deployed_accuracy, module_accuracy
from lightning_baqe.tasks import ImageClassifier, fit_to_checkpoint, network
from lightning_baqe.tasks.frozen import Frozen
from lightning_baqe.tasks.scoring import Predict
from lightning_baqe.tasks.weights import IMAGENET

BITS = {"w8a8": (8, 8), "w4a4": (4, 4), "w4a8": (4, 8)}
CORRECT = "best"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Training:
    """One training with a schedule over all its steps, at this largest rate.

    Args:
        optimizer, scheduler: as for :class:`~lightning_baqe.tasks.ImageClassifier`.
        precision: Lightning's, ``"bf16-mixed"``.
        frozen, freeze_batch_norm: as for :func:`~lightning_baqe.tasks.pretrain`.
    """

    epochs: int
    learning_rate: float
    weight_decay: float
    scheduler: str = "onecycle"
    optimizer: str = "adamw"
    precision: str = "32-true"
    frozen: tuple[str, ...] = ()
    freeze_batch_norm: bool = False

    def key(self) -> dict[str, Any]:
        """Of a row; where nothing is frozen as it was before anything could be."""
        key = {**asdict(self), "frozen": [*self.frozen]}
        if not (self.frozen or self.freeze_batch_norm):
            del key["frozen"], key["freeze_batch_norm"]
        return key


@dataclass(frozen=True)
class Settings:
    """How one network is trained on some data.

    Args:
        float_training: from random weights, or from ``model``'s.
        tuning: by bits, of the quantized networks; None: corrected without training.
        model: more arguments of :func:`~lightning_baqe.tasks.network`.
        images: more arguments of the data module.
        weight, temperature: of :class:`~lightning_baqe.callbacks.Distillation`.
        calibration_batches: training batches that the quantizers start from.
    """

    float_training: Training
    tuning: dict[str, Training | None]
    batch_size: int = 128
    model: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    weight: float = 0.9
    temperature: float = 2.0
    calibration_batches: int = 8

    def with_epochs(self, float_epochs: int | None, tuning_epochs: int | None) -> Settings:
        """The same with other numbers of epochs; None: as they are."""
        float_training, tuning = self.float_training, self.tuning
        if float_epochs is not None:
            float_training = replace(float_training, epochs=float_epochs)
        if tuning_epochs is not None:
            tuning = {
                bits: None if training is None else replace(training, epochs=tuning_epochs)
                for bits, training in tuning.items()
            }
        return replace(self, float_training=float_training, tuning=tuning)


@dataclass(frozen=True)
class Sizes:
    """Images of each split of glyphs."""

    train: int = 16000
    val: int = 2000
    test: int = 10000


SMALLEST = Sizes(32, 16, 16)


DATA: dict[str, Callable[[Sizes, dict[str, Any]], ImageDataModule]] = {
    "glyphs": lambda sizes, more: GlyphsDataModule(sizes.train, sizes.val, sizes.test, **more),
    "fashion_mnist": lambda _, more: FashionMnistDataModule(**more),
    "elpv": lambda _, more: ElpvDataModule(**more),
}
FOUND = {"elpv": "defective"}  # the class whose recall stands beside accuracy


@dataclass(frozen=True)
class Request:
    """What one row is measured on.

    Args:
        data: a key of :data:`DATA`.
        bits: a key of :data:`BITS`.
        seed: draws weights and order, of glyphs the images, too.
        sizes: of glyphs.
        root: of data that lies in files; None: where its package puts it.
    """

    data: str
    network: str
    bits: str
    seed: int
    sizes: Sizes
    settings: Settings
    root: Path | None = None

    @property
    def float_key(self) -> dict[str, Any]:
        """All that the float network depends on."""
        return {
            "data": self.data,
            "network": self.network,
            "seed": self.seed,
            "sizes": asdict(self.sizes),
            "batch_size": self.settings.batch_size,
            "model": self.settings.model,
            "images": self.settings.images,
            "root": None if self.root is None else str(self.root.resolve()),
            "float_training": self.settings.float_training.key(),
        }

    @property
    def key(self) -> dict[str, Any]:
        """All that the row depends on, but for the machine and the code."""
        tuning, key = self.settings.tuning[self.bits], {**self.float_key, "bits": self.bits}
        key["calibration_batches"] = self.settings.calibration_batches
        if tuning is None:
            return {**key, "correct": CORRECT}
        teacher = {"weight": self.settings.weight, "temperature": self.settings.temperature}
        return {**key, "tuning": tuning.key(), "distillation": teacher}

    def data_module(self) -> ImageDataModule:
        """The images."""
        more = {"batch_size": self.settings.batch_size, "seed": self.seed, **self.settings.images}
        if self.root is not None:
            more["root"] = self.root
        if self.data == "glyphs":
            more["batch_size"] = min(self.settings.batch_size, self.sizes.train)
        return DATA[self.data](self.sizes, more)

    def checkpoint(self, folder: Path, quantized: bool) -> Path:
        """Where the weights are kept; its name follows from all that they depend on."""
        key = self.key if quantized else self.float_key
        kind = self.bits if quantized else "float"
        return folder / f"{self.data}-{self.network}-{kind}-seed{self.seed}-{digest(key)[:8]}.ckpt"


def find_row(rows: Rows, request: Request) -> dict[str, Any] | None:
    """The row of this very request, the latest one; None: not finished."""
    return next(reversed(rows.of(request.key)), None)


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
class Trained:
    """A network and how it came about; accuracies of the validation and the test split."""

    net: nn.Module
    curve: list[float]
    seconds: float
    accuracy: dict[str, float]


def measure_row(request: Request, folder: Path, threads: int, say: Say) -> dict[str, Any]:
    """Train what is not trained yet, deploy, and take every accuracy.

    What an interrupted call left in the folder is gone on from; ``say`` is told of every epoch.

    Returns:
        the row: ``key``, accuracies 0..1 of ``val`` and ``test``, ``recall`` on the test split of the class that is to
        be found (None: no such class), curves of the validation accuracy by epoch, seconds.

    Raises:
        BuildError: the compiled network differs from its integer reference.
    """
    data, float_net = float_network(request, folder, say)
    tuned = _quantized(request, data, float_net.net, folder, say)
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
    classified = time.perf_counter()
    return {
        "data": request.data,
        "network": request.network,
        "bits": request.bits,
        "seed": request.seed,
        "float": float_net.accuracy,
        "fake_quant": tuned.accuracy,
        "deployed": deployed,
        "recall": _recalls(request, data, float_net.net, artifact),
        "float_curve": float_net.curve,
        "tuning_curve": tuned.curve,
        "epochs": {"float": len(float_net.curve), "tuning": len(tuned.curve)},
        "seconds": {
            "float": float_net.seconds,
            "tuning": tuned.seconds,
            "build": built - start,
            "classify": classified - built,
        },
        "size_bytes": graph.size_bytes,
        "device": device_info(threads),
        "versions": versions(),
        "key": request.key,
    }


def float_network(request: Request, folder: Path, say: Say) -> tuple[ImageDataModule, Trained]:
    """A seed's images and float network, trained now or before."""
    data, task = float_task(request)
    data.prepare_data()
    kept = request.checkpoint(folder, quantized=False)
    return data, _fit(task, data, kept, request.settings.float_training, [], say)


def float_task(request: Request) -> tuple[ImageDataModule, ImageClassifier]:
    """A seed's images, and the task of training its float network on them."""
    data, model = request.data_module(), request.settings.model
    pl.seed_everything(request.seed, verbose=False)
    net = network(request.network, data.num_classes, **model)
    if model.get("weights") == IMAGENET:
        about: Any = net.pretrained_cfg
        data.normalise(about["mean"], about["std"])
    return data, _task(net.to(memory_format=torch.channels_last), data, request.settings.float_training)


def _task(net: nn.Module, data: ImageDataModule, training: Training) -> ImageClassifier:
    return ImageClassifier(
        net, data.num_classes, training.learning_rate, training.weight_decay, training.optimizer, training.scheduler
    )


def _quantized(request: Request, data: ImageDataModule, net: nn.Module, folder: Path, say: Say) -> Trained:
    """The network on the request's bits, tuned with the float one as its teacher, or corrected without training."""
    settings = request.settings
    tuning = settings.tuning[request.bits]
    pl.seed_everything(request.seed, verbose=False)
    task = _task(copy.deepcopy(net), data, tuning or settings.float_training)
    quantized = task.quantize(BitConfig.uniform(net, *BITS[request.bits]), data.example_input)
    start, shown = time.perf_counter(), settings.calibration_batches
    if tuning is not None:
        calibrate(quantized, data.train_dataloader(), shown)
        teacher = Distillation("net", net, settings.weight, settings.temperature)
        return _fit(task, data, request.checkpoint(folder, quantized=True), tuning, [teacher], say)
    calibrate(quantized, data.train_dataloader(), shown, CORRECT)
    seconds = time.perf_counter() - start
    say(f"  corrected in {seconds:.0f} s")
    return Trained(quantized, [], seconds, _accuracy(quantized, data))


def _fit(
    task: ImageClassifier,
    data: ImageDataModule,
    checkpoint: Path,
    training: Training,
    callbacks: list[pl.Callback],
    say: Say,
) -> Trained:
    """Train to the epoch that is kept, or read what was trained; then both accuracies."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    curve = _Curve(checkpoint.with_suffix(".json"), say)
    if training.freeze_batch_norm:
        freeze_batch_norm(task.net)

    def trainer(**options: Any) -> pl.Trainer:
        still = Frozen(task.net, training.frozen)
        options |= {"callbacks": [*options["callbacks"], curve, still, *callbacks], "precision": training.precision}
        return quiet_trainer(**options)

    # Validation images that were trained on would choose the epoch that knows them best.
    keep: Literal["best", "last"] = "last" if getattr(data, "val_in_train", False) else "best"
    fit_to_checkpoint(task, data, checkpoint, training.epochs, trainer, keep=keep)
    kept = json.loads(curve.path.read_text())
    return Trained(task.net, kept["curve"], kept["seconds"], _accuracy(task.net, data))


def _accuracy(net: nn.Module, data: ImageDataModule) -> dict[str, float]:
    return {split: module_accuracy(net, loader, torch.device("cpu")) for split, loader in _loaders(data).items()}


def _recalls(request: Request, data: ImageDataModule, net: nn.Module, artifact: Artifact) -> dict[str, float] | None:
    """Of the class that is to be found, on the test split, by the float and the deployed network."""
    if request.data not in FOUND:
        return None
    metric = MulticlassRecall(data.num_classes, average="none")
    wanted, found = data.classes.index(FOUND[request.data]), {}
    runs: dict[str, Predict] = {"float": net.eval(), "deployed": artifact.run}
    for name, run in runs.items():
        metric.reset()
        with torch.no_grad():
            for x, y in data.test_dataloader():
                metric.update(run(x), y)
        found[name] = float(metric.compute()[wanted])
    return found


def _loaders(data: ImageDataModule) -> dict[str, Any]:
    return {"val": data.val_dataloader(), "test": data.test_dataloader()}
