"""What a run found, typed: ``summary.json`` and ``pareto.csv`` have one writer and one reader, both of them here.

    python -m lightning_baqe.runs.summary

prints the JSON schema of ``summary.json``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, TypeAdapter, model_serializer
from pydantic import model_validator as validator

from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.files import MIB, check_schema, parse_json, read_file, replace_file

Width = int | tuple[int, ...]  # bits of a layer's weights, or of each of its output channels
Name = Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]  # of a baseline, and of a folder after it
_MOST_BYTES = 1024 * MIB
VERSION = 1  # of summary.json; a file without one is of the first
RESUME = "Start the run again with the same run_dir: it resumes from study.db and writes the summary anew."


def mean_width(width: Width) -> float:
    """Of the output channels."""
    return sum(width) / len(width) if isinstance(width, tuple) else width


class Figures(BaseModel):
    """A network's figures on the device, None where unknown.

    Attributes:
        accuracy, test_accuracy: the run's metric of the compiled network on the validation and the test set, at most 1.
        latency_us: median latency of one image, microseconds.
        size_bytes: of the integer model.
        spread: interquartile range of the latency over its median; ``noisy``: whether that was too much.
        schedules: ``{layer: {knob: value}}`` that it was compiled with.
        seconds: spent on it, by part: train, build, evaluate, measure, propose, estimate.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    accuracy: float | None = None
    test_accuracy: float | None = None
    latency_us: float | None = None
    size_bytes: int | None = None
    spread: float | None = None
    noisy: bool | None = None
    schedules: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}

    def record(self) -> dict[str, Any]:
        """As the study keeps it."""
        return self.model_dump(mode="json")

    @property
    def triple(self) -> tuple[float, float, float]:
        """Accuracy, microseconds and bytes; NaN where unknown."""
        accuracy, latency_us, size_bytes = (
            math.nan if value is None else value for value in (self.accuracy, self.latency_us, self.size_bytes)
        )
        return accuracy, latency_us, size_bytes


class Entry(Figures):
    """A trial or a baseline.

    Attributes:
        name, number: of a baseline, of a trial.
        phase: what proposed it.
        bits: ``{layer: (weight bits, activation bits)}``, in network order.
        fake_quant_accuracy: of the network before it was lowered.
        differing_elements: between the compiled network and its reference; None where it was not compiled.
        promised_accuracy: for which a pruned trial was given up.
        feasible: whether it meets the run's limits, where there are any.
        pareto: whether it is on the front of all complete trials and baselines.
        error: why it failed.
    """

    name: Name | None = None
    number: int | None = None
    state: Literal["complete", "running", "failed", "pruned"] = "complete"
    phase: str = ""
    bits: dict[str, tuple[Width, int]] = {}
    fake_quant_accuracy: float | None = None
    differing_elements: int | None = None
    promised_accuracy: float | None = None
    feasible: bool | None = None
    pareto: bool = False
    error: str | None = None

    @validator(mode="after")
    def _check_front(self) -> Entry:
        if self.pareto and self.state == "complete":
            accuracy, *costs = self.triple
            fractions = (accuracy, accuracy if self.test_accuracy is None else self.test_accuracy)
            if not all(-math.inf < value <= 1 for value in fractions):
                raise ValueError(f"{self.key} is on the front with accuracies {fractions}; wanted are 0 to 1, or below")
            if not all(math.isfinite(cost) and cost > 0 for cost in costs):
                raise ValueError(f"{self.key} is on the front with latency_us, size_bytes {costs}; wanted is above 0")
        return self

    @model_serializer(mode="wrap")
    def _without_gaps(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what an entry of its kind does not have."""
        always = ("accuracy", "fake_quant_accuracy", "latency_us", "size_bytes", "error")
        return {name: value for name, value in handler(self).items() if value is not None or name in always}

    @property
    def key(self) -> str:
        """Its name among all entries, and that of its folder in ``artifacts/``."""
        return f"trial_{self.number}" if self.name is None else f"baseline_{self.name}"

    def completed(self, found: Figures, fake_quant_accuracy: float) -> Self:
        """This entry with the figures of its network; the seconds before them are kept.

        Args:
            found: on the device, where no element differed from the reference.
            fake_quant_accuracy: of the network before it was lowered.
        """
        more = {"state": "complete", "fake_quant_accuracy": fake_quant_accuracy, "differing_elements": 0}
        return self.model_copy(update={**dict(found), **more, "seconds": self.seconds | found.seconds})


class Trial(Entry):
    """What the sampler proposed."""

    number: int = Field(ge=0)


class Baseline(Entry):
    """What is evaluated beside the trials."""

    name: Name


class Measured(Entry):
    """An entry whose figures are known; for type checkers, by :func:`is_measured`."""

    accuracy: float
    latency_us: float
    size_bytes: int


def is_measured(entry: Entry) -> TypeGuard[Measured]:
    """Whether an entry is complete and has its three figures, as finite numbers."""
    return entry.state == "complete" and all(map(math.isfinite, entry.triple))


class Summary(BaseModel):
    """The content of ``summary.json``; of a run that goes on or was interrupted, too.

    Attributes:
        version: of this schema.
        metric: what accuracies are: a torchmetrics metric's class and arguments; None: top-1, in files of
            before there was a choice.
        reference: the float model's figures, ``float`` in the file.
        reference_point: of the hypervolumes, over error, latency and size relative to the float model's.
        hypervolume: of all complete trials and baselines; ``baselines_hypervolume``: of the latter alone.
        rewards: what each bit-width buys on the device.
        limits: that the run was given.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    version: int = Field(VERSION, ge=1)
    recipe: str | None = None
    metric: str | None = None
    model: str | None = None
    dataset: str | None = None
    device: dict[str, Any] = {}
    versions: dict[str, str] = {}
    reference: Figures | None = Field(None, validation_alias="float", serialization_alias="float")
    baselines: tuple[Baseline, ...]
    objectives: tuple[str, ...] = ("error", "latency", "size")
    reference_point: tuple[float, float, float] = (1.0, 1.5, 1.1)
    hypervolume: float | None = None
    baselines_hypervolume: float | None = None
    rewards: dict[str, Any] | None = None
    limits: dict[str, float] | None = None
    trials: tuple[Trial, ...]

    @classmethod
    def load(cls, run_dir: str | Path) -> Summary:
        """Read a run folder's summary.

        Raises:
            DataError: there is none, or it is cut off.
            ConfigError: it is of a newer version, or of another schema; names the field.
        """
        path = Path(run_dir) / "summary.json"
        if not path.exists():
            raise DataError(
                f"{path} does not exist. Wanted is a run folder (outputs/<flow>/<date_time>/); also an interrupted "
                f"run has a summary of what it found so far, once its first trial has ended. {RESUME}"
            )
        try:
            content = parse_json(read_file(path, _MOST_BYTES), str(path), constants=True)
        except DataError as error:
            raise DataError(
                f"{error} It was cut while being copied or written, or is another file. {RESUME}"
            ) from error
        version = content.get("version", 1) if isinstance(content, dict) else 1
        if isinstance(version, int) and version > VERSION:
            raise ConfigError(
                f"{path} has version {version}, this lightning_baqe reads versions up to {VERSION}: upgrade it, or "
                "read the run with the release that wrote it."
            )
        try:
            return check_schema(
                TypeAdapter(cls), content, f"{path} is not a summary that this version can read", RESUME
            )
        except DataError as error:
            raise ConfigError(str(error)) from error

    def write(self, run_dir: Path) -> None:
        """Write ``summary.json`` and ``pareto.csv``, and delete artifacts that are no longer on the front."""
        content = self.model_dump(by_alias=True)
        replace_file(run_dir / "summary.json", json.dumps(content, indent=1).encode())
        replace_file(run_dir / "pareto.csv", self.pareto_csv().encode())
        keep = {entry.key for entry in self.pareto}
        for entry in self.entries:
            folder = run_dir / "artifacts" / entry.key
            over = isinstance(entry, Baseline) or entry.state != "running"  # what another worker builds now stays
            if over and entry.key not in keep and folder.is_dir():
                shutil.rmtree(folder)

    @property
    def measure(self) -> str:
        """What to call the accuracies in headings: ``accuracy`` where they are one, else the metric's class."""
        name = (self.metric or "accuracy").partition("(")[0]
        return "accuracy" if name.endswith("Accuracy") else name

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Baselines and trials."""
        return (*self.baselines, *self.trials)

    @property
    def done_count(self) -> int:
        """Complete trials, and baselines that were evaluated, failed ones included."""
        return len(self.baselines) + sum(entry.state == "complete" for entry in self.trials)

    @property
    def complete(self) -> list[Measured]:
        """Baselines and trials with figures."""
        return [entry for entry in self.entries if is_measured(entry)]

    @property
    def pareto(self) -> list[Measured]:
        """Those on the front, fastest first; ties go to the smaller, then by key."""
        return sorted(
            (entry for entry in self.complete if entry.pareto),
            key=lambda entry: (entry.latency_us, entry.size_bytes, entry.key),
        )

    def pareto_csv(self) -> str:
        """The Pareto points, fastest first, as comma separated values.

        Columns: name, accuracy and test_accuracy (0..1), latency_us, size_bytes, latency_ratio and size_ratio (over
        the float model's, empty without one), mean_weight_bits (over the layers), bits (JSON, as in the summary).
        """
        reference = self.reference or Figures()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        header = ("name", "accuracy", "test_accuracy", "latency_us", "size_bytes", "latency_ratio", "size_ratio")
        writer.writerow([*header, "mean_weight_bits", "bits"])
        for entry in self.pareto:
            figures = (entry.accuracy, entry.test_accuracy, entry.latency_us, entry.size_bytes)
            latency_ratio = entry.latency_us / reference.latency_us if reference.latency_us else ""
            size_ratio = entry.size_bytes / reference.size_bytes if reference.size_bytes else ""
            mean = sum(mean_width(weight) for weight, _ in entry.bits.values()) / len(entry.bits) if entry.bits else ""
            writer.writerow([entry.key, *figures, latency_ratio, size_ratio, mean, json.dumps(entry.bits)])
        return text.getvalue()


def main() -> int:
    """Print the schema."""
    print(json.dumps(Summary.model_json_schema(), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
