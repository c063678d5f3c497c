"""What sensitivities are taken from, and what they are: one interface for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from lightning_baqe.allocation.choices import Pairs
from lightning_baqe.allocation.layerwise import Layerwise
from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.quantization.config import FLOAT_BITS
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.sensitivity import OutputKind

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (output, targets) to the mean over the batch
Batch = tuple[torch.Tensor, torch.Tensor]
Tell = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True)
class Evidence:
    """A trained network, quantized at several widths, and some of its data.

    Args:
        models: ``{bits: the network calibrated at these bits}``, not corrected; with key 32, whose value is not read,
            layers may stay float.
        batches: ``(x, y)``.
        loss_fn: ``loss_fn(output, y)``, the mean over the batch.
        kind: of the outputs, for what looks at them without targets.
        kept: layers that have no choice, and are not float either; the first and the last as a rule.
        seed: of whatever is drawn.
        tell: told of the progress.

    Raises:
        ConfigError: no models, or of different layers; no batches.
    """

    models: Mapping[int, QuantizedModel | None]
    batches: list[Batch]
    loss_fn: Loss
    kind: OutputKind = "classes"
    kept: tuple[str, ...] = ()
    seed: int = 0
    tell: Tell = field(default=lambda done, total: None)

    def __post_init__(self) -> None:
        if not self.batches:
            raise ConfigError("sensitivities need at least one batch of (x, y), got none")
        device = next(self.layerwise.network.parameters()).device
        object.__setattr__(self, "batches", [(x.to(device), y.to(device)) for x, y in self.batches])

    @cached_property
    def layerwise(self) -> Layerwise:
        """The network, whose layers can be quantized one by one."""
        return Layerwise(self.models, self.kept)

    @property
    def image_count(self) -> int:
        """Of all batches."""
        return sum(len(x) for x, _ in self.batches)

    def chunks(self, most: int) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
        """Parts of the batches of at most so many images, with their share of all."""
        for x, y in self.batches:
            for part, targets in zip(x.split(most), y.split(most), strict=True):
                yield len(part) / self.image_count, part, targets

    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of some images.

        Raises:
            DataError: it is not finite.
        """
        loss = self.loss_fn(output, targets)
        if not bool(torch.isfinite(loss)):
            raise DataError(f"the loss is {loss.item()}, but sensitivities need a finite one: see to data and network")
        return loss


@dataclass(frozen=True)
class Sensitivities:
    """How much the loss is expected to rise where one layer has so many bits and all others are float.

    Attributes:
        values: ``{layer: {bits: value}}``, of any scale: only sums within one of these can be compared. 0 at 32 bits.
        pairs: what two layers add together, where the method knows.
    """

    values: dict[str, dict[int, float]]
    pairs: Pairs = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = {layer: {str(bits): value for bits, value in of.items()} for layer, of in self.values.items()}
        pairs = [[list(names), [[*bits, value] for bits, value in of.items()]] for names, of in self.pairs.items()]
        return {"values": values, "pairs": pairs}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Sensitivities:
        """What :meth:`record` gave."""
        values = {layer: {int(bits): float(v) for bits, v in of.items()} for layer, of in record["values"].items()}
        pairs = {
            (one, other): {(int(a), int(b)): float(value) for a, b, value in of} for (one, other), of in record["pairs"]
        }
        return cls(values, pairs)


class Sensitivity(ABC):
    """A method that gives sensitivities. It changes nothing: neither models nor their modes, nor the global random
    state, and its figures follow from evidence and seed.
    """

    @property
    def name(self) -> str:
        """For tables and files."""
        return type(self).__name__

    @abstractmethod
    def measure(self, evidence: Evidence) -> Sensitivities:
        """The sensitivity of each layer at each of its bits.

        Raises:
            DataError: a loss that is not finite.
        """


def float_free(
    values: dict[str, dict[int, float]], choices: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[int, float]]:
    """The same with 0 at 32 bits, where layers may have them."""
    return {
        name: {bits: 0.0 if bits == FLOAT_BITS else values[name][bits] for bits in offered}
        for name, offered in choices.items()
    }
