"""One allocation run: sensitivities and costs, found once and kept; budgets; each network trained, deployed, measured.

<run_dir>/allocation/sensitivities.json     what each layer adds to the loss
<run_dir>/allocation/costs.json             what each layer costs
<run_dir>/allocation/allocations.json       the budgets and their bits
<run_dir>/allocation/networks.json          numbers and bits of all networks of the run
<run_dir>/allocation/<network>.json         what was measured of one network
<run_dir>/allocation/<network>-bits.json    its bit-config
<run_dir>/allocation/table.txt, layers.png  Table II and Figure 5 of HAWQ-V3
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lightning_baqe.allocation.evidence import Batch, Evidence, Loss, Sensitivities, Sensitivity
from lightning_baqe.allocation.hessian import HessianTrace
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.costs.layer_costs import (
    LATENCY,
    SIZE,
    LayerCosts,
    latency_costs,
    only,
    static_costs,
    uniform_configs,
)
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.digest import fingerprint
from lightning_baqe.entrance.admission import Network
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.errors import ConfigError, InfeasibleError, check_at_least
from lightning_baqe.files import MIB, kept, read_file, replace_file
from lightning_baqe.hardware.identity import versions
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.lowering import lower
from lightning_baqe.measurement.device import Device
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig, LayerBits
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.ops import OpReader
from lightning_baqe.runs.budgets import Budget, Budgets, Row, bit_config, solve, unrewarded
from lightning_baqe.runs.evaluation import MeasureOptions, deployed_accuracy, evaluate, measure_quietly, module_accuracy
from lightning_baqe.runs.objectives import summarise
from lightning_baqe.runs.study import bits_entry
from lightning_baqe.runs.summary import Baseline, Entry, Figures, Summary, Trial
from lightning_baqe.scratch import temporary_folder
from lightning_baqe.tasks.scoring import Batches, Scorer

PAPER_WIDTHS = (4, 8)
ATTEMPTS = 6  # networks that are measured for one budget of latency
Train = Callable[[BitConfig, str], QuantizedModel]  # bits and name to a tuned network, in eval mode on the CPU


@dataclass(frozen=True)
class AllocationOptions:
    """What a run is told.

    Args:
        sensitivity: the method.
        bit_choices: of every layer but the first and the last; ``"auto"``: 4 and 8, and where these span less than
            10 % of latency, float, too, for budgets of latency.
        budget: limits of one network, or levels.
        images: that sensitivities are taken on.
        tune_s: seconds for the kernels of each width.
        baselines: uniform widths that are trained and measured besides.

    Raises:
        ConfigError: an argument that cannot be right.
    """

    sensitivity: Sensitivity = field(default_factory=HessianTrace)
    bit_choices: tuple[int, ...] | str = "auto"
    budget: Budgets = field(default_factory=Budgets)
    images: int = 64
    tune_s: float = 20.0
    baselines: tuple[int, ...] = PAPER_WIDTHS[::-1]

    def __post_init__(self) -> None:
        check_at_least("allocation.images", self.images, 1)
        if not isinstance(self.sensitivity, Sensitivity):
            raise ConfigError(f"allocation.sensitivity makes {self.sensitivity!r}, wanted is a Sensitivity")
        for name, given in (("bit_choices", self.bit_choices), ("baselines", self.baselines)):
            if not isinstance(given, Sequence):
                raise ConfigError(f"allocation.{name}={given!r}, wanted is a list of bits, [4, 8]")
        if isinstance(self.tune_s, bool) or not isinstance(self.tune_s, int | float) or not self.tune_s >= 0:
            raise ConfigError(f"allocation.tune_s={self.tune_s!r}, but seconds of 0 or more are wanted")
        for name, widths in (("bit_choices", self.widths), ("baselines", tuple(self.baselines))):
            wrong = [bits for bits in widths if bits != FLOAT_BITS and bits not in range(2, 9)]
            if wrong or len(set(widths)) < len(widths) or (name == "bit_choices" and len(widths) < 2):
                raise ConfigError(f"allocation.{name} are 2..8 or 32 (float), each once; got {list(widths)}")
        if all(bits == FLOAT_BITS for bits in self.widths):
            raise ConfigError("allocation.bit_choices needs an integer width")

    @property
    def widths(self) -> tuple[int, ...]:
        """That figures are taken at."""
        if isinstance(self.bit_choices, str):
            if self.bit_choices != "auto":
                raise ConfigError(f"allocation.bit_choices={self.bit_choices!r}; wanted are widths, or 'auto'")
            return (*PAPER_WIDTHS, FLOAT_BITS)
        return tuple(sorted(self.bit_choices))


@dataclass(eq=False)
class Allocator:
    """What a run works with.

    Args:
        options: of the user.
        network: the trained float network.
        admitted: it, traced.
        batches: ``(x, y)`` of the training data, for sensitivities and calibration.
        quantization, calibration_batches: how networks are quantized: options of :func:`lightning_baqe.quantize`, and
            batches that they are calibrated on.
        loss_fn: of the task.
        train: tunes a network of some bits.
        validation, test: batches.
        scorer: what accuracy is.
        run_dir: the run folder.
        about: of the summary: recipe, model, dataset.
        device, build_options, measurement: of the figures.
        say: prints a line.
    """

    options: AllocationOptions
    network: torch.nn.Module
    admitted: Network
    batches: list[Batch]
    quantization: Mapping[str, str]
    calibration_batches: int
    loss_fn: Loss
    train: Train
    validation: Batches
    test: Batches
    scorer: Scorer
    run_dir: Path
    about: Mapping[str, Any]
    device: Device
    build_options: BuildOptions
    measurement: MeasureOptions
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.folder = self.run_dir / "allocation"
        self.base = BitConfig.uniform(self.network, 8, 8)
        self.configs = uniform_configs(self.base, tuple(self.base)[1:-1], self.options.widths)
        self._reader = OpReader(self.admitted.graph, self.admitted.graph.graph)

    @cached_property
    def _weights(self) -> str:
        """Digest of the float network's weights and buffers."""
        return _digest_of(tensor for _, tensor in sorted(self.network.state_dict().items()))

    @cached_property
    def models(self) -> dict[int, QuantizedModel]:
        """Calibrated, with all free layers at each width."""
        images = [x for x, _ in self.batches[: self.calibration_batches]]
        return {
            bits: calibrate(quantize(self.admitted, config, **self.quantization), images).eval()
            for bits, config in self.configs.items()
        }

    @cached_property
    def graphs(self) -> dict[int, IntegerGraph]:
        """The same, lowered."""
        return {bits: lower(model) for bits, model in self.models.items()}

    @cached_property
    def sensitivities(self) -> Sensitivities:
        """Of the run folder, or found now."""
        options = self.options
        signature = {
            "weights": self._weights,
            "images": _digest_of(x for x, _ in self.batches),
            "method": repr(options.sensitivity),
            "images_used": options.images,
            "widths": list(options.widths),
            "quantization": {**self.quantization, "batches": self.calibration_batches},
            "lightning_baqe": versions()["lightning-baqe"],
        }

        def find() -> dict[str, Any]:
            self.say(f"Sensitivities by {options.sensitivity.name}, of {options.images} images.")
            tenths = 0

            def tell(done: int, total: int) -> None:
                nonlocal tenths
                if 10 * done // total > tenths:
                    tenths = 10 * done // total
                    self.say(f"  {options.sensitivity.name}: {done}/{total}")

            models: dict[int, QuantizedModel | None] = {b: m for b, m in self.models.items() if b != FLOAT_BITS}
            if FLOAT_BITS in self.models:
                models[FLOAT_BITS] = None
            batches = list(_first(self.batches, options.images))
            kept_layers = (next(iter(self.base)), next(reversed(tuple(self.base))))
            evidence = Evidence(models, batches, self.loss_fn, self.scorer.kind, kept_layers, tell=tell)
            return options.sensitivity.measure(evidence).record()

        return Sensitivities.from_record(kept(self.folder / "sensitivities.json", signature, find))

    @cached_property
    def costs(self) -> LayerCosts:
        """Of the run folder, or measured now."""
        signature = {
            "architecture": self.base.signature,
            "input": list(self.batches[0][0].shape[1:]),
            "widths": list(self.options.widths),
            "target": {name: str(value) for name, value in vars(self.build_options.target).items()},
            "threads": self.build_options.threads,
            "device": fingerprint(self.device.info(self.build_options.threads)),
        }

        def measure() -> dict[str, Any]:
            found = static_costs(self.graphs, self.configs, self._reader)
            return found.joined(
                latency_costs(
                    self.graphs, self.configs, self._reader, self.build_options, self.device,
                    found.tables[SIZE], lambda _, graph: self._whole_us(graph),
                    tune_s=self.options.tune_s, tell=lambda what: self.say(f"  {what}"),
                )
            ).record()  # fmt: skip

        return LayerCosts.from_record(kept(self.folder / "costs.json", signature, measure))

    def _whole_us(self, graph: IntegerGraph) -> float:
        with temporary_folder() as folder:
            artifact, place = self.device.build(graph, self.build_options), Path(folder) / "artifact"
            with closing(artifact):
                artifact.save(place)
                return measure_quietly(artifact, place, self.measurement, self.device).latency_us

    def rows(self) -> list[Row]:
        """Each budget with its allocation. Networks of latency budgets are measured, untrained, and where one takes
        longer than its layers' sum said, the program is solved anew for as much less.

        Raises:
            InfeasibleError: a limit that no allocation keeps.
        """
        found, costs, widths = self.sensitivities, self.costs, self.options.widths
        line = unrewarded(costs, widths) if self.options.bit_choices == "auto" else None
        if line is not None:
            self.say(line)
        narrow = tuple(bits for bits in widths if bits != FLOAT_BITS) if self.options.bit_choices == "auto" else widths

        def solved(budgets: Budgets, allowed: tuple[int, ...]) -> list[Row]:
            within = costs.restricted(allowed)
            values = only(found.values, allowed)
            return [self._solved(budget, values, within) for budget in budgets.of(within)]

        if line is None:
            return solved(self.options.budget, narrow)
        if self.options.budget.own:
            return solved(self.options.budget, widths if self.options.budget.latency_us is not None else narrow)
        by_name = {row.budget.name: row for row in solved(self.options.budget, narrow)}
        by_name |= {
            row.budget.name: row for row in solved(self.options.budget, widths) if "latency_us" in row.budget.limits
        }
        return list(by_name.values())

    def _solved(self, budget: Budget, values: Mapping[str, Mapping[int, float]], costs: LayerCosts) -> Row:
        limit, least = budget.limits.get(LATENCY), costs.span(LATENCY, min)
        row = solve(budget, values, costs, self.sensitivities.pairs)
        if limit is not None:
            row = self._in_time(row, float(limit), least, values, costs)
        if row.allocation.gap > 0:
            self.say(
                f"{budget.name}: the time limit left a sensitivity that may be {row.allocation.gap:.3g} too large."
            )
        return row

    def _in_time(
        self, row: Row, limit: float, least: float, values: Mapping[str, Mapping[int, float]], costs: LayerCosts
    ) -> Row:
        """The first of ever faster networks that is measured within the limit, or else the fastest, with a line."""
        budget, aim, found = row.budget, limit, [(self._network_us(row), row)]
        while found[-1][0] > limit and len(found) < ATTEMPTS and aim > least:
            aim = max(least, aim * 0.995 * limit / found[-1][0])
            tighter = Budget(budget.name, {**budget.limits, LATENCY: aim})
            try:
                again = solve(tighter, values, costs, self.sensitivities.pairs)
            except InfeasibleError:
                break  # beside the other limits nothing is as fast
            found.append((self._network_us(again), Row(budget, again.allocation, again.predicted)))
        measured, row = min(found, key=lambda one: (one[0] > limit, one[0] if one[0] > limit else 0.0))
        if measured > limit:
            self.say(f"{budget.name}: {measured:.1f} us measured, {limit:.1f} wanted; no faster network was found.")
        return row

    def _network_us(self, row: Row) -> float:
        images = [x for x, _ in self.batches[:1]]
        model = calibrate(quantize(self.admitted, bit_config(self.base, row.allocation), **self.quantization), images)
        return self._whole_us(lower(model.eval()))

    def run(self, rows: list[Row]) -> tuple[Summary, dict[str, Entry]]:
        """Train, deploy and measure each budget's network, equal ones once; what the folder has is not done again.

        Returns:
            the run's summary, and ``{network: its figures}``: uniform networks as ``uniform_<bits>``, then budgets.
        """
        reference = Figures.model_validate(self._figures("float", None))
        baselines = [
            Baseline(name=f"uniform_{bits}", bits=bits_entry(config))
            for bits, config in uniform_configs(
                self.base, tuple(self.base)[1:-1], tuple(self.options.baselines)
            ).items()
        ]
        trials, of_row = self._numbered(rows, baselines)
        trials = [t for t in trials if t.key in of_row.values() or (self.folder / f"{t.key}.json").exists()]
        done: dict[str, Entry] = {}
        summary = summarise(self._about(), reference, [])
        for entry in (*baselines, *trials):
            figures = self._figures(entry.key, self._config(entry))
            fake = figures.pop("fake_quant_accuracy")
            done[entry.key] = entry.completed(Figures.model_validate(figures), fake)
            found = list(done.values())
            summary = summarise(
                self._about(), reference, [e for e in found if isinstance(e, Trial)],
                [e for e in found if isinstance(e, Baseline)], tests=self._tests(found, reference),
            )  # fmt: skip
            summary.write(self.run_dir)
        uniform = {baseline.name: done[baseline.key] for baseline in baselines}
        return summary, {**uniform, **{name: done[key] for name, key in of_row.items()}}

    def _numbered(self, rows: list[Row], baselines: list[Baseline]) -> tuple[list[Trial], dict[str, str]]:
        """The networks of the budgets, those that are no baseline, with the numbers that they have in the folder;
        networks of earlier budgets stay. And ``{budget: the network's key}``.
        """
        path = self.folder / "networks.json"
        known = json.loads(read_file(path, 64 * MIB)) if path.exists() else []
        trials = [Trial.model_validate(entry) for entry in known]
        of_row: dict[str, str] = {}
        for row in rows:
            bits = bits_entry(bit_config(self.base, row.allocation))
            same: Entry | None = next((entry for entry in (*baselines, *trials) if entry.bits == bits), None)
            if same is None:
                same = Trial(number=len(trials), phase=row.budget.name, bits=bits)
                trials.append(same)
            of_row[row.budget.name] = same.key
        content = [{"number": trial.number, "phase": trial.phase, "bits": trial.bits} for trial in trials]
        replace_file(path, json.dumps(content, indent=1).encode())
        for entry in (*baselines, *trials):
            replace_file(self.folder / f"{entry.key}-bits.json", self._config(entry).to_json().encode())
        return trials, of_row

    def _config(self, entry: Entry) -> BitConfig:
        return self.base.replace({name: LayerBits(*bits) for name, bits in entry.bits.items()})

    def _about(self) -> dict[str, Any]:
        device = self.device.info(self.build_options.threads)
        return {**self.about, "metric": self.scorer.name, "device": device, "versions": versions()}

    @staticmethod
    def _tests(entries: Iterable[Entry], reference: Figures) -> dict[str, float]:
        tests = {entry.key: entry.test_accuracy for entry in entries} | {"float": reference.test_accuracy}
        return {key: accuracy for key, accuracy in tests.items() if accuracy is not None}

    def _figures(self, key: str, bits: BitConfig | None) -> dict[str, Any]:
        """Of one network, with its accuracies on the test split and before lowering; None: the float network."""
        signature = {
            "weights": self._weights,
            "bits": None if bits is None else bits.to_json(),
            "device": fingerprint(self.device.info(self.build_options.threads)),
        }

        def find() -> dict[str, Any]:
            if bits is None:
                everywhere = BitConfig.uniform(self.network, FLOAT_BITS, FLOAT_BITS)
                model = quantize(self.admitted, everywhere).eval()
            else:
                self.say(f"Training {key}.")
                model = self.train(bits, f"{key}-{self._weights[:8]}")
            fake = module_accuracy(model, self.validation, torch.device("cpu"), self.scorer)
            folder = self.run_dir / "artifacts" / key
            found = evaluate(
                model, self.validation, folder, self.build_options, device=self.device, options=self.measurement,
                scorer=self.scorer,
            )  # fmt: skip
            with closing(Artifact.load(folder)) as artifact:
                tested = deployed_accuracy(artifact, self.test, self.device, self.scorer)
            self.say(
                f"  {key}: {self.scorer.name} {found.accuracy:.4f}, {found.latency_us:.1f} us, {found.size_bytes} B"
            )
            return {**found.record(), "test_accuracy": tested, "fake_quant_accuracy": fake}

        content: dict[str, Any] = dict(kept(self.folder / f"{key}.json", signature, find))
        if bits is None:
            content.pop("fake_quant_accuracy")
        return content


def _first(batches: list[Batch], images: int) -> Iterable[Batch]:
    left = images
    for x, y in batches:
        if left < 1:
            return
        yield x[:left], y[:left]
        left -= len(x)


def write_table(folder: Path, text: str) -> None:
    """Keep what was printed."""
    replace_file(folder / "table.txt", text.encode())


def write_rows(folder: Path, rows: list[Row]) -> None:
    """Keep the budgets and their allocations."""
    content = [
        {"budget": row.budget.name, "limits": dict(row.budget.limits), "predicted": dict(row.predicted),
         "sensitivity": row.allocation.sensitivity, "gap": row.allocation.gap, "bits": dict(row.allocation)}
        for row in rows
    ]  # fmt: skip
    replace_file(folder / "allocations.json", json.dumps(content, indent=1).encode())


def _digest_of(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]
