"""Sensitivities compared by what comes of them, at equal size.

    python -m lightning_baqe.benchmarks.bits.comparison --data fashion_mnist
    python -m lightning_baqe.benchmarks.bits.comparison --data elpv

The float networks are those of ``benchmarks.accuracy``; on elpv they are others, of the training images of split 0
alone. Each method allocates 2, 3, 4, 6 or 8 bits to all layers but the first and the last, within the size of the
uniform network of 4 and of 3 bits; beside them that uniform network, and one of random bits that fills the budget. Each
network is deployed twice: corrected without training (``"fast"``; there are twenty of them a seed), and tuned from
there for some steps with the float network as its teacher. Its accuracy is that of the compiled network on the test
split.

Kendall's tau is between what a method predicts and what is measured: the rise of the loss on validation images, over
60 random bit-configs of all sizes, calibrated and neither corrected nor tuned. On elpv the measured loss of pairs is
left out, which takes hours a seed.

Methods and their settings were fixed before any figure was taken; the rate of the tuning by the validation accuracy of
the first seed's random network of 3 bits. Every finished row is added to ``bits.jsonl`` at once; a restart goes on
behind it.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from scipy.stats import kendalltau
from torch import nn

from lightning_baqe.allocation.evidence import Evidence, Sensitivities, Sensitivity
from lightning_baqe.allocation.fisher import Fisher, OutputFisher, PairwiseFisher
from lightning_baqe.allocation.hessian import HessianTrace
from lightning_baqe.allocation.learned_scales import LearnedScales
from lightning_baqe.allocation.measured_losses import Divergence, LossChange, PairwiseLoss
from lightning_baqe.benchmarks.accuracy import SETTINGS
from lightning_baqe.benchmarks.accuracy_rows import SMALLEST, Request, Sizes, float_network, quiet_trainer
from lightning_baqe.benchmarks.bits.instances import sum_of
from lightning_baqe.benchmarks.setups import check_positive, console_of, parser_of, table_of
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.callbacks import Distillation
from lightning_baqe.costs.layer_costs import SIZE, LayerCosts, static_costs, uniform_configs
from lightning_baqe.data.base import ImageDataModule
from lightning_baqe.entrance.admission import Network, admit
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.files import Rows, kept
from lightning_baqe.hardware.identity import device_info, versions
from lightning_baqe.integer.lowering import lower
from lightning_baqe.measurement.build import build
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.ops import OpReader
from lightning_baqe.runs.budgets import Budget, bit_config, solve
from lightning_baqe.runs.evaluation import deployed_accuracy
from lightning_baqe.tasks import ImageClassifier
from lightning_baqe.tasks.classifier import loss_of

WIDTHS, MEANS, IMAGES, CONFIGS, LOSS_IMAGES = (2, 3, 4, 6, 8), (4, 3), 64, 60, 1000
STEPS = {"fashion_mnist": 50, "elpv": 100}  # of 128 and of 32 images
RATES = {"fashion_mnist": 3e-4, "elpv": 1e-4}
METHODS: dict[str, Sensitivity] = {
    "hessian": HessianTrace(),
    "fisher": Fisher(),
    "output fisher": OutputFisher(),
    "divergence": Divergence(),
    "loss change": LossChange(),
    "pairwise fisher": PairwiseFisher(),
    "pairwise": PairwiseLoss(images=IMAGES),
    "scales": LearnedScales(),
}
# Of EfficientNet-Lite0's 47 free layers 27,000 losses of 64 images are hours of a core a seed.
LEFT_OUT = {"elpv": ("pairwise",)}
OTHERS = ("uniform", "random")
TREATMENTS = ("corrected", "tuned")


@dataclass(frozen=True)
class Extent:
    """How much is done; smaller ones are for tests."""

    steps: int
    rate: float = 1e-4
    images: int = IMAGES
    configs: int = CONFIGS
    loss_images: int = LOSS_IMAGES
    correct: str = "fast"


def methods_of(data: str) -> list[str]:
    """Those that are compared on some data."""
    return [method for method in METHODS if method not in LEFT_OUT.get(data, ())]


class Subject:
    """One seed's network on its data, and what methods are told of it.

    Args:
        request: of the float network.
        extent: how much is done.
        folder: keeps checkpoints and sensitivities.
        say: told of every step.
    """

    def __init__(self, request: Request, extent: Extent, folder: Path, say: Any) -> None:
        self.request, self.extent, self.folder, self.say = request, extent, folder, say
        data, trained = float_network(request, folder, say)
        self.data: ImageDataModule = data
        self.net: nn.Module = trained.net.eval()
        self.float_accuracy = trained.accuracy["test"]
        most = max(request.settings.calibration_batches, -(-extent.images // data.batch_size))
        pl.seed_everything(request.seed, verbose=False)  # the same images after a restart
        self.batches = [(x, y) for x, y in itertools.islice(data.train_dataloader(), most)]
        self.base = BitConfig.uniform(self.net, 8, 8)
        self.admitted: Network = admit(self.net, data.example_input)
        self.configs = uniform_configs(self.base, tuple(self.base)[1:-1], WIDTHS)
        self._last: tuple[dict[str, int], QuantizedModel] | None = None

    def quantized(self, bits: BitConfig, correct: str = "none") -> QuantizedModel:
        """Calibrated on training images."""
        images = [x for x, _ in self.batches[: self.request.settings.calibration_batches]]
        return calibrate(quantize(self.admitted, bits), images, correct=correct).eval()

    @cached_property
    def models(self) -> dict[int, QuantizedModel]:
        """All free layers at each width."""
        return {bits: self.quantized(config) for bits, config in self.configs.items()}

    @cached_property
    def costs(self) -> LayerCosts:
        """Of size."""
        graphs = {bits: lower(model) for bits, model in self.models.items()}
        return static_costs(graphs, self.configs, OpReader(self.admitted.graph, self.admitted.graph.graph))

    def limit(self, mean: int) -> float:
        """Size of the uniform network, bytes."""
        return self.costs.total(SIZE, {layer: bits.activation for layer, bits in self.configs[mean].items()})

    def sensitivities(self, method: str) -> Sensitivities:
        """Of the folder, or taken now, on training images."""
        path = (
            self.folder / "sensitivities" / f"{self.request.data}-{self.request.seed}-{method.replace(' ', '_')}.json"
        )
        signature = {**self.request.float_key, "method": repr(METHODS[method]), "images": self.extent.images}

        def take() -> dict[str, Any]:
            self.say(f"  {method}: taking sensitivities")
            left, batches = self.extent.images, []
            for x, y in self.batches:
                batches.append((x[:left], y[:left]))
                left -= len(batches[-1][0])
                if left < 1:
                    break
            models: dict[int, QuantizedModel | None] = dict(self.models)
            evidence = Evidence(models, batches, loss_of, seed=self.request.seed)
            return METHODS[method].measure(evidence).record()

        return Sensitivities.from_record(kept(path, signature, take))

    def allocation(self, method: str, mean: int) -> dict[str, int]:
        """Bits of every layer within the size of the uniform network."""
        if method == "uniform":
            return {layer: bits.activation for layer, bits in self.configs[mean].items()}
        if method == "random":
            return self._filled(mean)
        found = self.sensitivities(method)
        row = solve(Budget(method, {SIZE: self.limit(mean)}), found.values, self.costs, found.pairs)
        if row.allocation.gap > 0:
            self.say(f"  {method}, {mean} bit: the program's gap is {row.allocation.gap:.3g}")
        return dict(row.allocation)

    def _filled(self, mean: int) -> dict[str, int]:
        """Random bits that use at least 97 % of the budget."""
        rng, limit = np.random.default_rng([self.request.seed, mean]), self.limit(mean)
        tables = self.costs.tables[SIZE]
        while True:
            bits = {layer: int(rng.choice(list(of))) for layer, of in tables.items()}
            if 0.97 * limit <= self.costs.total(SIZE, bits) <= limit:
                return bits

    def deployed(self, bits: Mapping[str, int], treatment: str) -> dict[str, float]:
        """Accuracies on the test split, of the compiled network, and its size."""
        model = self._corrected(bits)
        if treatment == "tuned":
            self._tune(model)
        graph = lower(model.eval())
        artifact = build(graph, schedules="default")
        accuracy = deployed_accuracy(artifact, self.data.test_dataloader())
        artifact.close()
        return {"accuracy": accuracy, "size_bytes": graph.size_bytes}

    def _corrected(self, bits: Mapping[str, int]) -> QuantizedModel:
        """That was made last, if it is of these bits: both treatments follow each other."""
        if self._last is None or self._last[0] != bits:
            self._last = (dict(bits), self.quantized(bit_config(self.base, bits), self.extent.correct))
        return copy.deepcopy(self._last[1])

    def _tune(self, model: QuantizedModel) -> None:
        settings = self.request.settings
        pl.seed_everything(self.request.seed, verbose=False)
        task = ImageClassifier(model.train(), self.data.num_classes, self.extent.rate, 0.01, scheduler="cosine")
        teacher = Distillation("net", self.net, settings.weight, settings.temperature)
        trainer = quiet_trainer(
            max_steps=self.extent.steps, callbacks=[teacher], enable_checkpointing=False, limit_val_batches=0
        )
        trainer.fit(task, datamodule=self.data)

    def taus(self) -> dict[str, float]:
        """Kendall's tau of each method over random bit-configs of all sizes."""
        rng = np.random.default_rng([self.request.seed, 60])
        tables, drawn = self.costs.tables[SIZE], []
        for place in range(self.extent.configs):
            narrow = WIDTHS[: 2 + place % (len(WIDTHS) - 1)]  # so that all sizes are met
            offered = {layer: [b for b in of if b in narrow] or list(of) for layer, of in tables.items()}
            drawn.append({layer: int(rng.choice(widths)) for layer, widths in offered.items()})
        measured = [self._loss(bits) for bits in drawn]
        found = {}
        for method in methods_of(self.request.data):
            values = self.sensitivities(method)
            predicted = [
                sum_of(values.values, bits)
                + sum(of.get((bits[one], bits[other]), 0.0) for (one, other), of in values.pairs.items())
                for bits in drawn
            ]
            found[method] = float(kendalltau(predicted, measured).statistic)
        return found

    @torch.no_grad()
    def _loss(self, bits: Mapping[str, int]) -> float:
        model, total, seen = self.quantized(bit_config(self.base, bits)), 0.0, 0
        for x, y in self.data.val_dataloader():
            total += float(loss_of(model(x), y)) * len(y)
            seen += len(y)
            if seen >= self.extent.loss_images:
                break
        return total / seen


def measure(subject: Subject, rows: Rows) -> list[dict[str, Any]]:
    """All rows of a subject; what is in the file is not measured again."""
    request, found = subject.request, []
    head = {"data": request.data, "network": request.network, "seed": request.seed}
    settings = request.settings
    setup = {
        "key": request.float_key,
        "extent": asdict(subject.extent),
        "calibration_batches": settings.calibration_batches,
        "distillation": {"weight": settings.weight, "temperature": settings.temperature},
    }

    def known(of: dict[str, Any]) -> dict[str, Any] | None:
        wanted = {**head, **of, **setup}
        return next((r for r in reversed(rows.read()) if all(r.get(k) == v for k, v in wanted.items())), None)

    def row(of: dict[str, Any], make: Any) -> dict[str, Any]:
        if (before := known(of)) is not None:
            return before
        made = {**head, **of, **make(), **setup, "device": device_info(1), "versions": versions()}
        rows.append(made)
        return made

    methods = methods_of(request.data)
    for method, mean, treatment in itertools.product((*methods, *OTHERS), MEANS, TREATMENTS):

        def network(method: str = method, mean: int = mean, treatment: str = treatment) -> dict[str, Any]:
            bits = subject.allocation(method, mean)
            subject.say(f"  {request.data} seed {request.seed}: {method}, {mean} bit, {treatment}")
            same = known({"bits": bits, "treatment": treatment})  # another method's, from the same seed
            found = {k: same[k] for k in ("accuracy", "size_bytes")} if same else subject.deployed(bits, treatment)
            return {**found, "bits": bits, "float": subject.float_accuracy}

        found.append(row({"method": method, "mean": mean, "treatment": treatment}, network))
    found.append(row({"method": "taus", "methods": methods}, lambda: {"taus": subject.taus()}))
    return found


def result_tables(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Accuracies, mean and spread over the seeds, and Kendall's taus."""
    networks = [row for row in rows if row["method"] != "taus"]
    cells, methods = [], methods_of(rows[0]["data"])
    for method in (*methods, *OTHERS):
        line: list[Any] = [method]
        for mean, treatment in itertools.product(MEANS, TREATMENTS):
            wanted = (method, mean, treatment)
            of = [100 * r["accuracy"] for r in networks if (r["method"], r["mean"], r["treatment"]) == wanted]
            spread = statistics.stdev(of) if len(of) > 1 else 0.0
            line.append(f"{statistics.fmean(of):.2f} ± {spread:.2f}" if of else "")
        cells.append(line)
    headings = ("method", *(f"{mean} bit, {treatment}" for mean, treatment in itertools.product(MEANS, TREATMENTS)))
    floats = [100 * row["float"] for row in {row["seed"]: row for row in networks}.values()]
    title = (
        f"deployed accuracy, %, mean ± standard deviation of {len(floats)} seeds; float {statistics.fmean(floats):.2f}"
    )
    taus = [row["taus"] for row in rows if row["method"] == "taus"]
    lines = ([m, f"{statistics.fmean(t[m] for t in taus):.2f}", f"{min(t[m] for t in taus):.2f}"] for m in methods)
    return (
        table_of(title, headings, ("method",), cells),
        table_of("Kendall's tau, predicted and measured loss", ("method", "mean", "least"), ("method",), lines),
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", default="fashion_mnist", choices=["fashion_mnist", "elpv"])
    parser.add_argument("--root", type=Path, help="of the data's files, if they are not where their package puts them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--folder", type=Path, default=Path("outputs/accuracy"), help="that of benchmarks.accuracy")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smallest", action="store_true", help="one epoch, a few images: does it run?")
    options = parser.parse_args(arguments)
    check_positive(parser, options, "threads")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Hessian traces of .* below their standard errors")
    console, rows, found = console_of(150), Rows(options.folder / "bits.jsonl"), []
    ((name, settings),) = SETTINGS[options.data].items()
    extent, sizes = (
        (Extent(1, 1e-4, 4, 3, 4, "none"), SMALLEST)
        if options.smallest
        else (Extent(STEPS[options.data], RATES[options.data]), Sizes())
    )
    settings = settings.with_epochs(1 if options.smallest else None, None)
    for seed in options.seeds:
        request = Request(options.data, name, next(iter(settings.tuning)), seed, sizes, settings, options.root)
        found += measure(Subject(request, extent, options.folder, console.print), rows)
    console.print(*result_tables(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
