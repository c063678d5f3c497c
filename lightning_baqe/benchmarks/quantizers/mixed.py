"""Learned bits against the same bits everywhere and against the Hessian's, at the same memory and steps.

    python -m lightning_baqe.benchmarks.quantizers.mixed
    python -m lightning_baqe.benchmarks.quantizers.mixed --data elpv --seeds 0 --means 4 3

Means of 4, 3 and 2.5 bits, of all weights and of all layers' inputs each; the first and the last layer count and may
have any bits. Of one float network come

- learned: bits of each layer's weights and inputs, learned for a part of the steps (callbacks.LearnedBits);
- homogeneous: the same bits everywhere; at 2.5 the best mix of 3 and 2 bits, 3 from the front on or from the back on,
  as many layers as keep both sizes, whichever is better on validation images before any training;
- Hessian: bits of each layer's weights and inputs with the smallest sum of HAWQ-V2's sensitivities within the sizes.

All are trained for the same number of steps with the same distillation, gradients and rate; those of given bits with
LSQ+ and one lower integer more of weights, as the toolkit trains them, those that learn bits with symmetric quantizers.
The float networks of Fashion-MNIST's ResNet-18 and of ELPV are those of ``benchmarks.accuracy``. Accuracy is that of
the last step's fake-quantized network on the test split. Finished rows are kept in the folder, and a restart goes on
behind them.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_baqe.allocation.evidence import Evidence
from lightning_baqe.allocation.hessian import HessianTrace
from lightning_baqe.allocation.program import allocate_bits
from lightning_baqe.benchmarks.accuracy import SETTINGS
from lightning_baqe.benchmarks.accuracy_rows import Request, Settings, Sizes, Training, float_network
from lightning_baqe.benchmarks.quantizers.learning import GRADIENTS, Length, Schedule, counted, learn, sizes_of, tune
from lightning_baqe.benchmarks.setups import check_positive, console_of, parser_of, table_of
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.data.base import ImageDataModule
from lightning_baqe.entrance.admission import admit
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.files import Rows
from lightning_baqe.hardware.identity import device_info, versions
from lightning_baqe.quantization.config import MAX_BITS, MIN_BITS, BitConfig, LayerBits
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.runs.evaluation import module_accuracy
from lightning_baqe.tasks.classifier import loss_of

METHODS, MEANS, WIDTHS = ("learned", "homogeneous", "hessian"), (4.0, 3.0, 2.5), range(MIN_BITS, MAX_BITS + 1)
NETWORKS: Mapping[str, Mapping[str, Settings]] = {
    "fashion_mnist": {
        "resnet18": SETTINGS["fashion_mnist"]["resnet18"],
        "mobilenet_v2": Settings(
            Training(8, 0.05, 5e-4, optimizer="sgd"), {}, images={"image_size": 32}, calibration_batches=4
        ),
    },
    "elpv": SETTINGS["elpv"],
}
SCHEDULE, LENGTH = Schedule(every=1, start=6, rate=0.1), Length(20, 1, 4, 3, 1e-3, 0.5)
LAYER_IMAGES = 32  # of the Hessian's
Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A seed's float network and images.

    Args:
        net, data: of them.
        samples: of the Hessian's probes, at most.
        seed: of what is drawn of the images.
    """

    net: nn.Module
    data: ImageDataModule
    samples: int
    seed: int

    @cached_property
    def network(self) -> Any:
        """What counts sizes."""
        return counted(self.net, self.data)

    def uniform(self, bits: int) -> BitConfig:
        """The same bits everywhere."""
        return BitConfig.uniform(self.net, bits, bits, first_last=None)

    def keeps(self, bits: BitConfig, mean: float) -> bool:
        """Whether both sizes are within the mean."""
        return all(size <= mean + 1e-6 for size in sizes_of(self.network, bits))

    def calibrated(self, bits: BitConfig) -> QuantizedModel:
        """Without training; on the same images after a restart."""
        pl.seed_everything(self.seed, verbose=False)
        self.data.seed = self.seed
        images = [x for x, _ in itertools.islice(self.data.train_dataloader(), 2)]
        return calibrate(quantize(admit(self.net, self.data.example_input), bits), images).eval()

    def mix(self, mean: float) -> BitConfig:
        """Of two neighbouring whole numbers of bits; of one where the mean is whole."""
        low = int(mean)
        narrow = self.uniform(low)
        if low == mean:
            return narrow
        wide, names, found = LayerBits(low + 1, low + 1), list(narrow), []
        for order in (names, names[::-1]):
            kept = narrow
            for count in range(1, len(order) + 1):
                more = narrow.replace(dict.fromkeys(order[:count], wide))
                if not self.keeps(more, mean):
                    break
                kept = more
            found.append(kept)
        loader = self.data.val_dataloader()
        return max(found, key=lambda bits: module_accuracy(self.calibrated(bits), loader, torch.device("cpu")))

    @cached_property
    def sensitivities(self) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
        """The Hessian's, of each layer's weights and of its inputs, at each of the bits."""
        models: dict[int, QuantizedModel | None] = {bits: self.calibrated(self.uniform(bits)) for bits in WIDTHS}
        pl.seed_everything(self.seed, verbose=False)
        x, y = next(iter(self.data.train_dataloader()))
        evidence = Evidence(models, [(x[:LAYER_IMAGES], y[:LAYER_IMAGES])], loss_of)
        weights = HessianTrace(self.samples, inputs=False).measure(evidence).values
        both = HessianTrace(self.samples).measure(evidence).values
        inputs = {name: {b: both[name][b] - of[b] for b in WIDTHS} for name, of in weights.items()}
        return {name: dict(of) for name, of in weights.items()}, inputs

    def hessian(self, mean: float) -> BitConfig:
        """The smallest sums within the sizes; layers that read one tensor have it at the same bits."""
        of_weights, of_inputs = self.sensitivities
        network = self.network
        counts = {name: of.values for name, of in network.weights.items()}
        weights = _within(of_weights, counts, mean)
        of_tensors = {path: dict.fromkeys(WIDTHS, 0.0) for path in network.activations}
        for layer, paths in network.inputs.items():
            for path, bits in itertools.product(set(paths), WIDTHS):
                of_tensors[path][bits] += of_inputs[layer][bits] / len(set(paths))
        sizes = {path: of.values for path, of in network.activations.items()}
        tied = [paths for paths in network.inputs.values() if len(set(paths)) > 1]
        tensors = _within(of_tensors, sizes, mean, tied)
        found = {layer: LayerBits(weights[layer], tensors[paths[0]]) for layer, paths in network.inputs.items()}
        return self.uniform(MAX_BITS).replace(found)


def _within(
    values: dict[str, dict[int, float]], counts: dict[str, int], mean: float, tied: list[tuple[str, ...]] | None = None
) -> Mapping[str, int]:
    costs = {"bits": {name: {bits: float(count * bits) for bits in WIDTHS} for name, count in counts.items()}}
    return allocate_bits(values, costs, {"bits": mean * sum(counts.values())}, tied or ())


def measure(subject: Subject, method: str, mean: float, length: Length, seed: int) -> dict[str, Any]:
    """One training: accuracies, bits, sizes."""
    row: dict[str, Any] = {}
    if method == "learned":
        found = learn(subject.net, subject.data, mean, SCHEDULE, length, seed)
        model, bits, row["learned"] = found.model, found.bits, list(found.learned)
    else:
        bits = subject.mix(mean) if method == "homogeneous" else subject.hessian(mean)
        model = tune(subject.net, subject.data, bits, length, seed)
    loaders = {"val": subject.data.val_dataloader(), "test": subject.data.test_dataloader()}
    row |= {split: module_accuracy(model, loader, torch.device("cpu")) for split, loader in loaders.items()}
    row["sizes"] = list(sizes_of(subject.network, bits))
    row["bits"] = {name: [of.weight, of.activation] for name, of in bits.items()}
    return row


def result_table(rows: list[dict[str, Any]]) -> Any:
    """Mean and spread over the seeds; what learned bits have more than the others, by seed."""
    cells = []
    for network, mean in dict.fromkeys((row["network"], row["mean"]) for row in rows):
        group = [row for row in rows if (row["network"], row["mean"]) == (network, mean)]
        of = {m: {r["seed"]: 100 * r["test"] for r in group if r["method"] == m} for m in METHODS}
        line: list[Any] = [network, f"{mean:g}", f"{statistics.fmean(100 * row['float'] for row in group):.2f}"]
        for method in METHODS:
            values = list(of[method].values())
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            line.append(f"{statistics.fmean(values):.2f} ± {spread:.2f}" if values else "")
        for method in METHODS[1:]:
            more = [value - of[method][seed] for seed, value in of["learned"].items() if seed in of[method]]
            line.append(f"{statistics.fmean(more):+.2f}" if more else "")
        sizes = [max(row["sizes"]) for row in group]
        cells.append([*line, f"{max(sizes):.3f}"])
    headings = ("network", "mean bits", "float", *METHODS, "learned less homogeneous", "less hessian", "largest mean")
    return table_of("test accuracy, %, mean ± standard deviation over seeds", headings, ("network",), cells)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 if every network keeps its sizes, else 1."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", default="fashion_mnist", choices=list(NETWORKS))
    parser.add_argument("--root", type=Path, help="of the data's files, if they are not where their package puts them")
    parser.add_argument("--networks", nargs="+", metavar="NETWORK", help="some of the data's")
    parser.add_argument("--means", nargs="+", type=float, default=list(MEANS), metavar="BITS")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--steps", type=int, default=LENGTH.steps, help="of what counts as an epoch")
    parser.add_argument("--folder", type=Path, default=Path("outputs/accuracy"), help="that of benchmarks.accuracy")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smallest", action="store_true", help="one float epoch, a few probes: does it run?")
    options = parser.parse_args(arguments)
    check_positive(parser, options, "steps", "threads")
    torch.set_num_threads(options.threads)
    known, console, kept, rows = NETWORKS[options.data], console_of(150), Rows(options.folder / "mixed.jsonl"), []
    length = replace(LENGTH, steps=options.steps)
    for name, seed in itertools.product(options.networks or known, options.seeds):
        settings = known[name].with_epochs(1 if options.smallest else None, None)
        request = Request(options.data, name, "", seed, Sizes(), settings, options.root)
        subject: Subject | None = None
        for mean, method in itertools.product(options.means, METHODS):
            key = {"float": request.float_key, "method": method, "mean": mean, "length": asdict(length),
                   "images": LAYER_IMAGES, "samples": 2 if options.smallest else 20, "gradients": list(GRADIENTS),
                   "schedule": asdict(SCHEDULE) if method == "learned" else None}  # fmt: skip
            row = next(iter(kept.of(key)), None)
            if row is None:
                if subject is None:
                    data, trained = float_network(request, options.folder, console.print)
                    subject = Subject(trained.net.eval(), data, 2 if options.smallest else 20, seed)
                row = measure(subject, method, mean, length, seed)
                row |= {"key": key, "network": name, "mean": mean, "method": method, "seed": seed}
                row |= {"float": trained.accuracy["test"], "device": device_info(1), "versions": versions()}
                kept.append(row)
                console.print(f"  {name} seed {seed}, {mean:g} bits, {method}: {row['test']:.2%}, {row['sizes']}")
            rows.append(row)
    console.print(result_table(rows))
    return int(any(max(row["sizes"]) > row["mean"] + 1e-6 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
