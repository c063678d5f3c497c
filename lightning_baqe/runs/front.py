"""The Pareto front of a run: read it from the run folder, choose a point within limits, load its artifact.

Everything here reads `summary.json` only; artifacts are opened by `Front.select` and by nothing else, so that a front
can be looked at where the compiled modules cannot run.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from lightning_baqe.errors import ConfigError, DataError, InfeasibleError
from lightning_baqe.files import replace_file

if TYPE_CHECKING:
    from lightning_baqe.deploy.artifact import Artifact

Bits = Mapping[str, tuple[int, int]]

LIMITS = {"latency_us": "<=", "size_bytes": "<=", "accuracy": ">="}
_RESUME = "Start the run again with the same run_dir: it resumes from study.db and writes the summary anew."


@dataclass(frozen=True)
class FrontPoint:
    """One Pareto point of a run, as deployed and measured.

    Attributes:
        name: `trial_<number>` or `baseline_<name>`, also the name of its folder in `artifacts/`.
        bits: layer name -> (weight bits, activation bits), in network order.
        accuracy: top-1 of the compiled model on the validation set, 0..1.
        test_accuracy: the same on the test set; None as long as the run has not measured it.
        latency_us: median latency of one image, in microseconds.
        size_bytes: size of the integer model, in bytes.
        artifact_path: folder of the artifact.

    Raises:
        ConfigError: a figure is not a number or out of its range.
    """

    name: str
    bits: Bits = field(hash=False)
    accuracy: float
    test_accuracy: float | None
    latency_us: float
    size_bytes: int
    artifact_path: Path

    def __post_init__(self) -> None:
        for key, value in (("accuracy", self.accuracy), ("test_accuracy", self.test_accuracy)):
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{self.name} has {key} {value}; wanted is a fraction from 0 to 1.")
        for key, figure in (("latency_us", self.latency_us), ("size_bytes", self.size_bytes)):
            if not (math.isfinite(figure) and figure > 0):
                raise ConfigError(f"{self.name} has {key} {figure}; wanted is a finite number above 0.")

    @property
    def figures(self) -> str:
        """The figures in one line, with units."""
        return f"accuracy {self.accuracy:.4g}, latency {number(self.latency_us)} us, size {self.size_bytes:,} bytes"


@dataclass(frozen=True)
class Front:
    """The Pareto points of a run, fastest first, trials and baselines together.

    Attributes:
        run_dir: the run folder.
        points: the Pareto points, sorted by latency, then size, then name.
        float_latency_us: latency of the float model in microseconds; None if the run has not measured it.
    """

    run_dir: Path
    points: tuple[FrontPoint, ...]
    float_latency_us: float | None = None

    @classmethod
    def load(cls, run_dir: str | Path) -> Front:
        """Read the front from `summary.json`; the run may still go on, or have been interrupted.

        Raises:
            DataError: there is no summary, it is cut off, or it has another schema.
        """
        run_dir = Path(run_dir)
        summary = read_summary(run_dir)
        points = [_point(name, entry, run_dir) for name, entry in pareto_entries(summary)]
        points.sort(key=lambda point: (point.latency_us, point.size_bytes, point.name))
        return cls(run_dir, tuple(points), (summary.get("float") or {}).get("latency_us"))

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[FrontPoint]:
        return iter(self.points)

    def select(
        self, latency_us: float | None = None, size_bytes: float | None = None, accuracy: float | None = None
    ) -> Artifact:
        """The artifact of `select_point(...)`, loaded.

        Raises:
            ConfigError: a limit that makes no sense.
            InfeasibleError: no point meets the limits.
            DataError: the artifact's folder is missing.
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
            accuracy: lower limit of the validation accuracy, 0..1.

        Raises:
            ConfigError: a limit that makes no sense.
            InfeasibleError: no point meets the limits; says which limit is at fault and names the nearest point.
        """
        limits = check_limits(latency_us=latency_us, size_bytes=size_bytes, accuracy=accuracy)
        if not self.points:
            raise InfeasibleError(
                f"The front of {self.run_dir} has no points: no trial has been completed so far. "
                "Let the run finish at least one trial, or see in report.html why its trials failed."
            )
        fits = [point for point in self.points if _worst_violation(point, limits) == 0]
        if not fits:
            raise InfeasibleError(self._explain(limits))
        return min(fits, key=lambda point: (-point.accuracy, point.latency_us, point.size_bytes, point.name))

    def _explain(self, limits: Mapping[str, float]) -> str:
        """Why no point meets `limits`, limit by limit, and which point comes nearest."""
        wanted = " and ".join(f"{key} {LIMITS[key]} {value:g}" for key, value in limits.items())
        lines = [f"None of the {len(self)} points of {self.run_dir} meets {wanted}."]
        out_of_reach = [key for key in limits if all(_violation(point, key, limits[key]) for point in self.points)]
        if not out_of_reach:
            lines.append("Each limit alone can be met, but not all of them jointly.")
        for key, value in limits.items():
            best = _best(self.points, key)
            line = f"{key} {LIMITS[key]} {number(value)} "
            line += "cannot be met by any point" if key in out_of_reach else "can be met alone"
            line += f": the best is {number(getattr(best, key))} ({best.name})"
            others = {name: limit for name, limit in limits.items() if name != key}
            kept = [point for point in self.points if _worst_violation(point, others) == 0]
            if others and kept:
                best = _best(kept, key)
                line += f", with the other limits kept {number(getattr(best, key))} ({best.name})"
            lines.append(line + ".")
        nearest = min(self.points, key=lambda point: (_worst_violation(point, limits), -point.accuracy, point.name))
        lines.append(
            f"Nearest is {nearest.name}: {nearest.figures}; its largest violation is "
            f"{_worst_violation(nearest, limits):.1%}. Relax the limits, or search on with more trials."
        )
        return " ".join(lines)

    def table(self) -> Table:
        """The front for the terminal: latency in microseconds, size in kB (1000 bytes), speedup over float."""
        table = Table(title=f"Pareto front of {escape(str(self.run_dir))}")
        for header in ("point", "mean bits"):
            table.add_column(header, no_wrap=True)
        for header in ("accuracy", "test accuracy", "latency (us)", "size (kB)", "speedup"):
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


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """Read and check `summary.json` of a run folder, that of a run which goes on or was interrupted included.

    Raises:
        DataError: there is no summary, it is cut off, or it has another schema.
    """
    path = Path(run_dir) / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path} does not exist. Wanted is a run folder (outputs/<recipe>/<date_time>/); also an interrupted run "
            f"has a summary of what it found so far, once its first trial has ended. {_RESUME}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not whole JSON ({error}): it was cut while being copied or written. {_RESUME}"
        ) from None
    problem = _schema_problem(summary)
    if problem:
        raise DataError(f"{path} is not a summary that this version can read: {problem}. {_RESUME}")
    return summary


def _schema_problem(summary: object) -> str | None:
    if not isinstance(summary, dict):
        return f"wanted is an object, it holds a {type(summary).__name__}"
    for key in ("trials", "baselines"):
        entries = summary.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            return f"{key!r} is missing or no list of objects"
    for key, ident in (("trials", "number"), ("baselines", "name")):
        for index, entry in enumerate(summary[key]):
            if ident not in entry:
                return f"entry {index} of {key!r} has no {ident!r}"
            if entry.get("pareto") and not is_measured(entry):
                return f"{ident} {entry[ident]} of {key!r} is on the front without all of {', '.join(LIMITS)}"
    if not isinstance(summary.get("float") or {}, dict):
        return "'float' is no object"
    return None


def pareto_entries(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The Pareto points of a summary, baselines first: (`baseline_<name>` or `trial_<number>`, entry)."""
    named = [(f"baseline_{entry['name']}", entry) for entry in summary.get("baselines") or []]
    named += [(f"trial_{entry['number']}", entry) for entry in summary.get("trials") or []]
    return [(name, entry) for name, entry in named if entry.get("pareto") and is_measured(entry)]


def is_measured(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a summary is complete and has its three figures, as finite numbers."""
    figures = [entry.get(key) for key in LIMITS]
    finite = all(isinstance(figure, int | float) and math.isfinite(figure) for figure in figures)
    return finite and entry.get("state", "complete") == "complete"


def bits_summary(bits: Bits, ranges: bool = True) -> str:
    """Bit-widths in a few letters: `W4.3 (2-8) A8`, that is the mean over the layers and the range, if there is one."""

    def one(letter: str, values: list[int]) -> str:
        span = f" ({min(values)}-{max(values)})" if ranges and min(values) != max(values) else ""
        return f"{letter}{round(sum(values) / len(values), 1):g}{span}"

    if not bits:
        return "–"
    return " ".join(one(letter, [pair[index] for pair in bits.values()]) for index, letter in enumerate("WA"))


def write_pareto_csv(summary: Mapping[str, Any], path: Path) -> None:
    """Write the Pareto points, fastest first, as comma separated values; the file is replaced in one step.

    Columns: name, accuracy and test_accuracy (0..1), latency_us, size_bytes, latency_ratio and size_ratio (over the
    float model's, empty without one), mean_weight_bits (over the layers), bits (JSON: {layer: [weight, activation]}).
    """
    reference = summary.get("float") or {}
    header = ["name", "accuracy", "test_accuracy", "latency_us", "size_bytes"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*header, "latency_ratio", "size_ratio", "mean_weight_bits", "bits"])
    for name, entry in sorted(pareto_entries(summary), key=lambda item: (item[1]["latency_us"], item[1]["size_bytes"])):
        bits = entry.get("bits") or {}
        ratios = [entry[key] / reference[key] if reference.get(key) else "" for key in ("latency_us", "size_bytes")]
        mean = sum(weight for weight, _ in bits.values()) / len(bits) if bits else ""
        writer.writerow([name, *(entry.get(key) for key in header[1:]), *ratios, mean, json.dumps(bits)])
    replace_file(Path(path), text.getvalue().encode())


def _point(name: str, entry: Mapping[str, Any], run_dir: Path) -> FrontPoint:
    try:
        return FrontPoint(
            name=name,
            bits={layer: (int(weight), int(activation)) for layer, (weight, activation) in entry["bits"].items()},
            accuracy=float(entry["accuracy"]),
            test_accuracy=None if entry.get("test_accuracy") is None else float(entry["test_accuracy"]),
            latency_us=float(entry["latency_us"]),
            size_bytes=int(entry["size_bytes"]),
            artifact_path=run_dir / "artifacts" / name,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{run_dir / 'summary.json'}: {name} cannot be read: {reason}. {_RESUME}") from error


def check_limits(**limits: float | None) -> dict[str, float]:
    """Those of the limits that are not None.

    Raises:
        ConfigError: one makes no sense.
    """
    for key, value in limits.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ConfigError(f"{key}={value!r} is no limit; wanted is a number.")
        if key == "accuracy" and not 0 <= value <= 1:
            hint = f" For {value:g} percent give accuracy={value / 100:g}." if 1 < value <= 100 else ""
            raise ConfigError(f"accuracy={value:g} is no limit; wanted is a fraction from 0 to 1.{hint}")
        if key != "accuracy" and value <= 0:
            raise ConfigError(f"{key}={value:g} is no limit; wanted is a number above 0.")
    return {key: float(value) for key, value in limits.items() if value is not None}


def _violation(point: FrontPoint, key: str, limit: float) -> float:
    """How far `point` is beyond `limit`, relative to the limit; 0 if it meets it."""
    value = getattr(point, key)
    if LIMITS[key] == ">=":
        return (limit - value) / limit if value < limit else 0.0
    return (value - limit) / limit if value > limit else 0.0


def _worst_violation(point: FrontPoint, limits: Mapping[str, float]) -> float:
    return max((_violation(point, key, limit) for key, limit in limits.items()), default=0.0)


def number(value: float) -> str:
    """A figure to read: no exponents, no false digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _best(points: tuple[FrontPoint, ...] | list[FrontPoint], key: str) -> FrontPoint:
    sign = -1 if LIMITS[key] == ">=" else 1
    return min(points, key=lambda point: (sign * getattr(point, key), point.name))
