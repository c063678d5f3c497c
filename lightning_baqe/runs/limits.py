"""Limits on what a network may cost and must reach: what they mean for a search, and whether they can be met at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import ConfigError, InfeasibleError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.measurement.database import Records
from lightning_baqe.runs.front import LIMITS, check_limits, number
from lightning_baqe.runs.summary import Entry, Figures, is_measured

SLACK = 0.1  # the sum of kernels is an estimate of the network's latency: a tenth less is not ruled out


def read_limits(limits: Mapping[str, float | None] | None) -> dict[str, float]:
    """Check limits; those that are None are left out.

    Args:
        limits: ``{"latency_us": at most, "size_bytes": at most, "accuracy": at least}``, any of them.

    Raises:
        ConfigError: another name, or a value that makes no sense.
    """
    unknown = sorted(set(limits or {}) - set(LIMITS))
    if unknown:
        raise ConfigError(f"limits name {unknown}, but wanted are some of {list(LIMITS)}")
    return check_limits(**(limits or {}))


def violations(entry: Figures, limits: Mapping[str, float]) -> dict[str, float]:
    """How far a measured entry is beyond each limit, at most 0 where it is met: Optuna's constraints.

    Args:
        entry: measured.
        limits: from :func:`read_limits`.

    Returns:
        Latency and size relative to their limits, accuracy as the difference.
    """
    return {
        name: limit - getattr(entry, name) if LIMITS[name] == ">=" else (getattr(entry, name) - limit) / limit
        for name, limit in limits.items()
    }


def feasible(entry: Entry, limits: Mapping[str, float]) -> bool:
    """Whether an entry of a summary is measured and meets all limits."""
    return is_measured(entry) and all(value <= 0 for value in violations(entry, limits).values())


@dataclass(frozen=True)
class Reach:
    """What a network's costs can be, before anything is searched.

    Attributes:
        size_bytes: (fewest bits everywhere, 8 bit, most bits), exact.
        latency_us: likewise, the sum of the best known kernels; of the first, the fastest at any of these bits counts
            for each layer. None where no kernel is known.
        known, kernels: how many of the kernels' latencies are known at all three; of how many.
        accuracy: of the float model, 0..1.
    """

    size_bytes: tuple[int, int, int]
    latency_us: tuple[float, float, float] | None
    known: int
    kernels: int
    accuracy: float

    @classmethod
    def of(cls, graphs: Sequence[IntegerGraph], options: BuildOptions, records: Records, accuracy: float) -> Reach:
        """Add up sizes and kernels.

        Args:
            graphs: the network at the fewest bits, at 8 and at the most.
            options: what the kernels are compiled for.
            records: where their latencies are looked up; nothing is measured.
            accuracy: of the float model.
        """
        few, eight, most = graphs
        sizes = (few.size_bytes, eight.size_bytes, most.size_bytes)
        found = [_kernels(graph, options, records) for graph in graphs]
        everywhere = [layer for layer in found[0] if all(kernels.get(layer) is not None for kernels in found)]
        sums: tuple[float, float, float] | None = None
        if everywhere:
            rows = [[kernels[layer] or 0.0 for kernels in found] for layer in everywhere]
            sums = (sum(map(min, rows)), sum(row[1] for row in rows), sum(row[2] for row in rows))
        return cls(sizes, sums, len(everywhere), len(found[0]), accuracy)

    def check(self, limits: Mapping[str, float], measured: Sequence[Entry] = ()) -> None:
        """Refuse limits that nothing can meet.

        Args:
            limits: from :func:`read_limits`.
            measured: entries of an earlier part of the run; what one of them meets can be met.

        Raises:
            InfeasibleError: names the nearest value that can be reached.
        """
        smallest = {"size_bytes": float(min(self.size_bytes))}
        if self.latency_us is not None:
            smallest["latency_us"] = min(self.latency_us) * (1 - SLACK)
        lines = []
        for name, least in smallest.items():
            if name not in limits or limits[name] >= least:
                continue
            if any(is_measured(entry) and getattr(entry, name) <= limits[name] for entry in measured):
                continue
            what = "all layers at their fewest bits, exact"
            if name == "latency_us" and self.latency_us is not None:
                least = min(self.latency_us)
                what = f"the sum of the fastest of {self.known} of {self.kernels} kernels; others come on top"
            lines.append(
                f"{name} <= {number(limits[name])} cannot be met: the nearest that can be reached is {number(least)} "
                f"({what})"
            )
        if lines:
            raise InfeasibleError(
                f"{'; '.join(lines)}. Nothing was searched: relax the limits, offer fewer bits (bit_choices), or "
                "take a smaller network."
            )

    def table(self, limits: Mapping[str, float]) -> Table:
        """The costs for the terminal, beside the limits."""
        table = Table(title="What can be reached, before the search")
        for header in ("", "smallest", "uniform 8 bit", "largest", "limit"):
            table.add_column(header, justify="right" if header else "left")

        def limit(name: str) -> str:
            return f"{LIMITS[name]} {number(limits[name])}" if name in limits else "–"

        table.add_row("size_bytes", *map(number, self.size_bytes), limit("size_bytes"))
        label = f"latency_us (sum of {self.known} of {self.kernels} kernels)"
        known = map(number, self.latency_us) if self.latency_us is not None else ["not measured"] * 3
        table.add_row(label, *known, limit("latency_us"))
        table.add_row(f"accuracy (float: {self.accuracy:.4f})", "–", "–", "–", limit("accuracy"))
        return table


def _kernels(graph: IntegerGraph, options: BuildOptions, records: Records) -> dict[str, float | None]:
    """``{layer: best known latency of its kernel}`` of the layers whose kernels can be tuned."""
    return {  # the fastest comes first
        layer: next((r.latency_us for r in records.kernels(spec, options.target) if r.usable), None)
        for layer, spec in make_plan(graph, options).tunable().items()
    }
