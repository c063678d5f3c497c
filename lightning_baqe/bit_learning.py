"""Training a network whose bits are learned, as the configuration says."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from lightning_baqe.callbacks import Distillation, LearnedBits
from lightning_baqe.callbacks.learned_bits import check_start
from lightning_baqe.entrance.admission import Network
from lightning_baqe.errors import ConfigError, check_at_least
from lightning_baqe.fine_tuning import distilling, gradients_of
from lightning_baqe.learned_bits.learned_figure import draw_bits
from lightning_baqe.learned_bits.learned_network import LearnedNetwork, learn_bits
from lightning_baqe.learned_bits.pressure import Pressure
from lightning_baqe.quantization.batches import network_input
from lightning_baqe.quantization.config import MAX_BITS, MIN_BITS
from lightning_baqe.quantization.convert import QuantizedModel, check_options
from lightning_baqe.quantization.gradient_scaling import GradientScaling
from lightning_baqe.tasks import ImageClassifier
from lightning_baqe.tasks.pretrain import fit_resumable, keep, load
from lightning_baqe.tasks.scoring import Scorer


@dataclass(frozen=True)
class BitLearning:
    """What ``learned_bits`` of the configuration says, checked.

    Attributes:
        weights, activations: mean bits that are wanted; None: see ``bytes``.
        bytes: of weights and of activations that are wanted instead.
        start: bits of all at first, in turn.
        epochs: of the three phases of :class:`~lightning_baqe.callbacks.LearnedBits`.
        every, learning_rate: of its quantizers.
        pressure: makes one for each of weights and activations.
        batches: training batches that quantizers are calibrated on.
        distillation, temperature: of :class:`~lightning_baqe.callbacks.Distillation`; 0: none.
        gradients: through the rounding of weights and of activations.
        by_channel: learn bits of each output channel's weights.
        biases: are quantized, too.
        ranges: first ones, of weights and of activations.
    """

    weights: float | None
    activations: float | None
    bytes: tuple[float | None, float | None]
    start: tuple[int, ...]
    epochs: tuple[int, int, int]
    every: int
    learning_rate: float
    pressure: Callable[[], Pressure]
    batches: int
    distillation: float
    temperature: float
    gradients: tuple[GradientScaling, GradientScaling]
    by_channel: bool
    biases: bool
    ranges: tuple[str, str]

    @classmethod
    def of(cls, cfg: DictConfig, pressure: Callable[[], Pressure]) -> BitLearning:
        """Raises ConfigError for what cannot be right."""
        given = cfg.learned_bits
        gradients = gradients_of(given.gradients)
        Distillation(weight=given.distillation, temperature=given.temperature)
        for name, least in (
            ("pretrain_epochs", 0),
            ("learn_epochs", 1),
            ("tune_epochs", 1),
            ("calibration_batches", 1),
        ):
            check_at_least(f"learned_bits.{name}", given[name], least)
        for name, other in (("weights", "weight_bytes"), ("activations", "activation_bytes")):
            if (given[name] is None) == (given[other] is None):
                raise ConfigError(
                    f"learned_bits.{name}={given[name]!r} and learned_bits.{other}={given[other]!r}, but one of the "
                    "two is wanted, the other null"
                )
            if given[name] is not None and not MIN_BITS <= given[name] <= MAX_BITS:
                raise ConfigError(
                    f"learned_bits.{name}={given[name]!r}, wanted are mean bits of {MIN_BITS}, which the smallest "
                    f"network has, to {MAX_BITS}"
                )
        start = (given.start,) if given.start is None or isinstance(given.start, int) else tuple(given.start)
        check_start(start, given.pretrain_epochs)
        pressure()
        check_options("lsq", "lsq", given.weight_init, given.activation_range)
        return cls(
            given.weights, given.activations, (given.weight_bytes, given.activation_bytes), start,
            (given.pretrain_epochs, given.learn_epochs, given.tune_epochs), given.every, given.learning_rate, pressure,
            given.calibration_batches, given.distillation, given.temperature, gradients, given.by_channel,
            given.biases, (given.weight_init, given.activation_range),
        )  # fmt: skip

    def check(self, network: Network) -> None:
        """Raises ConfigError or InfeasibleError for what this network cannot be trained to."""
        self._callback(self._learned(network, [network.inputs]))

    def _callback(self, learned: LearnedNetwork) -> LearnedBits:
        pretrain, learn, _ = self.epochs
        return LearnedBits(
            learned, self.weights, self.activations, pretrain, learn, self.every, self.learning_rate,
            (self.pressure(), self.pressure()), *self.bytes, self.start,
        )  # fmt: skip

    def _learned(self, network: nn.Module | Network, images: Iterable[Any], example: Any = None) -> LearnedNetwork:
        return learn_bits(network, images, self.start[0], example, self.by_channel, *self.ranges, self.biases)

    def train(
        self,
        task: ImageClassifier,
        datamodule: Any,
        checkpoint: Path,
        make_trainer: Callable[..., pl.Trainer],
        teacher: nn.Module,
        scorer: Scorer,
    ) -> QuantizedModel:
        """Learn the bits of a task's network; give the deployable one back, in eval mode on the CPU. Goes on from what
        an interrupted training left; what is in the checkpoint is not trained again.
        """
        if not checkpoint.exists():
            companions = distilling(self.distillation, self.temperature, teacher, scorer)
            self._fit(task, datamodule, checkpoint, make_trainer, companions)
        load(task, checkpoint)
        assert isinstance(task.net, QuantizedModel)
        return task.net.cpu().eval()

    def _fit(
        self, task: ImageClassifier, datamodule: Any, checkpoint: Path, make_trainer: Any, companions: list[pl.Callback]
    ) -> None:
        images = [
            network_input(batch, "the train loader") for batch in islice(datamodule.train_dataloader(), self.batches)
        ]
        learned = self._learned(task.net, images, datamodule.example_input)
        learned.scale_gradients(*self.gradients)
        bits = self._callback(learned)
        task.net = learned.model.train()
        scratch = checkpoint.with_name(f"{checkpoint.stem}-training")
        fit_resumable(task, datamodule, scratch, sum(self.epochs), make_trainer, [bits, *companions])
        assert bits.bits is not None
        task.net = learned.deployable(bits.bits)
        _tell(learned, bits, checkpoint.parent.parent)
        keep(task, checkpoint)
        shutil.rmtree(scratch)


def _tell(learned: LearnedNetwork, callback: LearnedBits, run_dir: Path) -> None:
    assert callback.bits is not None
    found = learned.mean_bits()
    sizes = (float(learned.weight_bytes().detach()), float(learned.activation_bytes().detach()))
    wanted = [8 * target / of for target, of in zip(callback.targets, learned.bytes_of(8), strict=True)]
    lines = (
        f"{name}: {bits:.2f} mean bits of {target:g} wanted, {size:,.0f} bytes"
        for name, bits, target, size in zip(("weights", "activations"), found, wanted, sizes, strict=True)
    )
    Console(stderr=True, highlight=False).print("; ".join(lines), markup=False, soft_wrap=True)
    draw_bits(callback.bits, callback.curve, run_dir / "bits.png")
