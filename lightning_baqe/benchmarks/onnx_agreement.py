"""Do exported networks answer as ours do? ``python -m lightning_baqe.benchmarks.onnx_agreement``.

Networks trained on ``glyphs`` are quantized to W8A8, calibrated, lowered, compiled, and exported to ONNX; on images of
the test split the compiled network is compared with the ONNX model. ONNX has int32 biases alone, and so has the graph
that is compiled here (``IntegerGraph.with_int32_biases``); what that changes has a row of its own:

| engine | |
| --- | --- |
| ours, whole biases | the graph as ``lower`` makes it, which keeps what rounding took from a bias; for information |
| ONNX Runtime, exact | ``session.x64quantprecision``: no saturating sums; held to the limits |
| ONNX Runtime | default session, for information |
| OpenVINO | for information, where it is installed |

The limits: the same class on 99 % of the images, a cosine of the logits of 0.999 on the mean and on the worst image.
Exit status 1 if one is missed.

Float weights come from a checkpoint of :mod:`lightning_baqe.benchmarks.accuracy` if its folder has one of the network,
else from a short training whose checkpoint is kept. inception_v3 sees the images enlarged to 75x75, the least that it
takes; it has no residual connections and no auxiliary classifier fits so small an image, and from random weights it
does not find out within minutes that colours do not matter: it starts on images without (:func:`without_colours`).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from rich.table import Table
from torch import nn
from torch.nn import functional

from lightning_baqe.benchmarks.setups import INSTALL, check_positive, console_of, parser_of, table_of
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.data import GlyphsDataModule
from lightning_baqe.data.base import ImageTensorDataset, Split
from lightning_baqe.deploy.verify import verify
from lightning_baqe.engines.engine_process import missing_packages
from lightning_baqe.engines.peers import onnxruntime_session
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.errors import BuildError
from lightning_baqe.hardware.identity import digest
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.lowering import lower
from lightning_baqe.measurement.build import build
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.tasks import ImageClassifier, network, pretrain

SAME_CLASS, COSINE = 0.99, 0.999
EXACT, DEFAULT, OPENVINO = "ONNX Runtime, exact", "ONNX Runtime", "OpenVINO"
WHOLE = "ours, whole biases"
CALIBRATION_BATCHES = 8
Data = Callable[[bool], GlyphsDataModule]


@dataclass(frozen=True)
class Training:
    """The short training of a network that no checkpoint is there for.

    Args:
        size: of the square image.
        images: of the training split.
        colourless_epochs: of training on images without colours, before.
    """

    size: int = 32
    images: int = 8000
    batch_size: int = 64
    epochs: int = 4
    learning_rate: float = 3e-3
    colourless_epochs: int = 0


TRAININGS = {
    "resnet18": Training(),
    "mobilenet_v2": Training(epochs=5, learning_rate=4e-3),
    "inception_v3": Training(size=75, batch_size=32, epochs=6, learning_rate=1e-3, colourless_epochs=2),
}
SMALLEST = Training(size=32, images=32, batch_size=16, epochs=1)


class EnlargedGlyphs(GlyphsDataModule):
    """``glyphs`` with the images interpolated bilinearly to this size; ``colours=False``: :func:`without_colours`."""

    def __init__(self, size: int, colours: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.input_shape = (3, size, size)
        self.colours = colours

    def make_split(self, split: Split) -> ImageTensorDataset:
        """The enlarged images and labels of one split."""
        made = super().make_split(split)
        images = made.images if self.colours else without_colours(made.images)
        if images.shape[1:] != self.input_shape:
            enlarge = partial(functional.interpolate, size=self.input_shape[1:], mode="bilinear")
            images = torch.cat([enlarge(part.float()).round().to(torch.uint8) for part in images.split(500)])
        return ImageTensorDataset(images, made.labels, self.mean, self.std)


def without_colours(images: torch.Tensor) -> torch.Tensor:
    """What differs from the background, bright on dark, for images ``(n, 3, h, w)`` uint8."""
    grey = images.float().mean(1, keepdim=True)
    border = torch.cat([grey[..., :2, :].flatten(1), grey[..., -2:, :].flatten(1)], 1).median(1).values
    contrast = (grey - border.view(-1, 1, 1, 1)).abs()
    scaled = contrast * (255 / contrast.amax((1, 2, 3), keepdim=True).clamp(min=1))
    return scaled.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


@dataclass(frozen=True)
class Row:
    """One engine against the compiled network.

    Args:
        same_class: share of images on which both answer the same, 0..1.
        cosine_mean, cosine_min: of the logits of one image.
        largest: difference of two logits.
        spread: standard deviation of all logits, to compare ``largest`` with.
        accuracy, own_accuracy: of the engine and of the compiled network, 0..1.
    """

    network: str
    engine: str
    same_class: float
    cosine_mean: float
    cosine_min: float
    largest: float
    spread: float
    accuracy: float
    own_accuracy: float

    @property
    def failures(self) -> list[str]:
        """The limits that are missed, in words."""
        found = []
        if self.same_class < SAME_CLASS:
            found.append(f"same class on {self.same_class:.2%}, {SAME_CLASS:.0%} wanted")
        for what, value in (("mean", self.cosine_mean), ("smallest", self.cosine_min)):
            if value < COSINE:
                found.append(f"{what} cosine {value:.5f}, {COSINE} wanted")
        return found


def compare(name: str, engine: str, own: np.ndarray, other: np.ndarray, labels: np.ndarray) -> Row:
    """Compare logits ``(images, classes)`` of the compiled network with those of an engine."""
    norms = np.linalg.norm(own, axis=1) * np.linalg.norm(other, axis=1)
    cosines = np.sum(own.astype(np.float64) * other, axis=1) / np.maximum(norms, 1e-30)
    classes = own.argmax(1), other.argmax(1)
    return Row(
        network=name,
        engine=engine,
        same_class=float((classes[0] == classes[1]).mean()),
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        largest=float(np.abs(own - other).max()),
        spread=float(own.std()),
        accuracy=float((classes[1] == labels).mean()),
        own_accuracy=float((classes[0] == labels).mean()),
    )


def float_network(name: str, training: Training, num_classes: int, own: Path, others: Path, data: Data) -> nn.Module:
    """The trained float network, in eval mode; its checkpoint is this benchmark's own or the accuracy benchmark's."""
    pl.seed_everything(0, verbose=False)
    net = network(name, num_classes)
    found = sorted(others.glob(f"glyphs-{name}-float-seed*.ckpt"), key=lambda path: path.stat().st_mtime)
    key = digest(asdict(training))[:8]
    kept = own / f"{name}-float-{key}.ckpt"
    checkpoint = found[-1] if found and training == TRAININGS[name] and not kept.exists() else kept
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    trainer = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False, enable_model_summary=False)
    task = ImageClassifier(net, num_classes)
    rate = training.learning_rate
    if training.colourless_epochs and not checkpoint.exists():
        first = own / f"{name}-colourless-{key}.ckpt"
        pretrain(task, data(False), first, training.colourless_epochs, rate, trainer=trainer)
    pretrain(task, data(True), checkpoint, training.epochs, rate, trainer=trainer)
    return net.eval()


def prepared(name: str, training: Training, own: Path, others: Path, images: int) -> tuple[IntegerGraph, Any, Any]:
    """The lowered W8A8 network with test images ``(n, 3, h, w)`` and their labels."""
    sizes = {"train_size": training.images, "val_size": min(500, training.images), "test_size": images}

    def of(colours: bool) -> EnlargedGlyphs:
        return EnlargedGlyphs(training.size, colours, batch_size=training.batch_size, **sizes)

    data = of(True)
    net = float_network(name, training, data.num_classes, own, others, of)
    quantized = quantize(net, BitConfig.uniform(net, 8, 8), example_input=data.example_input)
    calibrate(quantized, data.train_dataloader(), CALIBRATION_BATCHES)
    parts = list(data.test_dataloader())
    x, y = (torch.cat([part[i] for part in parts]).numpy() for i in (0, 1))
    return lower(quantized.eval()), x, y


def own_logits(graph: IntegerGraph, x: np.ndarray, threads: int) -> np.ndarray:
    """Logits of the compiled network.

    Raises:
        BuildError: it differs from its integer graph.
    """
    artifact = build(graph, schedules="default", threads=threads)
    wrong = {name: count for name, count in verify(artifact, torch.from_numpy(x[:1])).items() if count}
    if wrong:
        raise BuildError(f"the compiled network differs from its integer graph at {wrong}; please report it")
    return np.concatenate([artifact.run_array(image[None]).copy() for image in x])


def measure(name: str, graph: IntegerGraph, x: np.ndarray, y: np.ndarray, path: Path, threads: int) -> list[Row]:
    """All engines that are installed; ``graph`` has whole biases, ``path`` is its ONNX model."""
    own = own_logits(graph.with_int32_biases(), x, threads)
    parts = np.array_split(x, max(len(x) // 50, 1))
    logits = {WHOLE: [graph.run(torch.from_numpy(part)).numpy() for part in parts]}
    for engine, exact in ((EXACT, True), (DEFAULT, False)):
        session = onnxruntime_session(str(path), threads, exact)
        logits[engine] = [np.asarray(session.run(["logits"], {"input": part})[0]) for part in parts]
    if importlib.util.find_spec("openvino"):
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(path, "CPU", options)
        logits[OPENVINO] = [np.asarray(compiled([part])[0]) for part in parts]
    return [compare(name, engine, own, np.concatenate(found), y) for engine, found in logits.items()]


def table(rows: list[Row]) -> Table:
    """All rows."""
    headings = ("network", "engine", "same class", "cosine", "smallest", "largest difference", "of spread", "accuracy",
                "ours", "limits")  # fmt: skip
    cells = (
        (
            row.network, row.engine, f"{row.same_class:.2%}", f"{row.cosine_mean:.6f}", f"{row.cosine_min:.6f}",
            f"{row.largest:.4f}", f"{row.largest / row.spread:.1%}", f"{row.accuracy:.2%}", f"{row.own_accuracy:.2%}",
            ("; ".join(row.failures) or "hold") if row.engine == EXACT else "",
        )
        for row in rows
    )  # fmt: skip
    return table_of("compiled networks and their ONNX models, W8A8", headings, ("network", "engine", "limits"), cells)


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Returns:
        the exit status: 0 if every network holds the limits in ONNX Runtime's exact mode, else 1.
    """
    parser = parser_of(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(TRAININGS), choices=list(TRAININGS), metavar="NETWORK")
    parser.add_argument("--images", type=int, default=500, help="of the test split")
    parser.add_argument("--checkpoints", type=Path, default=Path("outputs/accuracy"), help="of the accuracy benchmark")
    parser.add_argument("--folder", type=Path, default=Path("outputs/onnx_agreement"), help="of what is written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--smallest", action="store_true", help="one epoch of a few images: does it run?")
    options = parser.parse_args(arguments)
    check_positive(parser, options, "images", "threads")
    missing = missing_packages("onnxruntime")
    if missing:
        parser.error(f"{', '.join(missing)} not installed; run `{INSTALL}`")
    torch.set_num_threads(options.threads)
    console = console_of(150)
    if not importlib.util.find_spec("openvino"):
        console.print(f"OpenVINO is left out: not installed; run `{INSTALL}`")
    rows: list[Row] = []
    for name in options.networks:
        training = SMALLEST if options.smallest else TRAININGS[name]
        graph, x, y = prepared(name, training, options.folder, options.checkpoints, options.images)
        path = graph.to_onnx(options.folder / f"{name}.onnx")
        rows += measure(name, graph, x, y, path, options.threads)
        console.print(table([row for row in rows if row.network == name]))
    if options.json is not None:
        options.json.write_text(json.dumps([{**asdict(row), "failures": row.failures} for row in rows], indent=1))
    return int(any(row.failures for row in rows if row.engine == EXACT))


if __name__ == "__main__":
    sys.exit(main())
