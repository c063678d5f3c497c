"""BAQE's unified search space (section III-B, eq. 2): bits of every layer and knobs of every kernel, in one mapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from pydantic import BaseModel, ConfigDict, Field

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.tunable import template_of
from lightning_baqe.measurement.database import Records
from lightning_baqe.quantization.config import BitConfig, LayerBits

TILES = 12
Knob = bool | int | float | str | None


class SpaceRecord(BaseModel):
    """A space as JSON holds it, see :class:`NetworkSpace`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    bit_choices: dict[str, Annotated[list[Annotated[int, Field(ge=2, le=32)]], Field(min_length=1)]]
    knobs: dict[str, dict[str, Annotated[list[Knob], Field(min_length=1)]]]
    defaults: dict[str, dict[Annotated[str, Field(pattern=r"^([2-8]|32)$")], dict[str, Knob]]]


@dataclass(frozen=True)
class NetworkSpace:
    """The points that a search may try. A parameter is named ``<layer>/bits`` or ``<layer>/<knob>``.

    Args:
        base: bits of the layers that are not searched; ties are kept.
        bit_choices: ``{layer: bits to choose from}``; weights and activations of a layer get the same.
        knobs: ``{layer: {knob: values}}``.
        defaults: ``{layer: {bits: {knob: value}}}``, the best known knobs of its kernel at each bit-width.
    """

    base: BitConfig
    bit_choices: Mapping[str, tuple[int, ...]]
    knobs: Mapping[str, Mapping[str, tuple[Any, ...]]]
    defaults: Mapping[str, Mapping[int, Mapping[str, Any]]]

    @classmethod
    def of(
        cls,
        graphs: Mapping[int, IntegerGraph],
        base: BitConfig,
        options: BuildOptions,
        schedules: bool = True,
        records: Records | None = None,
        supported: Mapping[str, tuple[int, ...]] | None = None,
    ) -> NetworkSpace:
        """The space of a network.

        Args:
            graphs: ``{bits: the network at these bits}``, one for each choice of the layers between first and last.
            base: bits of the first and the last layer, which are not searched.
            schedules: False leaves all knobs at their best known values.
            records: where best known knobs are looked up.
            supported: ``{layer: bits that the device has kernels for}``; None: all.
        """
        layers = list(base)
        followers = {name for group in base.ties for name in group[1:]}
        choices = {name: tuple(graphs) for name in layers[1:-1] if name not in followers}
        if supported is not None:
            choices = {name: _supported(found, name, base, supported) for name, found in choices.items()}
        best = (lambda spec: records.best_knobs(spec, options.target)) if records is not None else None
        defaults: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in layers}
        offered: dict[str, dict[str, list[Any]]] = {name: {} for name in layers}
        for graph in graphs.values():
            plan = make_plan(graph, options, None, best)
            for layer, spec in plan.tunable().items():
                if layer not in defaults:
                    continue  # its weight is no layer's: it has bits of its own, and its best known knobs
                bits = graph.bits[layer][1]
                if layer not in choices and layer not in followers and bits != base[layer].activation:
                    continue  # the first or the last layer, at bits that it never gets
                default = plan.schedules[layer]
                defaults[layer][bits] = default
                template = template_of(spec)
                for knob, values in template.knob_space(spec).items():
                    if knob in template.unsearched:
                        continue
                    found = offered[layer].setdefault(knob, [])
                    found.extend(value for value in (default[knob], *values[:TILES]) if value not in found)
        knobs = {
            layer: {knob: tuple(found) for knob, found in space.items() if len(found) > 1}
            for layer, space in offered.items()
            if schedules and space
        }
        return cls(base, choices, knobs, defaults)

    def record(self) -> dict[str, Any]:
        """The space as JSON can hold it, for :meth:`from_record`."""
        return {
            "bit_choices": {layer: list(bits) for layer, bits in self.bit_choices.items()},
            "knobs": {layer: {k: list(v) for k, v in knobs.items()} for layer, knobs in self.knobs.items()},
            "defaults": {layer: {str(b): dict(k) for b, k in known.items()} for layer, known in self.defaults.items()},
        }

    @classmethod
    def from_record(cls, base: BitConfig, record: Mapping[str, Any]) -> NetworkSpace:
        """The space that a record holds: a search keeps the space that it began with, whatever was measured since."""
        return cls(
            base,
            {layer: tuple(bits) for layer, bits in record["bit_choices"].items()},
            {layer: {k: tuple(v) for k, v in knobs.items()} for layer, knobs in record["knobs"].items()},
            {layer: {int(b): dict(k) for b, k in known.items()} for layer, known in record["defaults"].items()},
        )

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The space as Optuna knows it."""
        choices: dict[str, Sequence[Any]] = {f"{layer}/bits": bits for layer, bits in self.bit_choices.items()}
        choices |= {f"{layer}/{knob}": found for layer, knobs in self.knobs.items() for knob, found in knobs.items()}
        return {name: CategoricalDistribution(values) for name, values in choices.items()}

    def point(self, params: Mapping[str, Any]) -> tuple[BitConfig, dict[str, dict[str, Any]]]:
        """``(bits, schedules)`` of a point; knobs that are not searched stay at their best known values. ConfigError
        where a parameter is missing.
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
        schedules = {layer: dict(known.get(bits[layer].activation, {})) for layer, known in self.defaults.items()}
        for layer, knobs in self.knobs.items():
            known = set(schedules[layer]) or set(knobs)  # a layer on tiles has others than the same one in float
            schedules[layer].update({knob: params[f"{layer}/{knob}"] for knob in knobs if knob in known})
        return bits, schedules

    def extreme(self, pick: Callable[[Sequence[int]], int]) -> BitConfig:
        """The bits of a corner of the space; ``pick`` chooses from a layer's bits, such as ``min``."""
        params = {f"{layer}/bits": pick(bits) for layer, bits in self.bit_choices.items()}
        knobs = {f"{layer}/{knob}": values[0] for layer, found in self.knobs.items() for knob, values in found.items()}
        return self.point({**params, **knobs})[0]

    def candidates(self, n: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Points that span the space, for the initial pool (BAQE section III-C asks for 500 representative ones).

        Each candidate has its own shares of the bit-widths, Dirichlet with concentration 0.5, so that near-uniform
        networks are among them; and its own quality of knobs: with a probability drawn for the candidate, more often
        high than low, a layer takes the best known knobs for its bits, else it draws them at random.
        """
        bits = sorted({value for values in self.bit_choices.values() for value in values})
        points: list[dict[str, Any]] = []
        seen: set[tuple[Any, ...]] = set()
        for _ in range(20 * n):
            shares = dict(zip(bits, rng.dirichlet([0.5] * len(bits)), strict=True))
            quality = 1.0 - rng.random() ** 3
            point: dict[str, Any] = {}
            for layer, values in self.bit_choices.items():
                weights = np.array([shares[value] for value in values]) + 1e-9
                point[f"{layer}/bits"] = values[rng.choice(len(values), p=weights / weights.sum())]
            for layer, knobs in self.knobs.items():
                keep = rng.random() < quality
                leader = next((group[0] for group in self.base.ties if layer in group), layer)
                chosen = point.get(f"{leader}/bits", self.base[layer].activation)
                default = self.defaults[layer].get(chosen, {})
                for knob, found in knobs.items():
                    if default and knob not in default:  # says nothing at these bits
                        point[f"{layer}/{knob}"] = found[0]
                    elif keep and default:
                        point[f"{layer}/{knob}"] = default[knob]
                    else:
                        point[f"{layer}/{knob}"] = found[rng.integers(len(found))]
            key = tuple(point.values())
            if key not in seen:
                seen.add(key)
                points.append(point)
            if len(points) == n:
                break
        return points


def _supported(
    choices: tuple[int, ...], layer: str, base: BitConfig, supported: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """Those choices that the layer, and all that are tied to it, have kernels for."""
    group = next((group for group in base.ties if layer in group), (layer,))
    found = tuple(bits for bits in choices if all(bits in supported[name] for name in group))
    if not found:
        raise ConfigError(
            f"the layers {list(group)} share their bits, but the device has kernels for none of {list(choices)} in all "
            f"of them: { {name: list(supported[name]) for name in group} }"
        )
    return found
