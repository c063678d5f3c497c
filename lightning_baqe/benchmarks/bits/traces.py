"""Hessian traces of ResNet-18 at 224x224: how many probes, how long, and ModelOpt's scores beside.

    python -m lightning_baqe.benchmarks.bits.traces

The network is trained first, which is kept in the folder: on glyphs enlarged to 64, 128 and 224 pixels. The traces are
taken on 32 of the last images, until the standard error over probes of every layer is at most 5 % of the larger of its
trace and 1 % of the largest trace. Wanted: that in 300 s on two cores, and the scores of ModelOpt's kind, at 4 and 8
bits, in 30 s.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_baqe.allocation.evidence import Evidence
from lightning_baqe.allocation.fisher import OutputFisher
from lightning_baqe.allocation.hessian import FLOOR, hessian_trace
from lightning_baqe.benchmarks.accuracy_rows import quiet_trainer
from lightning_baqe.benchmarks.setups import check_positive, console_of, parser_of, table_of
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.data import GlyphsDataModule
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.hardware.target import cpu_name
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.tasks import ImageClassifier, fit_to_checkpoint, network
from lightning_baqe.tasks.classifier import loss_of

TOLERANCE, HESSIAN_S, SCORES_S = 0.05, 300.0, 30.0
STAGES = ((64, 8000, 6, 2e-3), (128, 4000, 2, 1e-3), (224, 2000, 2, 1e-3))  # pixels, images, epochs, rate


class _Enlarged(nn.Module):
    """A network that sees its images at another size."""

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(enlarged(x, self.size))
        return found


def enlarged(x: Tensor, size: int) -> Tensor:
    """Images ``(n, 3, h, w)`` as ``(n, 3, size, size)``."""
    return nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)


def trained(folder: Path, scale: int = 1) -> tuple[nn.Module, float]:
    """ResNet-18 and its validation accuracy at the last size; what the folder has is not trained again.

    Args:
        folder: keeps checkpoints.
        scale: divides images and epochs: does it run?
    """
    pl.seed_everything(0, verbose=False)
    net, accuracy = network("resnet18", 62).to(memory_format=torch.channels_last), 0.0
    for size, images, epochs, rate in STAGES:
        data = GlyphsDataModule(images // scale, 500 // scale, 10, min(32, images // scale), seed=0)
        task = ImageClassifier(_Enlarged(net, size), 62, rate, 0.05, scheduler="onecycle")
        kept = folder / f"resnet18-{size}-{scale}.ckpt"
        fit_to_checkpoint(task, data, kept, max(1, epochs // scale), quiet_trainer)
        (found,) = quiet_trainer().validate(task, data, verbose=False)
        accuracy = found["val/acc"]
    return net.eval(), accuracy


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Returns:
        0 if every trace is known in time and the scores are, else 1.
    """
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("outputs/traces"), help="of the trained network")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--samples", type=int, default=500, help="probes at most")
    parser.add_argument("--chunk", type=int, default=4, help="images at once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smallest", action="store_true", help="hardly trained, at 64 pixels: does it run?")
    options = parser.parse_args(arguments)
    check_positive(parser, options, "images", "samples", "chunk", "threads")
    console = console_of(120)
    torch.set_num_threads(options.threads)
    net, accuracy = trained(options.folder, 100 if options.smallest else 1)
    size = 64 if options.smallest else STAGES[-1][0]
    console.print(f"trained: {accuracy:.1%} of validation images of {STAGES[-1][0]} pixels")
    batch_x, batch_y = next(
        iter(GlyphsDataModule(options.images, 1, 1, batch_size=options.images, seed=1).train_dataloader())
    )
    batches = [(enlarged(batch_x, size), batch_y)]
    start = time.perf_counter()

    def tell(done: int, most: int) -> None:
        console.print(f"{done} of at most {most} probes, {time.perf_counter() - start:.0f} s")

    found = hessian_trace(net, loss_of, batches, options.samples, tolerance=TOLERANCE, chunk=options.chunk, tell=tell)
    hessian_s = time.perf_counter() - start
    floor = FLOOR * max(abs(value) * found.counts[name] for name, value in found.items())
    rows = []
    for name, value in found.items():
        total, error = value * found.counts[name], found.standard_errors[name] * found.counts[name]
        rows.append([name, f"{total:.4g}", f"{value:.3g}", f"{error / max(abs(total), floor):.1%}"])
    title = (
        f"{options.images} images, {found.samples} probes, {hessian_s:.0f} s, {options.threads} threads of {cpu_name()}"
    )
    console.print(table_of(title, ("layer", "trace", "over its weights", "standard error"), ("layer",), rows))
    models: dict[int, QuantizedModel | None] = {
        bits: calibrate(quantize(net, BitConfig.uniform(net, bits, bits), batches[0][0][:2]), [batches[0][0]]).eval()
        for bits in (4, 8)
    }
    evidence = Evidence(models, batches, loss_of)
    start = time.perf_counter()
    OutputFisher().measure(evidence)
    scores_s = time.perf_counter() - start
    console.print(f"ModelOpt's scores of the same images at 4 and 8 bits: {scores_s:.1f} s")
    unsure = found.unsure(TOLERANCE)
    if unsure:
        console.print(f"not known to {TOLERANCE:.0%} after {found.samples} probes: {', '.join(unsure)}")
    return int(bool(unsure) or hessian_s > HESSIAN_S or scores_s > SCORES_S)


if __name__ == "__main__":
    sys.exit(main())
