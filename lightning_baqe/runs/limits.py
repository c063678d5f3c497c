"""Limits on what a network may cost and must reach: what they mean for a search, and whether they can be met at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import InfeasibleError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.measurement.database import Records
from lightning_baqe.runs.front import LIMITS, number
from lightning_baqe.runs.summary import Entry, Figures, is_measured

SLACK = 0.1  # the sum of kernels is an estimate of the network's latency: a tenth less is not ruled out


def violations(entry: Figures, limits: Mapping[str, float]) -> dict[str, float]:
    """How far a measured entry is beyond each limit, at most 0 where it is met: Optuna's constraints.

    Args:
        entry: measured.
        limits: from :func:`~lightning_baqe.runs.front.read_limits`.

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
        """Add up sizes and kernels, whose latencies are looked up; nothing is measured.

        Args:
            graphs: the network at the fewest bits, at 8 and at the most.
            accuracy: of the float model.
        """
        few, eight, most = (graph.size_bytes for graph in graphs)
        found = [_kernels(graph, options, records) for graph in graphs]
        rows = [[kernels.get(layer) for kernels in found] for layer in found[0]]
        known = [[latency for latency in row if latency is not None] for row in rows]
        whole = [row for row in known if len(row) == len(graphs)]
        sums = (sum(map(min, whole)), sum(row[1] for row in whole), sum(row[2] for row in whole)) if whole else None
        return cls((few, eight, most), sums, len(whole), len(rows), accuracy)

    def check(self, limits: Mapping[str, float], measured: Sequence[Entry] = ()) -> None:
        """Refuse limits that nothing can meet.

        Args:
            limits: from :func:`~lightning_baqe.runs.front.read_limits`.
            measured: entries of an earlier part of the run; what one of them meets can be met.

        Raises:
            InfeasibleError: names the nearest value that can be reached.
        """
        # The least, what of that is certain, and where it comes from.
        least: dict[str, tuple[float, float, str]]
        least = {"size_bytes": (min(self.size_bytes), 1.0, "all layers at their fewest bits, exact")}
        if self.latency_us is not None:
            kernels = f"the sum of the fastest of {self.known} of {self.kernels} kernels; others come on top"
            least["latency_us"] = (min(self.latency_us), 1 - SLACK, kernels)
        lines = [
            f"{name} <= {number(limits[name])} cannot be met: the nearest that can be reached is {number(value)} "
            f"({what})"
            for name, (value, certain, what) in least.items()
            if name in limits
            and limits[name] < value * certain
            and not any(is_measured(entry) and getattr(entry, name) <= limits[name] for entry in measured)
        ]
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
