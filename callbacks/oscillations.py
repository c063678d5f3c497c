"""Weights that jump to and fro between two integers: damped, or held (Nagel et al., ICML 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_baqe.callbacks.host import network_of
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.layers import QuantLayer, as_stored, outputs_first
from lightning_baqe.quantization.weight import WeightQuantizer

MOMENTUM = 0.01


class Oscillations(pl.Callback):
    """Keep quantized weights from oscillating around the borders between two integers, with few bits a large part of a
    network's error and of its batch norms' statistics: "Overcoming oscillations in quantization-aware training".

    - Damping (section 4.1): ``damping * (q - w)²``, summed over all weights w within the range, q their quantized
      value, pulls weights to the middle of their integers. It rises from 0 to ``damping`` as a cosine over training.
    - Freezing (section 4.2): a weight whose integer changes to and fro more often than ``freeze_above`` is held for
      good at the integer that it had most. How often is a running mean over steps, of momentum 0.01.

    Args:
        network: attribute of the LightningModule that holds the fake-quantized network; dots reach deeper.
        damping: 0 or more; some 1e-3 to 1e-1.
        freeze_above: changes of direction a step, above 0 to 1, some 0.01 to 0.1; None: no weight is held.

    Attributes:
        frozen: share of the weights that are held, 0 to 1.

    Raises:
        ConfigError: a number out of range. When fit starts: no such network, or one that is not fake-quantized.
    """

    def __init__(self, network: str = "net", damping: float = 0.0, freeze_above: float | None = None) -> None:
        super().__init__()
        if not 0 <= damping < math.inf:
            raise ConfigError(f"damping={damping!r}, but a number of 0 or more is wanted")
        if freeze_above is not None and not 0 < freeze_above <= 1:
            raise ConfigError(f"freeze_above={freeze_above!r}, but a number above 0, up to 1, is wanted, or None")
        self.network, self.damping, self.freeze_above = network, damping, freeze_above
        self._tracks: dict[str, dict[str, Tensor]] = {}
        self._step = 0  # of the optimizer, that was looked at last

    @property
    def frozen(self) -> float:
        """See the class."""
        held = [track["held"] for track in self._tracks.values()]
        total = sum(of.numel() for of in held)
        return sum(int(of.sum()) for of in held) / total if total else 0.0

    @property
    def state_key(self) -> str:
        """One for each network."""
        return self._generate_state_key(network=self.network)

    def state_dict(self) -> dict[str, Any]:
        """What is known of each weight."""
        return {"tracks": self._tracks, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._tracks = {name: dict(track) for name, track in state_dict["tracks"].items()}
        self._step = state_dict["step"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that there is something to be quantized."""
        network = network_of(pl_module, self.network)
        if not isinstance(network, QuantizedModel):
            raise ConfigError(
                f"{self.network!r} is a {type(network).__name__}, whose weights have no integers: quantize it first"
            )
        if not any(True for _ in _layers(network)):
            raise ConfigError(
                f"{self.network!r} has no layer whose weights have integers of fixed bits: leave this out"
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the damping's gradient."""
        if self.damping == 0:
            return
        strength = self.damping * _risen(trainer)
        for _, layer, quantizer in _layers(network_of(pl_module, self.network)):
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            if weight.grad is None:
                continue
            with torch.no_grad():
                own = outputs_first(layer)
                away = own - quantizer(own)
                _, scale = quantizer.integers(own)
                step = scale.abs().to(own.dtype).reshape(-1, *[1] * (own.ndim - 1))
                # Beyond the range the nearest integer is the last one, and clipping alone decides.
                away = torch.where(away.abs() <= step / 2 * (1 + 1e-4), away, 0.0)
                weight.grad.add_(as_stored(layer, away), alpha=2 * strength)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow each weight's integer, and hold those that oscillate."""
        if self.freeze_above is None or trainer.global_step == self._step:
            return  # gradients are still being accumulated
        self._step = trainer.global_step
        for name, layer, quantizer in _layers(network_of(pl_module, self.network)):
            own = outputs_first(layer)
            integers, scale = quantizer.integers(own)
            integers = integers.to(torch.float32)
            track = self._tracks.get(name)
            if track is None or track["integers"].shape != integers.shape:
                zeros = torch.zeros_like(integers)
                track = {"integers": integers, "mean": integers.clone(), "often": zeros, "last": zeros.clone(),
                         "held": zeros.bool()}  # fmt: skip
                self._tracks[name] = track
                continue
            track = self._tracks[name] = {key: value.to(integers.device) for key, value in track.items()}
            moved = torch.sign(integers - track["integers"])
            turned = (moved * track["last"] < 0).to(torch.float32)
            track["often"].lerp_(turned, MOMENTUM)
            track["mean"].lerp_(integers, MOMENTUM)
            track["last"] = torch.where(moved != 0, moved, track["last"])
            fresh = (track["often"] > self.freeze_above) & ~track["held"]
            track["held"] |= fresh
            # What is held stays an integer, also while its scale learns.
            target = torch.where(fresh, track["mean"].round(), track["integers"])
            track["integers"] = torch.where(track["held"], target, integers)
            step = scale.to(own.dtype).reshape(-1, *[1] * (own.ndim - 1))
            wanted = torch.where(track["held"], track["integers"].to(own.dtype) * step, own)
            layer.weight.copy_(as_stored(layer, wanted))  # type: ignore[operator]


def _risen(trainer: pl.Trainer) -> float:
    """0 at the first step, 1 at the last; 1 in a training without an end."""
    total = trainer.estimated_stepping_batches
    if math.isinf(total):
        return 1.0
    return (1 - math.cos(math.pi * min(trainer.global_step / max(total - 1, 1), 1.0))) / 2


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Module, WeightQuantizer]]:
    for name, module in network.named_modules():
        if isinstance(module, QuantLayer) and isinstance(module.weight_quantizer, WeightQuantizer):
            yield name, module, module.weight_quantizer
