"""Landscapes: searches that answer any point at once, from measurements (surrogates as in NAS-Bench-301).

    landscape = Landscape.load("resnet18_glyphs")
    landscape.evaluate(landscape.candidates(1, rng)[0])   # error, latency / float's, size / float's

A landscape knows of a network on one CPU: the latency of every kernel with all knobs of a grid, at every bit-width;
what the kernels without knobs take; a correction from whole networks; a model of the accuracy, from trained and
deployed bit-configs; the exact size. ``python -m lightning_baqe.benchmarks.landscape`` measures all that; what is
shipped lies in ``data``, packed JSON that names the CPU, the versions, the command and how far off it is.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optuna.distributions import BaseDistribution
from torch import nn

from lightning_baqe.costs.accuracy_models import from_logit, from_record, logit
from lightning_baqe.costs.network_knowledge import best_schedules, conversion_groups, tied_to
from lightning_baqe.costs.structure import SizeTable, Structure
from lightning_baqe.errors import ConfigError
from lightning_baqe.landscapes.latency_tables import TUNED, Correction
from lightning_baqe.landscapes.record import read
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig
from lightning_baqe.quantization.sharing import shared_in
from lightning_baqe.runs.objectives import OBJECTIVES, REFERENCE_POINT
from lightning_baqe.search.knowledge import Kind, Knowledge, Sum
from lightning_baqe.tasks.networks import network
from lightning_baqe.tuning.network_space import NetworkSpace

FOLDER = resources.files("lightning_baqe.landscapes") / "data"
SUFFIX = ".json.gz"


def shipped() -> tuple[str, ...]:
    """Names of the landscapes that come with the package."""
    return tuple(sorted(file.name.removesuffix(SUFFIX) for file in FOLDER.iterdir() if file.name.endswith(SUFFIX)))


def read_record(source: str | Path) -> dict[str, Any]:
    """The record of a shipped landscape by its name, or of a file by its path.

    Raises:
        ConfigError: there is none.
        DataError: it is damaged, of another version or another schema; says where.
    """
    path = Path(source) if str(source).endswith(SUFFIX) else Path(str(FOLDER / f"{source}{SUFFIX}"))
    if not path.is_file():
        raise ConfigError(f"there is no landscape {str(source)!r}: give a path, or one of {list(shipped())}")
    return read(path)


class Landscape:
    """One landscape, a :class:`~lightning_baqe.landscapes.problem.Problem`.

    A parameter is named ``<layer>/bits`` or ``<layer>/<knob>``, as in
    :class:`~lightning_baqe.tuning.network_space.NetworkSpace`.
    Only :meth:`evaluate` and :meth:`error` tell what takes training to know. Size and latency are known before:
    :meth:`size`, :meth:`latency_us` and, kernel by kernel, :meth:`kernel_latency_us`, which once cost
    :meth:`kernel_seconds`.

    Attributes:
        name, distributions, objectives, reference_point: of the problem.
        space: the space that was measured.
        reference: ``latency_us`` and ``size_bytes`` of the float network.
        about: CPU, versions, command, date, and what was found on held-out data.

    Args:
        record: from :func:`read_record`.
        bit_choices: offer these bits alone; None: all that were measured.
        noise_seed: add noise of the size that repeated trainings and measurements had; it follows from this seed and
            the point. None: none.
        net: the float network; None: torchvision's by its name. Its weights do not matter.

    Raises:
        ConfigError: bits that were not measured.
    """

    objectives: tuple[str, ...] = OBJECTIVES
    reference_point: tuple[float, ...] = REFERENCE_POINT

    def __init__(
        self,
        record: Mapping[str, Any],
        bit_choices: Sequence[int] | None = None,
        noise_seed: int | None = None,
        net: nn.Module | None = None,
    ) -> None:
        self.name, self.about, self.noise_seed = str(record["name"]), record["about"], noise_seed
        if net is None:
            with torch.random.fork_rng(devices=[]):
                net = network(record["network"], record["num_classes"])
        self._structure = Structure(net, tuple(record["input_shape"]))
        base = BitConfig.uniform(net, 8, 8)
        found = NetworkSpace.from_record(base, record["space"])
        if bit_choices is not None:
            missing = sorted(set(bit_choices) - {bits for choices in found.bit_choices.values() for bits in choices})
            if missing or not bit_choices:
                raise ConfigError(f"{self.name} was measured without {missing or 'no bits at all'}: give others")
            choices = {layer: tuple(b for b in all_ if b in bit_choices) for layer, all_ in found.bit_choices.items()}
            found = NetworkSpace(base, choices, found.knobs, found.defaults)
        self.space = found
        self.distributions: dict[str, BaseDistribution] = self.space.distributions
        self.reference: Mapping[str, float] = record["reference"]
        self._seconds = record["seconds"]
        self._sizes = SizeTable.from_record(record["size"])
        latency = record["latency"]
        self._of = {layer: {int(b): i for b, i in of.items()} for layer, of in latency["of"].items()}
        self._kernels = [np.array(kernel["latency_us"]) for kernel in latency["kernels"]]
        self._kernel_seconds = [float(kernel["seconds"]) for kernel in latency["kernels"]]
        self._pixels: Mapping[str, float] = latency["pixels"]
        self._correction = Correction.from_record(latency["correction"])
        self._latency_spread = float(latency["spread"])
        self._scores = {
            layer: {int(bits): value for bits, value in of.items()} for layer, of in record.get("scores", {}).items()
        }
        self._accuracy = from_record(record["accuracy"]["model"])
        self._accuracy_spread = float(record["accuracy"]["spread"])
        self._layers = tuple(record["accuracy"]["layers"])

    @classmethod
    def load(
        cls, source: str | Path, bit_choices: Sequence[int] | None = None, noise_seed: int | None = None
    ) -> Landscape:
        """A shipped landscape by its name, one of :func:`shipped`, or one of a file; the other arguments are the
        class's.

        ConfigError where there is none, or for bits that were not measured; DataError for a damaged file.
        """
        return cls(read_record(source), bit_choices, noise_seed)

    def evaluate(self, params: Mapping[str, Any]) -> tuple[float, float, float]:
        """``(error, latency / float's, size / float's)`` of any point. ConfigError where a parameter is missing, or its
        value is none that was measured.
        """
        error, latency = self.error(params), self.latency_us(params)
        if self.noise_seed is not None:
            text = json.dumps(dict(params), sort_keys=True)
            draws = np.random.default_rng([self.noise_seed, zlib.crc32(text.encode())]).standard_normal(2)
            error = float(np.clip(error + self._accuracy_spread * draws[0], 0.0, 1.0))
            latency *= float(np.exp(self._latency_spread * draws[1]))
        return error, latency / self.reference["latency_us"], self.size(params)

    def candidates(self, n: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Points that span the space: the pool of BAQE III-C, as a search of the network has it."""
        return self.space.candidates(n, rng)

    def seconds(self, params: Mapping[str, Any]) -> float:
        """How long training, building and measuring a point takes on the CPU of the table."""
        return float(sum(self._seconds[part] for part in ("train", "build", "measure")))

    def knowledge(self, sensitivities: Mapping[str, Mapping[int, float]] | None = None) -> Knowledge:
        """What a search knows before any trial: sizes, the latencies of kernels that it tuned, sensitivities.

        Args:
            sensitivities: ``{layer: {bits: value}}``, in place of the divergences that were measured.

        Knobs are the space's defaults: the best of the few that a search tries of each kernel before it begins.
        """
        offered, base = self.space.bit_choices, max(min(c) for c in self.space.bit_choices.values())
        plain = self.at(dict.fromkeys(offered, base))
        smallest, total = self.size(plain), float(self.reference["latency_us"])
        size, latency = {}, {}
        for leader, choices in offered.items():
            bits, group = dict.fromkeys(offered, base), tied_to(self.space, leader)
            size[f"{leader}/bits"] = {b: self.size(self.at({**bits, leader: b})) - smallest for b in choices}
            latency[f"{leader}/bits"] = {
                b: sum(self.kernel_latency_us(layer, b, self.space.defaults[layer][b]) for layer in group) / total
                for b in choices
            }
        kernels, pixels, *_ = self.parts(plain)
        searched = sum(choices[base] for choices in latency.values())
        known = self._scores if sensitivities is None else sensitivities
        exact: Kind = "estimate" if any(FLOAT_BITS in choices for choices in offered.values()) else "exact"
        scores = {
            f"{leader}/bits": {b: known[leader].get(b, 0.0) for b in choices}
            for leader, choices in offered.items()
            if leader in known
        }
        return Knowledge(
            [
                Sum(scores, 0.0, "score", tuple(f"{leader}/bits" for leader in offered)),
                Sum(
                    latency,
                    (kernels + pixels) / total - searched,
                    groups=conversion_groups(self.space, shared_in(self._structure.reader, self.space.base)),
                    step=sum(self._pixels.values()) / max(len(self._pixels), 1) / total,
                ),
                Sum(size, smallest, exact),
            ],
            *best_schedules(self.space),
        )

    def preparation_s(self) -> float:
        """How long tuning every kernel at every bit-width took, as far as :meth:`knowledge` needs it."""
        used = {self._kernel(layer, b) for layer, of in self.space.defaults.items() for b in of}
        return TUNED * sum(self._kernel_seconds[index] for index in used)

    def at(self, bits: Mapping[str, int]) -> dict[str, Any]:
        """The point with these bits and the best known knobs.

        Args:
            bits: of each layer that is searched, or of the first of those that are tied.
        """
        best, fixed = best_schedules(self.space)
        point: dict[str, Any] = {f"{layer}/bits": width for layer, width in bits.items()}
        for layer, width in bits.items():
            point.update(best[f"{layer}/bits"][width])
        return point | fixed

    def error(self, params: Mapping[str, Any]) -> float:
        """1 - accuracy on the validation split, as the model of trained bit-configs predicts it; knobs do not count."""
        bits = self._bits(params)
        widths = np.array([[bits[layer].activation for layer in self._layers]], dtype=np.float64)
        return float(from_logit(logit(self._accuracy.predict(widths)))[0])

    def size_bytes(self, params: Mapping[str, Any]) -> int:
        """What :attr:`IntegerGraph.size_bytes` of the lowered network is, exactly."""
        return self._sizes.size_bytes(self._structure, self._bits(params))

    def size(self, params: Mapping[str, Any]) -> float:
        """Size over the float network's, exactly."""
        return float(self.size_bytes(params) / self.reference["size_bytes"])

    def latency_us(self, params: Mapping[str, Any]) -> float:
        """Latency of the whole network: kernels and conversions, corrected by measurements of whole networks."""
        return float(self._correction.apply(np.array([self.parts(params)]))[0])

    def parts(self, params: Mapping[str, Any]) -> tuple[float, float, float, float]:
        """What the latency is made of: microseconds of the measured kernels with knobs, and of those without
        (conversions), the number of the latter, and the size in megabytes.
        """
        bits, schedules = self.space.point(params)
        kernels = sum(
            self.kernel_latency_us(layer, bits[layer].activation, schedules[layer]) for layer in self.space.defaults
        )
        calls = self._structure.conversions(bits)
        if unknown := sorted(set(calls) - set(self._pixels)):
            raise ConfigError(f"{self.name} has no latency of {', '.join(unknown[:3])}: take an undamaged copy")
        pixels = math.fsum(times * self._pixels[call] for call, times in calls.items())  # in any order the same
        return kernels, pixels, float(calls.total()), self.size_bytes(params) / 1e6

    def kernel_latency_us(self, layer: str, bits: int, knobs: Mapping[str, Any]) -> float:
        """Measured latency of a layer's kernel; conversions of its input are no part of it.

        ``bits`` are those of its weights and activations, ``knobs`` all that the space has for the layer; others are
        left aside. ConfigError for a layer, bits or knobs that were not measured.
        """
        table, index = self._kernels[self._kernel(layer, bits)], 0
        for knob, values in self.space.knobs.get(layer, {}).items():
            if knobs.get(knob) not in values:
                raise ConfigError(f"{layer}/{knob}={knobs.get(knob)!r}; measured were {list(values)}: give one of them")
            index = index * len(values) + values.index(knobs[knob])
        return float(table[index])

    def kernel_seconds(self, layer: str, bits: int) -> float:
        """How long compiling and measuring a layer's kernel with one choice of knobs takes, on average over knobs.
        ConfigError for a layer or bits that were not measured.
        """
        return self._kernel_seconds[self._kernel(layer, bits)]

    def _kernel(self, layer: str, bits: int) -> int:
        if layer not in self._of:
            raise ConfigError(f"{self.name} has no layer {layer!r}; it has {list(self._of)}")
        if bits not in self._of[layer]:
            raise ConfigError(
                f"{layer} was measured at {sorted(self._of[layer])} bit, not at {bits!r}: give one of them"
            )
        return self._of[layer][bits]

    def _bits(self, params: Mapping[str, Any]) -> BitConfig:
        for layer in self._layers:
            if params.get(f"{layer}/bits") not in self._of[layer]:
                raise ConfigError(
                    f"{layer}/bits={params.get(f'{layer}/bits')!r}; measured were {sorted(self._of[layer])}: give one "
                    "of them"
                )
        return self.space.point(params)[0]
