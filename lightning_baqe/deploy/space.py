"""BAQE's unified search space (section III-B, eq. 2): bits of every layer and knobs of every kernel, in one mapping."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from lightning_baqe.deploy.conv_template import ConvSpec, knob_space
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.deploy.records import Records
from lightning_baqe.deploy.target import CpuTarget
from lightning_baqe.errors import ConfigError
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.quantization.config import BitConfig, LayerBits

TILES = 12


@dataclass(frozen=True)
class NetworkSpace:
    """The points that a search may try. A parameter is named ``<layer>/bits`` or ``<layer>/<knob>``.

    Args:
        base: bits of the layers that are not searched; ties are kept.
        bit_choices: ``{layer: bits to choose from}``; weights and activations of a layer get the same.
        knobs: ``{layer: {knob: values}}``.
        defaults: ``{layer: {knob: value}}``, the best known knobs.
    """

    base: BitConfig
    bit_choices: Mapping[str, tuple[int, ...]]
    knobs: Mapping[str, Mapping[str, tuple[Any, ...]]]
    defaults: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(
        cls,
        graph: IntegerGraph,
        base: BitConfig,
        bit_choices: Sequence[int],
        target: CpuTarget,
        threads: int = 1,
        schedules: bool = True,
        records: Records | None = None,
    ) -> NetworkSpace:
        """The space of a network.

        Args:
            graph: the network at 8 bits.
            base: its bits; layers that are not at ``base``'s inner bit-width are fixed (first and last).
            bit_choices: for every layer between the first and the last.
            target, threads: what the kernels are compiled for.
            schedules: False leaves all knobs at their best known values.
            records: where best known knobs are looked up.

        Raises:
            ConfigError: no choice, or one that is no bit-width.
        """
        if not bit_choices or any(bits != 32 and not 2 <= bits <= 8 for bits in bit_choices):
            raise ConfigError(f"bit_choices are 2..8 or 32 (float), at least one; got {list(bit_choices)}")
        layers = list(base)
        inner = layers[1:-1]
        followers = {name for group in base.ties for name in group[1:]}
        choices = {name: tuple(bit_choices) for name in inner if name not in followers}
        best = (lambda spec: records.best_knobs(spec, target)) if records is not None else None
        plan = make_plan(graph, target, None, threads, best)
        knobs: dict[str, dict[str, tuple[Any, ...]]] = {}
        for call in plan.calls:
            if not schedules or call.layer is None or not isinstance(call.spec, ConvSpec):
                continue
            lowest = min(choices.get(call.layer, (8,)))
            spec = dataclasses.replace(call.spec, weight_bits=lowest)
            values = knob_space(spec, limit=TILES)
            default = plan.schedules[call.layer]
            values["tile"] = list(dict.fromkeys([default["tile"], *values["tile"]]))
            knobs[call.layer] = {name: tuple(found) for name, found in values.items() if len(found) > 1}
        return cls(base, choices, knobs, plan.schedules)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The space as Optuna knows it."""
        found: dict[str, BaseDistribution] = {}
        for layer, bits in self.bit_choices.items():
            found[f"{layer}/bits"] = CategoricalDistribution(bits)
        for layer, knobs in self.knobs.items():
            for knob, values in knobs.items():
                found[f"{layer}/{knob}"] = CategoricalDistribution(values)
        return found

    def point(self, params: Mapping[str, Any]) -> tuple[BitConfig, dict[str, dict[str, Any]]]:
        """``(bits, schedules)`` of a point; knobs that are not searched stay at their best known values.

        Raises:
            ConfigError: a parameter is missing.
        """
        missing = [name for name in self.distributions if name not in params]
        if missing:
            raise ConfigError(
                f"the point lacks {missing[:5]}; a point has all of the space's {len(self.distributions)}"
            )
        chosen = {layer: params[f"{layer}/bits"] for layer in self.bit_choices}
        for group in self.base.ties:
            if group[0] in chosen:
                chosen.update(dict.fromkeys(group[1:], chosen[group[0]]))
        bits = self.base.replace({layer: LayerBits(value, value) for layer, value in chosen.items()})
        schedules = {layer: dict(defaults) for layer, defaults in self.defaults.items()}
        for layer, knobs in self.knobs.items():
            for knob in knobs:
                schedules[layer][knob] = params[f"{layer}/{knob}"]
        return bits, schedules

    def candidates(self, n: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Points that span the space, for the initial pool (BAQE section III-C asks for 500 representative ones).

        Each candidate has its own shares of the bit-widths, Dirichlet with concentration 0.5, so that near-uniform
        networks are among them; and its own quality of knobs: with a probability drawn for the candidate a layer keeps
        its best known knobs, else it draws them at random.
        """
        bits = sorted({value for values in self.bit_choices.values() for value in values})
        points: list[dict[str, Any]] = []
        seen: set[tuple[Any, ...]] = set()
        for _ in range(20 * n):
            shares = dict(zip(bits, rng.dirichlet([0.5] * len(bits)), strict=True))
            quality = rng.random()
            point: dict[str, Any] = {}
            for layer, values in self.bit_choices.items():
                weights = np.array([shares[value] for value in values]) + 1e-9
                point[f"{layer}/bits"] = values[rng.choice(len(values), p=weights / weights.sum())]
            for layer, knobs in self.knobs.items():
                keep = rng.random() < quality
                for knob, found in knobs.items():
                    default = self.defaults[layer][knob]
                    keeps = keep and default in found
                    point[f"{layer}/{knob}"] = default if keeps else found[rng.integers(len(found))]
            key = tuple(point.values())
            if key not in seen:
                seen.add(key)
                points.append(point)
            if len(points) == n:
                break
        return points
