"""One training of learned or of given bits, as the benchmarks that compare them need it."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_baqe.benchmarks.accuracy_rows import quiet_trainer
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.callbacks import Distillation, LearnedBits
from lightning_baqe.data.base import ImageDataModule
from lightning_baqe.entrance.admission import admit
from lightning_baqe.learned_bits.learned_network import LearnedNetwork, learn_bits
from lightning_baqe.learned_bits.pressure import Admm, Controller, Pressure, Ramp
from lightning_baqe.quantization.batches import network_input
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.gradient_scaling import gradient_scaling
from lightning_baqe.tasks import ImageClassifier

PRESSURES: Mapping[str, type[Pressure]] = {"controller": Controller, "ramp": Ramp, "admm": Admm}
GRADIENTS = ("ewgs", "invtanh")  # of weights and activations: the paper's best
CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class Schedule:
    """How bits are learned; a row's key.

    Args:
        pressure: of :data:`PRESSURES`.
        options: its arguments.
        every: steps from one update of the quantizers to the next.
        start: bits of all at first.
        rate: of the quantizers' logarithms.
    """

    pressure: str = "controller"
    options: Mapping[str, Any] = field(default_factory=dict)
    every: int = 5
    start: int = 8
    rate: float = 0.05

    def pressures(self) -> tuple[Pressure, Pressure]:
        """Of weights and of activations."""
        return PRESSURES[self.pressure](**self.options), PRESSURES[self.pressure](**self.options)


@dataclass(frozen=True)
class Length:
    """Steps of a training.

    Args:
        steps: of what counts as an epoch.
        pretrain, learn, tune: epochs of the three phases; given bits are trained for as many as these are together.
        rate: of the network's weights, AdamW's largest; one cycle.
        distillation: share of the float network's labels in the loss.
    """

    steps: int = 40
    pretrain: int = 1
    learn: int = 5
    tune: int = 4
    rate: float = 1e-3
    distillation: float = 0.0

    @property
    def epochs(self) -> int:
        """Of all phases."""
        return self.pretrain + self.learn + self.tune


@dataclass(frozen=True)
class Outcome:
    """What a training gave.

    Attributes:
        model: deployable.
        bits: whole ones.
        learned: mean bits of weights and of activations at the end of learning, before whole bits were chosen.
        sizes: of weights and of activations at whole bits, over their targets.
        seconds: of the training.
    """

    model: QuantizedModel
    bits: BitConfig
    learned: tuple[float, float]
    sizes: tuple[float, float]
    seconds: float


def counted(net: nn.Module, data: ImageDataModule) -> LearnedNetwork:
    """A network that says what bits of weights and of activations cost; not for training."""
    return learn_bits(admit(net, data.example_input), _images(data)[:1], 8)


def sizes_of(network: LearnedNetwork, bits: BitConfig) -> tuple[float, float]:
    """Mean bits of weights and of layers' inputs, of whole ones."""
    network.fix(bits)
    return network.mean_bits()


def learn(net: nn.Module, data: ImageDataModule, mean: float, schedule: Schedule, length: Length, seed: int) -> Outcome:
    """Bits that are learned down to a mean of weights and of activations."""
    _begin(data, seed)
    learned = learn_bits(admit(net, data.example_input), _images(data), schedule.start)
    learned.scale_gradients(*map(gradient_scaling, GRADIENTS))
    of = LearnedBits(
        learned, mean, mean, length.pretrain, length.learn, schedule.every, schedule.rate, schedule.pressures()
    )
    start = time.perf_counter()
    _fit(learned.model, net, data, length, [of])
    assert of.bits is not None
    seconds, last = time.perf_counter() - start, of.curve[-1]
    model = learned.deployable(of.bits).eval()
    return Outcome(model, of.bits, (last[0], last[1]), _over(learned, mean), seconds)


def tune(net: nn.Module, data: ImageDataModule, bits: BitConfig, length: Length, seed: int) -> QuantizedModel:
    """Given bits, for as many steps as a network that learns them."""
    _begin(data, seed)
    task = ImageClassifier(copy.deepcopy(net).train(), data.num_classes)
    model = task.quantize(bits, data.example_input)
    calibrate(model, _images(data))
    model.scale_gradients(*map(gradient_scaling, GRADIENTS))
    _fit(model, net, data, length, [])
    return model.eval()


def _over(learned: LearnedNetwork, mean: float) -> tuple[float, float]:
    weights, activations = learned.mean_bits()
    return weights / mean, activations / mean


def _begin(data: ImageDataModule, seed: int) -> None:
    pl.seed_everything(seed, verbose=False)
    data.seed = seed


def _images(data: ImageDataModule) -> list[torch.Tensor]:
    batches = islice(data.train_dataloader(), CALIBRATION_BATCHES)
    return [network_input(batch, "the train loader") for batch in batches]


def _fit(model: nn.Module, teacher: nn.Module, data: ImageDataModule, length: Length, callbacks: list[Any]) -> None:
    if length.distillation:
        callbacks = [*callbacks, Distillation("net", teacher, length.distillation)]
    task = ImageClassifier(model.train(), data.num_classes, length.rate, 0.01, scheduler="onecycle")
    trainer = quiet_trainer(
        max_epochs=length.epochs, limit_train_batches=length.steps, callbacks=callbacks, enable_checkpointing=False,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
