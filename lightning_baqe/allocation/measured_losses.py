"""Sensitivities that are measured: layers are quantized, and what becomes of the outputs is looked at."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lightning_baqe.allocation.evidence import Evidence, Sensitivities, Sensitivity, float_free
from lightning_baqe.quantization.config import FLOAT_BITS
from lightning_baqe.quantization.sensitivity import output_divergence


@dataclass(frozen=True)
class Divergence(Sensitivity):
    """How far the outputs go from the float network's; needs no targets. See
    :func:`lightning_baqe.quantization.sensitivity.output_divergence`.
    """

    def measure(self, evidence: Evidence) -> Sensitivities:
        """The sensitivity of each layer at each of its bits."""
        layerwise = evidence.layerwise
        choices = _quantized(layerwise.choices)
        values = {name: dict.fromkeys(bits, 0.0) for name, bits in choices.items()}
        steps = [(name, b) for name, bits in choices.items() for b in bits]
        with torch.no_grad():
            reference = [layerwise.network(x) for x, _ in evidence.batches]
            for done, (name, bits) in enumerate(steps, 1):
                with layerwise.at({name: bits}) as network:
                    for (x, _), wanted in zip(evidence.batches, reference, strict=True):
                        far = output_divergence(wanted, network(x), evidence.kind)
                        values[name][bits] += max(float(far), 0.0) * len(x) / evidence.image_count
                evidence.tell(done, len(steps))
        return Sensitivities(float_free(values, layerwise.choices))


@dataclass(frozen=True)
class LossChange(Sensitivity):
    """By how much the loss rises; negative where it falls."""

    def measure(self, evidence: Evidence) -> Sensitivities:
        """The sensitivity of each layer at each of its bits."""
        choices = _quantized(evidence.layerwise.choices)
        steps = [(name, b) for name, bits in choices.items() for b in bits]
        before = mean_loss(evidence, {})
        values: dict[str, dict[int, float]] = {name: {} for name in choices}
        for done, (name, bits) in enumerate(steps, 1):
            values[name][bits] = mean_loss(evidence, {name: bits}) - before
            evidence.tell(done, len(steps))
        return Sensitivities(float_free(values, evidence.layerwise.choices))


@dataclass(frozen=True)
class PairwiseLoss(Sensitivity):
    """CLADO (Deng et al., 2023): by how much the loss rises for each layer, and by how much more for each two layers
    together than for each alone; the integer program with these terms is quadratic.

    The loss is taken for each two choices of each two layers: a few hundred images will do.

    Args:
        images: at most so many.
    """

    images: int = 128

    def measure(self, evidence: Evidence) -> Sensitivities:
        """The sensitivity of each layer at each of its bits, and of pairs."""
        choices = _quantized(evidence.layerwise.choices)
        free = {name: bits for name, bits in choices.items() if len(evidence.layerwise.choices[name]) > 1}
        steps = [(name, b) for name, bits in choices.items() for b in bits]
        both = [
            (one, a, other, b)
            for one, other in itertools.combinations(free, 2)
            for a, b in itertools.product(free[one], free[other])
        ]
        total = len(steps) + len(both)
        before = mean_loss(evidence, {}, self.images)
        values: dict[str, dict[int, float]] = {name: {} for name in choices}
        pairs: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
        for done, (name, bits) in enumerate(steps, 1):
            values[name][bits] = mean_loss(evidence, {name: bits}, self.images) - before
            evidence.tell(done, total)
        for done, (one, a, other, b) in enumerate(both, len(steps) + 1):
            together = mean_loss(evidence, {one: a, other: b}, self.images) - before
            pairs.setdefault((one, other), {})[a, b] = together - values[one][a] - values[other][b]
            evidence.tell(done, total)
        return Sensitivities(float_free(values, evidence.layerwise.choices), pairs)


@torch.no_grad()
def mean_loss(evidence: Evidence, bits: Mapping[str, int], images: int | None = None) -> float:
    """With these layers quantized, over all images or the first so many."""
    found = seen = 0.0
    with evidence.layerwise.at(bits) as network:
        for x, y in evidence.batches:
            most = len(x) if images is None else min(len(x), images - int(seen))
            if most < 1:
                break
            found += float(evidence.loss(network(x[:most]), y[:most])) * most
            seen += most
    return found / seen


def _quantized(choices: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(b for b in bits if b != FLOAT_BITS) for name, bits in choices.items()}
