"""Budgets of an allocation run, the networks that keep them, and the table that says what became of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from lightning_baqe.allocation.choices import Allocation, Pairs
from lightning_baqe.allocation.program import allocate_bits
from lightning_baqe.costs.layer_costs import BOPS, LATENCY, MEAN_BITS, SIZE, LayerCosts
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig, LayerBits, near
from lightning_baqe.runs.summary import Entry

LEVELS = {"high": 0.75, "medium": 0.5, "low": 0.25}  # of the way from the smallest cost to the largest (HAWQ-V3)
BUDGETED = (SIZE, BOPS, LATENCY)
_SHORT = {SIZE: "size", BOPS: "BOPs", LATENCY: "latency", MEAN_BITS: "mean bits"}


@dataclass(frozen=True)
class Budget:
    """Limits that one network must keep.

    Args:
        name: ``high-size``, or ``own`` for limits that the user gave.
        limits: ``{cost: at most}``, of whole networks.
    """

    name: str
    limits: Mapping[str, float]


@dataclass(frozen=True)
class Budgets:
    """What the user asks for.

    Args:
        size_bytes, bops, latency_us, mean_bits: limits of one network; all None: the levels of each cost.
        levels: ``{name: part of the way from the smallest to the largest cost that the bits can reach}``.

    Raises:
        ConfigError: a limit that is no positive number, or a level that is not within 0 to 1.
    """

    size_bytes: float | None = None
    bops: float | None = None
    latency_us: float | None = None
    mean_bits: float | None = None
    levels: Mapping[str, float] = field(default_factory=lambda: dict(LEVELS))

    def __post_init__(self) -> None:
        for name, limit in self.own.items():
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
                raise ConfigError(f"allocation.budget.{name}={limit!r}, but a number above 0 is wanted")
        if not self.own and not self.levels:
            raise ConfigError(
                "allocation.budget has neither limits nor levels: give allocation.budget.size_bytes or others"
            )
        for name, level in self.levels.items():
            if isinstance(level, bool) or not isinstance(level, int | float) or not 0 <= level <= 1:
                raise ConfigError(f"allocation.budget.levels.{name}={level!r}, but a number of 0 to 1 is wanted")

    @property
    def own(self) -> dict[str, float]:
        """The limits that were given."""
        given = {name: getattr(self, name) for name in (SIZE, BOPS, LATENCY, MEAN_BITS)}
        return {name: limit for name, limit in given.items() if limit is not None}

    def of(self, costs: LayerCosts) -> list[Budget]:
        """The budgets, as limits of whole networks."""
        if self.own:
            return [Budget("own", self.own)]
        found = []
        for cost in BUDGETED:
            low, high = costs.span(cost, min), costs.span(cost, max)
            for level, part in self.levels.items():
                found.append(Budget(f"{level}-{_SHORT[cost].lower()}", {cost: low + part * (high - low)}))
        return found


@dataclass(frozen=True)
class Row:
    """A budget and the network that keeps it with the least sensitivity.

    Attributes:
        allocation: bits of every layer; its costs are of whole networks.
        predicted: ``{cost: of the network}``.
    """

    budget: Budget
    allocation: Allocation
    predicted: Mapping[str, float]


def solve(
    budget: Budget, sensitivity: Mapping[str, Mapping[int, float]], costs: LayerCosts, pairs: Pairs | None = None
) -> Row:
    """The allocation of a budget.

    Raises:
        ConfigError: a limit of an unknown cost.
        InfeasibleError: it cannot be kept; says the smallest that can.
    """
    for name in budget.limits:
        if name not in costs.tables:
            raise ConfigError(f"budget {name!r} is none of {', '.join(costs.tables)}{near(name, tuple(costs.tables))}")
    # The rest of a network is part of every limit: a layer of its own in the program, without a choice.
    rest = "the rest of the network"
    tables = {cost: {**table, rest: {0: costs.rest[cost]}} for cost, table in costs.tables.items()}
    found = allocate_bits({**sensitivity, rest: {0: 0.0}}, tables, budget.limits, pairs=pairs)
    predicted = found.costs
    del found[rest]
    return Row(budget, found, predicted)


def bit_config(base: BitConfig, allocation: Mapping[str, int]) -> BitConfig:
    """The allocation as a bit-config: the same bits for weights and inputs, as HAWQ-V3 has them."""
    return base.replace({layer: LayerBits(bits, bits) for layer, bits in allocation.items()})


def budget_table(rows: Sequence[Row], entries: Mapping[str, Entry], costs: LayerCosts, measure: str) -> Table:
    """HAWQ-V3's Table II for this device: each budget's network with its costs, predicted and measured; speed-ups are
    over the uniform network of 8 bit, where there is one.

    Args:
        rows: budgets with their networks.
        entries: ``{budget: what was measured of its network}``, with uniform networks under their names.
        costs: of the layers.
        measure: what accuracies are.
    """
    table = Table(title="HAWQ-V3, Table II, on this device")
    headings = ("network", "limit", "predicted", "used", "mean bits", "size kB", "GBOPs", "latency us", "speed-up")
    for place, heading in enumerate((*headings, measure, "test")):
        table.add_column(heading, justify="left" if place == 0 else "right")
    reference = entries.get("uniform_8")
    limits = {row.budget.name: row.budget.limits for row in rows}
    for name, entry in entries.items():
        accuracy, latency_us, size_bytes = entry.triple
        bits = {layer: width for layer, (width, _) in entry.bits.items() if isinstance(width, int)}
        known = all(bits[layer] in of for layer, of in costs.tables[SIZE].items())
        predicted = {cost: costs.total(cost, bits) for cost in costs.tables} if known else {}
        given = limits.get(name, {})
        table.add_row(
            name,
            "\n".join(_shown(cost, limit) for cost, limit in given.items()),
            "\n".join(_shown(cost, predicted[cost]) for cost in given),
            "\n".join(f"{predicted[cost] / limit:.0%}" for cost, limit in given.items()),
            f"{predicted[MEAN_BITS]:.2f}" if known else "",
            f"{size_bytes / 1e3:.1f}",
            f"{predicted[BOPS] / 1e9:.3f}" if known else "",
            f"{latency_us:.1f}",
            "" if reference is None else f"{reference.triple[1] / latency_us:.2f}",
            f"{100 * accuracy:.2f}",
            "" if entry.test_accuracy is None else f"{100 * entry.test_accuracy:.2f}",
        )
    return table


def _shown(cost: str, value: float) -> str:
    match cost:
        case "size_bytes":
            return f"{value / 1e3:.1f} kB"
        case "bops":
            return f"{value / 1e9:.3f} GBOPs"
        case "latency_us":
            return f"{value:.1f} us"
    return f"{value:.2f} bits"


def unrewarded(costs: LayerCosts, widths: Sequence[int], least: float = 0.1) -> str | None:
    """What the device does not reward: a line where the integer widths span less than this part of the latency."""
    integer = [bits for bits in widths if bits != FLOAT_BITS]
    layers = costs.tables[LATENCY].values()
    fixed = costs.rest[LATENCY] + sum(next(iter(of.values())) for of in layers if len(of) == 1)
    of = {bits: fixed + sum(table[bits] for table in layers if len(table) > 1) for bits in integer}
    wide, narrow = of[max(integer)], of[min(integer)]
    if (wide - narrow) / wide >= least:
        return None
    figures = ", ".join(f"{bits} bit {value:.1f} us" for bits, value in of.items())
    return f"This device does not reward fewer bits with time here ({figures}): latency budgets choose from float, too."
