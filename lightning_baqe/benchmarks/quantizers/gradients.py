"""Does it matter how gradients pass the rounding? Schaefer et al., Figure 4 (right), on a small network.

    python -m lightning_baqe.benchmarks.quantizers.gradients

ResNet-8 on Fashion-MNIST, every layer's weights and inputs of 3 bits, the first and the last too. Each seed has a float
network of its own, and every scaling tunes a copy of it for one epoch on the same images in the same order: AdamW, one
cycle, delta 5e-3 as in the paper's section 4.2. Accuracy is that of the last step on the test split; nothing is chosen
by it. The scalings are each of the paper's for both weights and activations, its best mix (EWGS for weights, InvTanh
for activations), and that mix halved.

The table has the mean over the seeds, and the mean of the paired differences from STE with its standard error; the
verdict counts a difference as one if it is beyond two of them. Finished rows are in ``gradients.jsonl``, and a restart
goes on behind them; ``gradients.png`` is the box plot.
"""

from __future__ import annotations

import copy
import io
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure

from lightning_baqe.benchmarks.accuracy_rows import Request, Settings, Sizes, Training, float_network, quiet_trainer
from lightning_baqe.benchmarks.setups import check_positive, console_of, parser_of, table_of
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.data.base import ImageDataModule
from lightning_baqe.files import Rows, replace_file
from lightning_baqe.hardware.identity import device_info, versions
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.gradient_scaling import SCALES, gradient_scaling
from lightning_baqe.runs.evaluation import module_accuracy
from lightning_baqe.tasks import ImageClassifier

BITS, RATE, DECAY = 3, 1e-3, 0.01
MIXES = (*((kind, kind) for kind in SCALES), ("ewgs", "invtanh"), ("ewgs", "ste"), ("ste", "invtanh"))
REFERENCE = ("ste", "ste")
SETTINGS = Settings(Training(3, 4e-3, 0.01), {}, model={"library": "small"}, images={"image_size": 28})


def name_of(mix: tuple[str, str]) -> str:
    """``"ewgs / invtanh"``: weights, activations."""
    return " / ".join(mix)


def tuned(net: torch.nn.Module, data: ImageDataModule, mix: tuple[str, str], seed: int, steps: int) -> float:
    """Test accuracy of a copy that was tuned with these scalings."""
    pl.seed_everything(seed, verbose=False)
    data.seed = seed
    task = ImageClassifier(copy.deepcopy(net).train(), data.num_classes, RATE, DECAY, scheduler="onecycle")
    model = task.quantize(BitConfig.uniform(net, BITS, BITS, first_last=None), data.example_input)
    calibrate(model, data.train_dataloader(), 4)
    model.scale_gradients(*map(gradient_scaling, mix))
    trainer = quiet_trainer(
        max_epochs=1, max_steps=steps or -1, callbacks=[], enable_checkpointing=False, limit_val_batches=0
    )
    trainer.fit(task, datamodule=data)
    return module_accuracy(model.eval(), data.test_dataloader(), torch.device("cpu"))


def differences(rows: list[dict[str, Any]], mix: tuple[str, str]) -> list[float]:
    """From STE by seed, points."""
    found = {(tuple(row["mix"]), row["seed"]): 100 * row["accuracy"] for row in rows}
    return [value - found[REFERENCE, seed] for (name, seed), value in found.items() if name == mix]


def verdict(rows: list[dict[str, Any]]) -> str:
    """What the paired differences say."""
    better: list[str] = []
    worse: list[str] = []
    for mix in MIXES:
        of = differences(rows, mix)
        if mix == REFERENCE or len(of) < 2:
            continue
        mean, error = statistics.fmean(of), statistics.stdev(of) / math.sqrt(len(of))
        if abs(mean) > 2 * error:
            (better if mean > 0 else worse).append(name_of(mix))
    return (
        f"beyond two standard errors from STE: better {', '.join(better) or 'none'}; worse {', '.join(worse) or 'none'}"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The box plot; each seed is a dot."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    values = [[100 * row["accuracy"] for row in rows if tuple(row["mix"]) == mix] for mix in MIXES]
    axis.boxplot(values, showfliers=False, medianprops={"color": "#b2182b"})
    for place, of in enumerate(values, 1):
        axis.plot([place] * len(of), of, "o", color="#2166ac", markersize=4, alpha=0.7)
    axis.set_xticks(range(1, len(MIXES) + 1), [name_of(mix) for mix in MIXES], rotation=30, ha="right")
    axis.set_ylabel("test accuracy, %")
    axis.set_title(f"gradients through the rounding (weights / activations), {BITS} bits")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    replace_file(path, buffer.getvalue())


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(6)), metavar="SEED")
    parser.add_argument("--network", default="resnet8")
    parser.add_argument("--steps", type=int, default=0, help="of tuning; 0: one epoch")
    parser.add_argument("--float-epochs", type=int, default=SETTINGS.float_training.epochs)
    parser.add_argument("--root", type=Path, help="of the images, if they are not where Debian puts them")
    parser.add_argument("--folder", type=Path, default=Path("outputs/gradients"), help="of rows, checkpoints, the plot")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    check_positive(parser, options, "float-epochs", "threads")
    torch.set_num_threads(options.threads)
    console, kept, rows = console_of(130), Rows(options.folder / "gradients.jsonl"), []
    for seed in options.seeds:
        settings = SETTINGS.with_epochs(options.float_epochs, None)
        request = Request("fashion_mnist", options.network, "", seed, Sizes(), settings, options.root)
        net = None
        for mix in MIXES:
            key = {"float": request.float_key, "mix": list(mix), "steps": options.steps, "bits": BITS, "rate": RATE}
            row = next(iter(kept.of(key)), None)
            if row is None:
                if net is None:
                    data, trained = float_network(request, options.folder, console.print)
                    net = trained.net.eval()
                accuracy = tuned(net, data, mix, seed, options.steps)
                console.print(f"  seed {seed}, {name_of(mix)}: {accuracy:.2%}; float {trained.accuracy['test']:.2%}")
                row = {"key": key, "mix": list(mix), "seed": seed, "accuracy": accuracy,
                       "float": trained.accuracy["test"], "device": device_info(1), "versions": versions()}  # fmt: skip
                kept.append(row)
            rows.append(row)
    cells = []
    for mix in MIXES:
        values = [100 * row["accuracy"] for row in rows if tuple(row["mix"]) == mix]
        of = differences(rows, mix)
        error = statistics.stdev(of) / math.sqrt(len(of)) if len(of) > 1 else math.nan
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        cells.append([name_of(mix), f"{statistics.fmean(values):.2f} ± {spread:.2f}", f"{min(values):.2f}",
                      f"{max(values):.2f}", f"{statistics.fmean(of):+.2f} ± {error:.2f}"])  # fmt: skip
    floats = statistics.fmean(100 * row["float"] for row in {row["seed"]: row for row in rows}.values())
    title = f"test accuracy, %, {len(options.seeds)} seeds; float {floats:.2f}; difference from STE ± standard error"
    headings = ("weights / activations", "mean ± deviation", "least", "most", "from STE")
    console.print(table_of(title, headings, headings[:1], cells), verdict(rows))
    draw(rows, options.folder / "gradients.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
