"""The bits that layers may have, what each choice costs, and an allocation: one choice for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.config import near

Values = Mapping[str, Mapping[int, float]]  # {layer: {bits: value}}
Pairs = Mapping[tuple[str, str], Mapping[tuple[int, int], float]]  # {(layer, layer): {(bits, bits): value}}


class Allocation(dict[str, int]):
    """``{layer: bits}``, in the order in which the layers were given.

    Attributes:
        sensitivity: the sum over layers, of pairs, too.
        costs: ``{cost: sum over layers}``.
        gap: by how much ``sensitivity`` may be above the smallest possible; 0: it is the smallest.
    """

    def __init__(self, bits: Mapping[str, int], sensitivity: float, costs: Mapping[str, float], gap: float = 0.0):
        super().__init__(bits)
        self.sensitivity, self.costs, self.gap = sensitivity, dict(costs), gap


@dataclass(frozen=True)
class Choices:
    """Groups of layers that share their bits, and the values of each choice.

    Attributes:
        layers: in the order in which they were given.
        groups: the layers of each group; one that is tied to none is a group of its own.
        options: by group, the bits to choose from, ascending.
        sensitivity: by group ``(options,)``, the sum over its layers.
        costs: ``{cost: the same}``.
    """

    layers: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    options: tuple[tuple[int, ...], ...]
    sensitivity: tuple[np.ndarray, ...]
    costs: Mapping[str, tuple[np.ndarray, ...]]

    @classmethod
    def of(
        cls,
        sensitivity: Values,
        costs: Mapping[str, Values],
        tied: Iterable[Iterable[str]] = (),
        fixed: Mapping[str, int] | None = None,
    ) -> Choices:
        """Arguments as for :func:`~lightning_baqe.allocation.program.allocate_bits`.

        Raises:
            ConfigError: no layers, values that are missing or no finite numbers, unknown layers, ties without a choice
                that all of them have.
        """
        layers = tuple(sensitivity)
        if not layers:
            raise ConfigError("sensitivity has no layers: give {layer: {bits: value}}")
        fixed = dict(fixed or {})
        ties = [tuple(group) for group in tied]
        for where, names in (("fixed", list(fixed)), ("tied", [name for group in ties for name in group])):
            for name in names:
                if name not in sensitivity:
                    raise ConfigError(f"{where} names layer {name!r}, which sensitivity has not{near(name, layers)}")
        groups = _merged(layers, ties)
        options = tuple(_options(group, sensitivity, fixed) for group in groups)

        def by_group(values: Values, what: str) -> tuple[np.ndarray, ...]:
            return tuple(
                np.array([sum(_value(values, name, bits, what) for name in group) for bits in choices])
                for group, choices in zip(groups, options, strict=True)
            )

        return cls(
            layers,
            groups,
            options,
            by_group(sensitivity, "sensitivity"),
            {name: by_group(values, f"costs[{name!r}]") for name, values in costs.items()},
        )

    def allocation(self, chosen: Sequence[int], pairs: float = 0.0, gap: float = 0.0) -> Allocation:
        """The allocation of one option by group.

        Args:
            chosen: ``(groups,)`` indices into ``options``.
            pairs: what pairs of layers add to the sensitivity.
            gap: of the allocation.
        """
        bits = {
            name: choices[k]
            for group, choices, k in zip(self.groups, self.options, chosen, strict=True)
            for name in group
        }
        costs = {name: total(values, chosen) for name, values in self.costs.items()}
        ordered = {name: bits[name] for name in self.layers}
        return Allocation(ordered, total(self.sensitivity, chosen) + pairs, costs, gap)


def total(values: Sequence[np.ndarray], chosen: Sequence[int]) -> float:
    """The sum of one option's value by group, rounded once."""
    return math.fsum(float(of_group[k]) for of_group, k in zip(values, chosen, strict=True))


def _merged(layers: Sequence[str], tied: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Groups in the order of their first layers; ties that have a layer in common are one."""

    def join(groups: list[set[str]], names: tuple[str, ...]) -> list[set[str]]:
        apart = [group for group in groups if group.isdisjoint(names)]
        return [*apart, set(names).union(*(group for group in groups if not group.isdisjoint(names)))]

    group_of = {name: group for group in reduce(join, tied, list[set[str]]()) for name in group}
    found = {min(map(layers.index, group_of.get(name, {name}))): group_of.get(name, {name}) for name in layers}
    return tuple(tuple(name for name in layers if name in found[first]) for first in sorted(found))


def _options(group: tuple[str, ...], sensitivity: Values, fixed: Mapping[str, int]) -> tuple[int, ...]:
    allowed = [{fixed[name]} & set(sensitivity[name]) if name in fixed else set(sensitivity[name]) for name in group]
    common = set.intersection(*allowed)
    if common:
        return tuple(sorted(common))
    given = {name: sorted(sensitivity[name]) for name in group}
    held = {name: fixed[name] for name in group if name in fixed}
    together = f"the tied layers {', '.join(group)} have" if len(group) > 1 else f"layer {group[0]!r} has"
    raise ConfigError(
        f"{together} no bits to choose from: sensitivity has {given}" + (f", fixed are {held}" if held else "")
    )


def _value(values: Values, layer: str, bits: int, what: str) -> float:
    if layer not in values:
        raise ConfigError(f"{what} has no layer {layer!r}{near(layer, tuple(values))}; sensitivity has it")
    if bits not in values[layer]:
        raise ConfigError(f"{what} of layer {layer!r} has no value for {bits!r} bits; it has {sorted(values[layer])}")
    value = float(values[layer][bits])
    if not math.isfinite(value):
        raise ConfigError(f"{what} of layer {layer!r} at {bits} bits is {value}: a finite number is wanted")
    return value
