"""Accuracy of many bit-configs, each tuned and deployed as a trial of ``recipe=qat_search data=glyphs`` is, with the
options :data:`OPTIONS`.

A trial's network starts from the float weights, is calibrated on the first batches, tuned for :attr:`Trial.steps` steps
and lowered; its kernels are compiled and classify the validation split. What differs from a search: kernels have their
default knobs and are shared between bit-configs, since no result depends on knobs, and nothing is measured; each
bit-config has a Trainer of its own, whose order of images follows from the row's number, as it would from a trial's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_baqe.benchmarks.accuracy import SETTINGS
from lightning_baqe.benchmarks.accuracy_rows import Request, Say, Sizes, float_task, quiet_trainer
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.data import GlyphsDataModule
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import BuildError
from lightning_baqe.files import Rows
from lightning_baqe.hardware.identity import device_info, versions
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.lowering import lower
from lightning_baqe.landscapes.latency_tables import WIDTHS, searched_layers, with_bits
from lightning_baqe.measurement.profile import KernelProfile
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.tasks import ImageClassifier, fit_to_checkpoint
from lightning_baqe.tuning.network_space import NetworkSpace

OPTIONS = (
    *("model=resnet18", "pretrain.learning_rate=2e-3"),
    *("task.learning_rate=1e-4", "search.steps_per_trial=30"),
)
REPEATED = (4, 6, 8)  # uniform bits that are tuned again, in other orders: the spread of equal trials
REPEATS = 3
REPEATED_AT = 40  # rows before them


@dataclass(frozen=True)
class Trial:
    """What a trial of the recipe does with a bit-config; a test compares it with the recipe.

    Args:
        steps: of tuning, with ``batch_size`` images each.
        train_size, val_size: images.
        learning_rate, weight_decay: of AdamW.
        calibration_batches: whose ranges the quantizers start from.
        activation_range: how.
        float_sizes: images that the float network is trained on; those of the accuracy benchmark.
    """

    steps: int = 30
    batch_size: int = 64
    train_size: int = 8000
    val_size: int = 2000
    test_size: int = 10000
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    calibration_batches: int = 8
    activation_range: str = "mse"
    float_sizes: Sizes = field(default_factory=Sizes)

    def data(self) -> GlyphsDataModule:
        """The images of every trial."""
        return GlyphsDataModule(self.train_size, self.val_size, self.test_size, self.batch_size, 0, cache=True)


def float_network(name: str, trial: Trial, checkpoint: Path, say: Say) -> nn.Module:
    """The network that all trials start from, trained as the accuracy benchmark trains it, or read.

    Args:
        name: torchvision's; one that :data:`~lightning_baqe.benchmarks.accuracy.SETTINGS` knows for glyphs.
        trial: whose ``float_sizes`` count.
        checkpoint: of the training; read if it exists.
    """
    settings, sizes = SETTINGS["glyphs"][name], trial.float_sizes
    data, task = float_task(Request("glyphs", name, "w8a8", 0, sizes, settings))
    if not checkpoint.exists():
        say(f"training {name} in float, {settings.float_training.epochs} epochs of {sizes.train} images")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    fit_to_checkpoint(task, data, checkpoint, settings.float_training.epochs, quiet_trainer)
    return task.net.to(memory_format=torch.contiguous_format).eval()


def bit_configs(base: BitConfig, n: int) -> list[dict[str, int]]:
    """So many different bits to train: the uniform ones, then as a search's pool has them; more begin with the same."""
    layers = searched_layers(base)
    space = NetworkSpace(base, dict.fromkeys(layers, WIDTHS), {}, {})
    uniform = [dict.fromkeys(layers, width) for width in reversed(WIDTHS)]
    pool = space.candidates(2 * n, np.random.default_rng(0))
    drawn = [{layer: point[f"{layer}/bits"] for layer in layers} for point in pool]
    return (uniform + [bits for bits in drawn if bits not in uniform])[:n]


def wanted_rows(base: BitConfig, n: int) -> list[tuple[int, dict[str, int]]]:
    """``(number, bits)`` of all rows, a few bit-configs repeated; the number draws the order of the images."""
    first = list(enumerate(bit_configs(base, n)))
    again = [dict.fromkeys(searched_layers(base), width) for width in REPEATED for _ in range(REPEATS)]
    repeats = list(enumerate(again, 1_000_000))
    return first[:REPEATED_AT] + repeats + first[REPEATED_AT:]


def deployed_accuracy(
    run: Callable[[np.ndarray], np.ndarray], graph: IntegerGraph, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """Top-1 accuracy of a deployed network, 0..1.

    Raises:
        BuildError: the logits of the first image differ from the graph's, and it has no float layers.
    """
    right = total = 0
    for x, y in batches:
        logits = np.concatenate([run(image[None].numpy()) for image in x])
        # Of float layers the last bits may differ, and with them an integer that is rounded from there.
        if not total and graph.is_integer_only and not np.array_equal(logits[:1], graph.run(x[:1]).numpy()):
            raise BuildError("the compiled network differs from its integer graph; please report it with its bits")
        right += int((torch.from_numpy(logits).argmax(1) == y).sum())
        total += len(y)
    return right / total


def measure_bits(
    net: nn.Module, bits: BitConfig, number: int, trial: Trial, data: GlyphsDataModule, compiled: dict[str, Any]
) -> dict[str, Any]:
    """Tune and deploy one bit-config.

    Args:
        net: the float network, left as it is.
        bits: of all layers.
        number: of the row; draws the order of the images and what dropout drops.
        data: the images, ``setup`` for fitting.
        compiled: kernels so far, for :class:`~lightning_baqe.measurement.profile.KernelProfile`; new ones are added.

    Returns:
        ``{"accuracy": deployed, 0..1, "size_bytes", "seconds": {"train", "build", "evaluate"}}``.
    """
    started = time.perf_counter()
    pl.seed_everything(number, verbose=False)
    task = ImageClassifier(copy.deepcopy(net), data.num_classes, trial.learning_rate, trial.weight_decay)
    quantized: QuantizedModel = task.quantize(bits, data.example_input, activation_range=trial.activation_range)
    calibrate(quantized, [x for x, _ in islice(data.train_dataloader(), trial.calibration_batches)])
    task.train()
    order = torch.Generator().manual_seed(number)
    loader = torch.utils.data.DataLoader(
        data.dataset("train"), trial.batch_size, shuffle=True, drop_last=True, generator=order
    )
    trainer = quiet_trainer(
        max_epochs=1, limit_train_batches=trial.steps, limit_val_batches=0, enable_checkpointing=False
    )
    trainer.fit(task, loader, data.val_dataloader())
    tuned = time.perf_counter()
    graph = lower(quantized)
    plan = make_plan(graph, BuildOptions(get_target("native")))
    run = KernelProfile(plan, graph.input_shape, compiled).run
    built = time.perf_counter()
    accuracy = deployed_accuracy(run, graph, data.val_dataloader())
    seconds = {"train": tuned - started, "build": built - tuned, "evaluate": time.perf_counter() - built}
    return {"accuracy": accuracy, "size_bytes": graph.size_bytes, "seconds": seconds}


def row_key(name: str, trial: Trial) -> dict[str, Any]:
    """All that a row depends on, but for its bits, its number, the machine and the code."""
    return {"network": name, "trial": asdict(trial), "float_training": SETTINGS["glyphs"][name].float_training.key()}


def measure_rows(
    name: str, n: int, folder: Path, trial: Trial, share: tuple[int, int] = (0, 1), say: Say = print
) -> Iterator[int]:
    """Measure the rows that are missing; each is on the disk before the next begins.

    Args:
        name: of the network.
        n: different bit-configs.
        folder: with ``rows.jsonl`` and ``float.ckpt``.
        share: ``(k, m)``: every m-th of the rows, from the k-th on, for processes that share a folder.

    Yields:
        how many rows of this share are left, first before anything is measured.
    """
    rows, key = Rows(folder / "rows.jsonl"), row_key(name, trial)
    net = float_network(name, trial, folder / "float.ckpt", say)
    base = BitConfig.uniform(net, 8, 8)
    done = {row["number"] for row in rows.of(key)}
    left = [row for row in wanted_rows(base, n)[share[0] :: share[1]] if row[0] not in done]
    yield len(left)
    data = trial.data()
    compiled: dict[str, Any] = {}
    data.prepare_data()
    data.setup("fit")
    for index, (number, bits) in enumerate(left):
        found = measure_bits(net, with_bits(base, bits), number, trial, data, compiled)
        about = {"device": device_info(1), "versions": versions(), "key": key}
        rows.append({"number": number, "bits": bits, **found, **about})
        yield len(left) - index - 1
