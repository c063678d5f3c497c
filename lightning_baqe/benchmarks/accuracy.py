"""Accuracy of deployed networks against float.

    python -m lightning_baqe.benchmarks.accuracy                         # glyphs; about an hour on two cores
    python -m lightning_baqe.benchmarks.accuracy --data fashion_mnist
    python -m lightning_baqe.benchmarks.accuracy --data elpv

For each network and seed a float network is trained; for each of its bits (first and last layer 8 bit) a quantized copy
is tuned with the float network as its teacher, or corrected without training, lowered, compiled and run on the test
split. The limits, in points of the test split; deployed is at most 0.2 from fake-quant either way:

| data, network | float | bits | at most below float |
| --- | --- | --- | --- |
| glyphs, ResNet-18 | from random weights | W8A8; W4A4 | 0.3; 2 |
| glyphs, MobileNetV2 | from random weights | W8A8; W4A4 | 0.3; 4 |
| fashion_mnist, ResNet-18 | from random weights, at least 93.5 % | W8A8 and W4A8 without training; W4A4 | 0.2, 1; 0.5 |
| elpv, EfficientNet-Lite0 | from ImageNet's weights, at least 88.4 % | W8A8 without training | 0.5 |

88.4 % is what the network of Deitsch et al. (Solar Energy 185, 2019) reaches on elpv, split likewise. The test split
of glyphs has typefaces that training never sees. Each seed draws its own weights and order, of glyphs its own
images. Epochs, rates and the epoch that is kept were chosen by validation accuracy alone; the test split is read once a
row. Each finished row is added to ``rows.jsonl`` in the folder at once, and a restart goes on in the epoch where it was
stopped. Rows count only for the settings that they were made with.

The settings, :data:`SETTINGS`, and why:

- 16000 training images of glyphs, each drawn once: the random maps, colours and occlusions are its augmentation, but an
  epoch sees the same images again. Twice the data module's default, since it gives better networks in the same time.
- Float: AdamW, one cycle of the rate to 0. The epochs are as many as it takes for validation accuracy to level off, 8
  for ResNet-18; MobileNetV2 needs 24, since its first thousand steps on images of 32 pixels, which it shrinks to one,
  hardly learn. It has batches of 64, twice the steps an epoch. Both curves are in each row, so that one can see whether
  tuning gains because it trains longer.
- Fashion-MNIST: SGD with one cycle; the stem is one for small images, without pooling.
- ELPV: labels drawn from the experts' probabilities; ImageNet's batch-norm statistics and early layers stay as they
  are: with those of batches of 32, and all layers at a rate of 1e-3, 1,600 photographs are found by heart (split 0, 24
  epochs: 90.4 % of validation images, 91.4 so). The number of epochs was chosen by validation images; then these are
  trained on, too, 1,968 photographs as in Deitsch et al., and the last epoch is kept. Each seed splits anew, so that
  the figures do not hang on one draw.
- W8A8: one epoch at a low rate that falls to 0. Its loss is small, and it must not train the float network further.
- W4A4: a few epochs of one cycle, more for MobileNetV2, whose depthwise layers have few weights to correct with.
- Distillation: nine tenths of the loss at temperature 2; the teacher's errors are the ones to be compared with.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lightning_baqe.benchmarks.accuracy_rows import (
    BITS,
    SMALLEST,
    Request,
    Settings,
    Sizes,
    Training,
    find_row,
    measure_row,
)
from lightning_baqe.benchmarks.setups import check_positive, console_of, parser_of, table_of, text_of
from lightning_baqe.files import Rows

_EARLY = ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2")  # of EfficientNets
SETTINGS = {
    "glyphs": {
        "resnet18": Settings(
            Training(8, 2e-3, 0.05),
            {"w8a8": Training(1, 1e-4, 0.0, "cosine"), "w4a4": Training(3, 1e-3, 0.01)},
        ),
        "mobilenet_v2": Settings(
            Training(24, 3e-3, 0.05),
            {"w8a8": Training(1, 1e-4, 0.0, "cosine"), "w4a4": Training(5, 1e-3, 0.01)},
            batch_size=64,
        ),
    },
    "fashion_mnist": {
        "resnet18": Settings(
            Training(15, 0.1, 5e-4, optimizer="sgd", precision="bf16-mixed"),
            {"w8a8": None, "w4a4": Training(4, 1e-3, 0.01), "w4a8": None},
            model={"stem_stride": 2},
            images={"image_size": 28},
            calibration_batches=4,
        ),
    },
    "elpv": {
        "tf_efficientnet_lite0": Settings(
            Training(16, 3e-4, 0.05, frozen=_EARLY, freeze_batch_norm=True),
            {"w8a8": None},
            batch_size=32,
            model={"library": "timm", "weights": "imagenet"},
            images={"labels": "drawn"},
            calibration_batches=4,
        ),
    },
}


def last_settings(data: str, settings: Settings, seed: int) -> Settings:
    """Of the network that is tested, where it does not train on the training split alone."""
    if data != "elpv":
        return settings
    return replace(settings, images={**settings.images, "split_seed": seed, "val_in_train": True})


BELOW_FLOAT = {
    ("glyphs", "resnet18", "w8a8"): 0.3,
    ("glyphs", "resnet18", "w4a4"): 2.0,
    ("glyphs", "mobilenet_v2", "w8a8"): 0.3,
    ("glyphs", "mobilenet_v2", "w4a4"): 4.0,
    ("fashion_mnist", "resnet18", "w8a8"): 0.2,
    ("fashion_mnist", "resnet18", "w4a4"): 0.5,
    ("fashion_mnist", "resnet18", "w4a8"): 1.0,
    ("elpv", "tf_efficientnet_lite0", "w8a8"): 0.5,
}
FLOAT_LEAST = {"fashion_mnist": 93.5, "elpv": 88.4}
FROM_FAKE_QUANT = 0.2
KINDS = ("float", "fake_quant", "deployed")
_TEXTS = ("network", "bits", "limits")  # columns


def drop(row: dict[str, Any]) -> float:
    """Points that the deployed network loses against float on the test split; negative: it gains."""
    return 100 * (row["float"]["test"] - row["deployed"]["test"])


def gap(row: dict[str, Any]) -> float:
    """Points from the fake-quantized to the deployed network on the test split."""
    return 100 * (row["deployed"]["test"] - row["fake_quant"]["test"])


def failures(row: dict[str, Any]) -> list[str]:
    """The limits that a row breaks, in words; none: it holds them all."""
    # Differences of counts over 10000, in points: a limit that is met exactly must not fail by the last binary digit.
    found = []
    limit = BELOW_FLOAT[row["data"], row["network"], row["bits"]]
    float_accuracy, least = 100 * row["float"]["test"], FLOAT_LEAST.get(row["data"], 0.0)
    if round(float_accuracy, 6) < least:
        found.append(f"float {float_accuracy:.2f} %, {least} wanted")
    if round(drop(row), 6) > limit:
        found.append(f"{drop(row):.2f} points below float, {limit} allowed")
    if round(abs(gap(row)), 6) > FROM_FAKE_QUANT:
        found.append(f"{abs(gap(row)):.2f} points from fake-quant, {FROM_FAKE_QUANT} allowed")
    return found


def row_table(rows: list[dict[str, Any]]) -> Table:
    """Every row: accuracies in percent, differences in points of the test split."""
    headings = ("network", "bits", "seed", "float val", "test", "fake-quant val", "test", "deployed val", "test",
                "below float", "from fake-quant", "recall float", "deployed", "limits")  # fmt: skip
    cells = (
        [
            *(row["network"], row["bits"], row["seed"]),
            *(_shown(row, kind, split) for kind in KINDS for split in ("val", "test")),
            *(f"{drop(row):+.2f}", f"{gap(row):+.2f}"),
            *(text_of(value and 100 * value, ".1f") for value in _recalls(row)),
            "; ".join(failures(row)) or "hold",
        ]
        for row in rows
    )
    return table_of("accuracy in %, differences in points of the test split", headings, _TEXTS, cells)


def _shown(row: dict[str, Any], kind: str, split: str) -> str:
    """An accuracy in percent; of validation images that were trained on, none."""
    seen = split == "val" and row["key"]["images"].get("val_in_train", False)
    return "" if seen else f"{100 * row[kind][split]:.2f}"


def _recalls(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """By the float and the deployed network, 0..1."""
    recall = row["recall"] or {}
    return recall.get("float"), recall.get("deployed")


def mean_table(rows: list[dict[str, Any]]) -> Table:
    """Mean and standard deviation over the seeds, by network and bits."""
    headings = ("network", "bits", "seeds", "float", "fake-quant", "deployed", "below float", "most", "limits")
    cells = []
    for network, bits in dict.fromkeys((row["network"], row["bits"]) for row in rows):
        group = [row for row in rows if (row["network"], row["bits"]) == (network, bits)]
        figures = [_mean([100 * row[kind]["test"] for row in group]) for kind in KINDS]
        drops = [drop(row) for row in group]
        verdict = "fail" if any(failures(row) for row in group) else "hold"
        cells.append([network, bits, len(group), *figures, _mean(drops), f"{max(drops):+.2f}", verdict])
    return table_of("test split, mean ± standard deviation over seeds", headings, _TEXTS, cells)


def _mean(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.2f} ± {spread:.2f}"


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Returns:
        the exit status: 0 if every row holds its limits, else 1.
    """
    parser = parser_of(__doc__)
    parser.add_argument("--data", default="glyphs", choices=list(SETTINGS))
    parser.add_argument("--root", type=Path, help="of the data's files, if they are not where their package puts them")
    parser.add_argument("--networks", nargs="+", metavar="NETWORK", help="some of the data's")
    parser.add_argument("--bits", nargs="+", choices=list(BITS), metavar="BITS", help="some of the network's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--float-epochs", type=int, help="other than the network's settings")
    parser.add_argument("--tuning-epochs", type=int, help="other than the network's settings")
    parser.add_argument("--folder", type=Path, default=Path("outputs/accuracy"), help="of rows and checkpoints")
    parser.add_argument("--threads", type=int, default=1, help="of training and of the compiled network")
    parser.add_argument("--smallest", action="store_true", help="one epoch, of glyphs a few images: does it run?")
    options = parser.parse_args(arguments)
    check_positive(parser, options, "threads", "float-epochs", "tuning-epochs")
    known = SETTINGS[options.data]
    networks = options.networks or list(known)
    for network in networks:
        if network not in known:
            parser.error(f"--networks {network}: {options.data} has {', '.join(known)}")
        for bits in options.bits or ():
            if bits not in known[network].tuning:
                parser.error(f"--bits {bits}: {network} on {options.data} has {', '.join(known[network].tuning)}")
    torch.set_num_threads(options.threads)
    console = console_of(170)
    shortest = 1 if options.smallest else None
    rows, found = Rows(options.folder / "rows.jsonl"), []
    sizes = SMALLEST if options.smallest else Sizes()
    wanted = [(n, seed, bits) for n in networks for seed in options.seeds for bits in options.bits or known[n].tuning]
    for network, seed, bits in wanted:
        settings = known[network].with_epochs(options.float_epochs or shortest, options.tuning_epochs or shortest)
        settings = last_settings(options.data, settings, seed)
        request = Request(options.data, network, bits, seed, sizes, settings, options.root)
        row = find_row(rows, request)
        if row is None:
            console.print(f"{network} {bits} seed {seed}")
            row = measure_row(request, options.folder, options.threads, console.print)
            rows.append(row)
        found.append(row)
    console.print(row_table(found), mean_table(found))
    broken = sum(bool(failures(row)) for row in found)
    all_hold = f"all {len(found)} rows hold the limits"
    console.print(f"{broken} of {len(found)} rows break a limit" if broken else all_hold)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
