"""Bits that are learned while a network is trained, in anybody's Trainer and with anybody's LightningModule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_baqe.errors import ConfigError, InfeasibleError, check_at_least
from lightning_baqe.learned_bits.learned_network import LearnedNetwork
from lightning_baqe.learned_bits.learned_quantizers import bits_and_counts
from lightning_baqe.learned_bits.pressure import Controller, Pressure
from lightning_baqe.quantization.config import MAX_BITS, MIN_BITS, BitConfig

SETTLED = 0.7  # of learning bits, after which steps of the quantizers grow smaller


class LearnedBits(pl.Callback):
    """Trains a network in three phases (Schaefer et al., section 3, figure 3): at the bits that it has; with bits that
    learn, under a growing pressure towards a size; at the whole bits that came of it, to the end of fit.

    The quantizers' parameters are taken out of the module's optimisers: RMSProp moves them, by the mean gradient of
    ``every`` steps while bits are learned, of each step before and after that. Loss, optimisers and everything else
    stay the module's own. Fit may be interrupted in any phase and go on from a checkpoint.

    Example::

        learned = learn_bits(net, batches, bits=8, example_input=x)
        module.net = learned.model
        callback = LearnedBits(learned, weights=3, activations=3, pretrain_epochs=1, learn_epochs=3)
        pl.Trainer(max_epochs=6, callbacks=[callback]).fit(module, loader)
        model = learned.deployable(callback.bits)

    Attributes:
        bits: whole ones, from the third phase on; None before.
        curve: mean bits of weights and of activations after each update, and both penalties' factors in it.

    Args:
        learned: whose ``model`` the module trains.
        weights, activations: targets, mean bits; or None, where there is one in bytes.
        pretrain_epochs, learn_epochs: of the first and the second phase; fit must be longer than both.
        start: bits of all in the first phase, in turn, each for as many of its epochs, such as ``(8, 6, 4)``; those of
            the first epochs come first. None: what they are.
        every: steps from one update of the quantizers to the next while bits are learned.
        learning_rate: of the quantizers' logarithms, for one update while bits are learned; an ``every``-th of it for
            the ranges' steps before and after. It falls to 0 in the last part of learning.
        pressure: of weights and of activations; None: a :class:`Controller` each.
        weight_bytes, activation_bytes: targets instead of mean bits. That of weights is for batch norms and biases,
            too; what is not quantized counts 2 bytes a value. Activations are all layers' inputs of one sample.

    Raises:
        ConfigError: arguments out of range. When fit starts: a fit that ends before the third phase, or that does not
            train the network.
        InfeasibleError: a target below the smallest bits.
    """

    def __init__(
        self,
        learned: LearnedNetwork,
        weights: float | None = None,
        activations: float | None = None,
        pretrain_epochs: int = 1,
        learn_epochs: int = 3,
        every: int = 20,
        learning_rate: float = 0.05,
        pressure: Sequence[Pressure] | None = None,
        weight_bytes: float | None = None,
        activation_bytes: float | None = None,
        start: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_at_least("pretrain_epochs", pretrain_epochs, 0)
        check_at_least("learn_epochs", learn_epochs, 1)
        check_at_least("every", every, 1)
        if not learning_rate > 0:
            raise ConfigError(f"learning_rate={learning_rate!r}, but a number above 0 is wanted")
        if start is not None:
            check_start(start, pretrain_epochs)
        self.learned, self.every, self.learning_rate = learned, every, learning_rate
        self.pretrain_epochs, self.learn_epochs = pretrain_epochs, learn_epochs
        self.pressure = tuple(pressure) if pressure is not None else (Controller(), Controller())
        self.targets = targets_of(learned, (weights, activations), (weight_bytes, activation_bytes))
        self.start = None if start is None else tuple(start)
        self.bits: BitConfig | None = None
        self.curve: list[list[float]] = []
        self._parameters = learned.parameters()
        self._optimizer = torch.optim.RMSprop(self._parameters, learning_rate)
        self._gradients: list[Tensor | None] = [None] * len(self._parameters)
        self._steps = self._updates = 0
        self._loaded: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that the network is trained, and long enough."""
        known = set(map(id, pl_module.parameters()))
        if any(id(parameter) not in known for parameter in self._parameters):
            raise ConfigError(
                f"{type(pl_module).__name__} does not hold the learned network: set module.net to its model"
            )
        longest = trainer.max_epochs
        if longest is not None and 0 <= longest <= self.pretrain_epochs + self.learn_epochs:
            raise ConfigError(
                f"max_epochs={longest}, but {self.pretrain_epochs} epochs at fixed bits and {self.learn_epochs} of "
                "learning them are to be followed by some at the bits that were learned: give more"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the phase that a checkpoint was written in."""
        if math.isinf(trainer.num_training_batches):
            raise ConfigError(
                "the training loader has no length, and progress is counted in it: give limit_train_batches"
            )
        steps = trainer.num_training_batches * self.learn_epochs // trainer.accumulate_grad_batches
        if steps < self.every:
            raise ConfigError(
                f"learn_epochs={self.learn_epochs} are {steps} steps; the quantizers learn at every {self.every}th: "
                f"give more of them, or every={max(steps // 10, 1)}"
            )
        before = trainer.num_training_batches * (self.pretrain_epochs + self.learn_epochs)
        if -1 < trainer.max_steps <= before // trainer.accumulate_grad_batches:
            raise ConfigError(
                f"max_steps={trainer.max_steps} ends fit before the bits that were learned are trained at: give more"
            )
        if self._loaded is not None:  # only now are parameters where they are trained
            self._optimizer.load_state_dict(self._loaded["optimizer"])
            self._gradients = [
                None if of is None else of.to(parameter.device)
                for of, parameter in zip(self._loaded["gradients"], self._parameters, strict=True)
            ]
            self._loaded = None
        self._enter(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the epoch's phase."""
        self._enter(trainer.current_epoch)

    def _enter(self, epoch: int) -> None:
        if epoch < self.pretrain_epochs:
            self._enter_pretraining(epoch)
        elif epoch < self.pretrain_epochs + self.learn_epochs:
            self.learned.release()
        else:
            self.bits = self.bits or self.learned.materialise(*self.targets)
            self.learned.fix(self.bits)

    def _enter_pretraining(self, epoch: int) -> None:
        for quantizer in self.learned.quantizers:
            quantizer.fix(float(quantizer.bits().detach().mean().round()))
        if self.start is not None:
            bits = self.start[epoch * len(self.start) // self.pretrain_epochs]
            for quantizer in (*self.learned.weights.values(), *self.learned.activations.values()):
                quantizer.fix(bits)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the quantizers' gradients out of the module's optimiser."""
        if all(parameter.grad is None for parameter in self._parameters):
            return  # one of several optimisers, of other parameters
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if not bool(torch.stack([torch.isfinite(grad).all() for grad in grads]).all()):  # waits for a GPU once
            # In mixed precision a step whose gradients overflow is left out for the weights, too.
            for parameter in self._parameters:
                parameter.grad = None
            return
        self._steps += 1
        for place, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                continue
            before = self._gradients[place]
            self._gradients[place] = parameter.grad if before is None else before + parameter.grad
            parameter.grad = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the quantizers where it is time."""
        learns = self.pretrain_epochs <= trainer.current_epoch < self.pretrain_epochs + self.learn_epochs
        if self._steps < (self.every if learns else 1):  # not yet, or gradients are still being accumulated
            return
        for place, parameter in enumerate(self._parameters):
            total = self._gradients[place]
            parameter.grad = None if total is None else total / self._steps
        rate, factors = self.learning_rate, list[float]()
        if learns:
            steps = trainer.num_training_batches / trainer.accumulate_grad_batches * self.learn_epochs
            progress = min(self._updates * self.every / steps, 1.0)
            rate *= min((1 - progress) / (1 - SETTLED), 1.0)
            factors = self._press(progress)
            self._updates += 1
        else:
            rate /= self.every
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.learned.project()
        if learns:
            self.curve.append([*self.learned.mean_bits(), *factors])
        self._gradients, self._steps = [None] * len(self._parameters), 0

    def _press(self, progress: float) -> list[float]:
        """Add both penalties' gradients; their factors."""
        factors = []
        parts = (self.learned.weights, self.learned.activations)
        for of, quantizers, target in zip(self.pressure, parts, self.targets, strict=True):
            penalty, factor = of.penalty(progress, *bits_and_counts(quantizers.values()), 8 * target)
            penalty.backward()
            factors.append(factor)
        return factors

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "bits": None if self.bits is None else self.bits.to_json(),
            "curve": self.curve,
            "optimizer": self._optimizer.state_dict(),
            "gradients": self._gradients,
            "steps": self._steps,
            "updates": self._updates,
            "pressure": [of.state() for of in self.pressure],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        bits = state_dict["bits"]
        self.bits = None if bits is None else BitConfig.from_json(bits)
        self.curve = [*map(list, state_dict["curve"])]
        self._loaded = state_dict
        self._steps, self._updates = state_dict["steps"], state_dict["updates"]
        for of, state in zip(self.pressure, state_dict["pressure"], strict=True):
            of.restore(state)
        if not all(map(math.isfinite, (value for row in self.curve for value in row))):
            raise ConfigError("the checkpoint's bits are not finite: training diverged before it was written")


def targets_of(
    learned: LearnedNetwork, mean_bits: Sequence[float | None], in_bytes: Sequence[float | None]
) -> tuple[float, float]:
    """Bytes that weights, and activations, may have at most.

    Args:
        learned: that is to keep them.
        mean_bits, in_bytes: of both; of each one of the two is None. Bytes of weights are with what is not quantized.

    Raises:
        ConfigError: both are given, or none.
        InfeasibleError: below the smallest network; names its size.
    """
    found = []
    for place, (name, argument, apart) in enumerate(
        (("weights", "weight_bytes", learned.unquantized_bytes), ("activations", "activation_bytes", 0))
    ):
        bits, size, smallest = mean_bits[place], in_bytes[place], learned.bytes_of(MIN_BITS)[place]
        if bits is not None and size is None:
            limit, wanted = learned.bytes_of(bits)[place], f"{name}={bits!r} mean bits"
        elif bits is None and size is not None:
            limit, wanted = size - apart, f"{argument}={size!r}"
        else:
            raise ConfigError(f"{name}={bits!r} and {argument}={size!r}, but one of the two is wanted, the other None")
        if not limit >= smallest:
            beside = f", and {apart:,} that are not quantized" if apart and bits is None else ""
            raise InfeasibleError(
                f"{wanted} cannot be reached: the smallest network, of {MIN_BITS} bits, has {smallest:,.0f} bytes of "
                f"{name}{beside}"
            )
        found.append(limit)
    return found[0], found[1]


def check_start(start: Sequence[int], pretrain_epochs: int) -> None:
    """Raises ConfigError for bits of the first phase that cannot be right."""
    if not isinstance(start, Sequence) or not start or any(bits not in range(MIN_BITS, MAX_BITS + 1) for bits in start):
        raise ConfigError(f"start={start!r}, wanted are bits of {MIN_BITS} to {MAX_BITS}, one or more in turn")
    if len(start) > max(pretrain_epochs, 1):
        raise ConfigError(f"start={start!r} are {len(start)} bits in turn for {pretrain_epochs} epochs: give more")
