"""The Pareto front of a run: read it from the run folder, choose a point within limits, load its artifact.

Everything here reads `summary.json` only; artifacts are opened by `Front.select` and by nothing else, so that a front
can be looked at where the compiled modules cannot run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from lightning_baqe.errors import ConfigError, DataError, InfeasibleError
from lightning_baqe.runs.summary import Summary, Width, mean_width

if TYPE_CHECKING:
    from lightning_baqe.deploy.artifact import Artifact
    from lightning_baqe.quantization.config import BitConfig

Bits = Mapping[str, tuple[Width, int]]

LIMITS = {"latency_us": "<=", "size_bytes": "<=", "accuracy": ">="}


@dataclass(frozen=True)
class FrontPoint:
    """One Pareto point of a run, as deployed and measured.

    Attributes:
        name: `trial_<number>` or `baseline_<name>`, also the name of its folder in `artifacts/`.
        bits: layer name -> (weight bits, activation bits), in network order.
        accuracy: the run's metric of the compiled model on the validation set, at most 1.
        test_accuracy: the same on the test set; None as long as the run has not measured it.
        latency_us: median latency of one image, in microseconds.
        size_bytes: size of the integer model, in bytes.
        artifact_path: folder of the artifact.
    """

    name: str
    bits: Bits = field(hash=False)
    accuracy: float
    test_accuracy: float | None
    latency_us: float
    size_bytes: int
    artifact_path: Path

    @property
    def bit_config(self) -> BitConfig:
        """Its bits for any other recipe: write ``bit_config.to_json()`` to a file and give ``bits.file=<file>``."""
        from lightning_baqe.quantization.config import BitConfig, LayerBits  # needs torch, which a front does not

        return BitConfig({name: LayerBits(*bits) for name, bits in self.bits.items()})


@dataclass(frozen=True)
class Front:
    """The Pareto points of a run, fastest first, trials and baselines together.

    Attributes:
        run_dir: the run folder.
        points: the Pareto points, sorted by latency, then size, then name.
        float_latency_us: latency of the float model in microseconds; None if the run has not measured it.
        metric: what the accuracies are; None: top-1.
        measure: what the table calls them.
    """

    run_dir: Path
    points: tuple[FrontPoint, ...]
    float_latency_us: float | None = None
    metric: str | None = None
    measure: str = "accuracy"

    @classmethod
    def load(cls, run_dir: str | Path) -> Front:
        """Read the front from `summary.json`; the run may still go on, or have been interrupted.

        Raises:
            DataError: there is no summary, or it is cut off.
            ConfigError: it is of a newer version, or has another schema.
        """
        run_dir = Path(run_dir)
        summary = Summary.load(run_dir)
        points = tuple(
            FrontPoint(
                entry.key, entry.bits, entry.accuracy, entry.test_accuracy, entry.latency_us, entry.size_bytes,
                run_dir / "artifacts" / entry.key,
            )
            for entry in summary.pareto
        )  # fmt: skip
        float_latency_us = summary.reference.latency_us if summary.reference else None
        return cls(run_dir, points, float_latency_us, summary.metric, summary.measure)

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[FrontPoint]:
        return iter(self.points)

    def select(
        self, latency_us: float | None = None, size_bytes: float | None = None, accuracy: float | None = None
    ) -> Artifact:
        """The artifact of `select_point(...)`, loaded.

        Raises:
            DataError: the artifact's folder is missing; what `select_point` raises likewise.
        """
        point = self.select_point(latency_us, size_bytes, accuracy)
        if not point.artifact_path.is_dir():
            raise DataError(
                f"{point.name} is on the front, but its artifact is missing: {point.artifact_path} is not a folder. "
                f"Copy the artifacts/ folder along with summary.json, or resume the run in {self.run_dir}."
            )
        from lightning_baqe.deploy.artifact import Artifact  # opens TVM, which reading a front does not need

        return Artifact.load(point.artifact_path)

    def select_point(
        self, latency_us: float | None = None, size_bytes: float | None = None, accuracy: float | None = None
    ) -> FrontPoint:
        """The most accurate point within the limits; ties go to the lower latency, then size, then name.

        Args:
            latency_us: upper limit of the latency, in microseconds.
            size_bytes: upper limit of the size, in bytes.
            accuracy: lower limit of the run's metric on the validation split, 0..1.

        Raises:
            ConfigError: a limit that makes no sense.
            InfeasibleError: no point meets the limits; says which limit is at fault and names the nearest point.
        """
        limits = read_limits({"latency_us": latency_us, "size_bytes": size_bytes, "accuracy": accuracy})
        if not self.points:
            raise InfeasibleError(
                f"The front of {self.run_dir} has no points: no trial has been completed so far. "
                "Let the run finish at least one trial, or see in report.html why its trials failed."
            )
        fits = [point for point in self.points if _violation(point, limits) == 0]
        if not fits:
            raise InfeasibleError(self._explain(limits))
        return min(fits, key=lambda point: (-point.accuracy, point.latency_us, point.size_bytes, point.name))

    def _explain(self, limits: Mapping[str, float]) -> str:
        """Why no point meets `limits`, limit by limit, and which point comes nearest."""
        wanted = " and ".join(f"{key} {LIMITS[key]} {value:g}" for key, value in limits.items())
        lines = [f"None of the {len(self)} points of {self.run_dir} meets {wanted}."]
        out_of_reach = [key for key in limits if all(_violation(point, {key: limits[key]}) for point in self.points)]
        if not out_of_reach:
            lines.append("Each limit alone can be met, but not all of them jointly.")
        for key, value in limits.items():
            best = _best(self.points, key)
            line = f"{key} {LIMITS[key]} {number(value)} "
            line += "cannot be met by any point" if key in out_of_reach else "can be met alone"
            line += f": the best is {number(getattr(best, key))} ({best.name})"
            others = {name: limit for name, limit in limits.items() if name != key}
            kept = [point for point in self.points if _violation(point, others) == 0]
            if others and kept:
                best = _best(kept, key)
                line += f", with the other limits kept {number(getattr(best, key))} ({best.name})"
            lines.append(line + ".")
        nearest = min(self.points, key=lambda point: (_violation(point, limits), -point.accuracy, point.name))
        lines.append(
            f"Nearest is {nearest.name}: accuracy {nearest.accuracy:.4g}, latency {number(nearest.latency_us)} us, "
            f"size {nearest.size_bytes:,} bytes; its largest violation is {_violation(nearest, limits):.1%}. "
            "Relax the limits, or search on with more trials."
        )
        return " ".join(lines)

    def table(self) -> Table:
        """The front for the terminal: latency in microseconds, size in kB (1000 bytes), speedup over float."""
        table = Table(title=f"Pareto front of {escape(str(self.run_dir))}")
        for header in ("point", "mean bits"):
            table.add_column(header, no_wrap=True)
        for header in (self.measure, f"test {self.measure}", "latency (us)", "size (kB)", "speedup"):
            table.add_column(header, justify="right")
        for point in self.points:
            table.add_row(
                escape(point.name),
                bits_summary(point.bits, ranges=False),
                f"{point.accuracy:.2%}",
                "–" if point.test_accuracy is None else f"{point.test_accuracy:.2%}",
                f"{point.latency_us:,.1f}",
                f"{point.size_bytes / 1000:,.1f}",
                f"{self.float_latency_us / point.latency_us:.2f}x" if self.float_latency_us else "–",
            )
        return table


def bits_summary(bits: Bits, ranges: bool = True) -> str:
    """Bit-widths in a few letters: `W4.3 (2-8) A8`, that is the mean over the layers and the range, if there is one."""

    parts = []
    for index, letter in enumerate("WA" if bits else ""):
        values = [mean_width(pair[index]) for pair in bits.values()]
        span = f" ({min(values)}-{max(values)})" if ranges and min(values) != max(values) else ""
        parts.append(f"{letter}{round(sum(values) / len(values), 1):g}{span}")
    return " ".join(parts) or "–"


def read_limits(limits: Mapping[str, float | None] | None) -> dict[str, float]:
    """Check limits; those that are None are left out.

    Args:
        limits: ``{"latency_us": at most, "size_bytes": at most, "accuracy": at least}``, any of them.

    Raises:
        ConfigError: another name, or a value that makes no sense.
    """
    given = {key: value for key, value in (limits or {}).items() if value is not None}
    unknown = sorted(set(limits or {}) - set(LIMITS))
    if unknown:
        raise ConfigError(f"limits name {unknown}, but wanted are some of {list(LIMITS)}")
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ConfigError(f"{key}={value!r} is no limit; wanted is a number.")
        if key == "accuracy" and not 0 <= value <= 1:
            hint = f" For {value:g} percent give accuracy={value / 100:g}." if 1 < value <= 100 else ""
            raise ConfigError(f"accuracy={value:g} is no limit; wanted is a fraction from 0 to 1.{hint}")
        if key != "accuracy" and value <= 0:
            raise ConfigError(f"{key}={value:g} is no limit; wanted is a number above 0.")
    return {key: float(value) for key, value in given.items()}


def _violation(point: FrontPoint, limits: Mapping[str, float]) -> float:
    """How far `point` is beyond the limit that it misses most, relative to that limit; 0 if it meets all."""
    beyond = [(limit, _sign(key) * (getattr(point, key) - limit)) for key, limit in limits.items()]
    return max((excess / limit if limit else math.inf for limit, excess in beyond if excess > 0), default=0.0)


def _sign(key: str) -> int:
    """1 of what is to be small, -1 of what is to be large."""
    return -1 if LIMITS[key] == ">=" else 1


def number(value: float) -> str:
    """A figure to read: no exponents, no false digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _best(points: Iterable[FrontPoint], key: str) -> FrontPoint:
    return min(points, key=lambda point: (_sign(key) * getattr(point, key), point.name))
