"""HAWQ-V3's Table I, its analytic columns: ``python -m lightning_baqe.benchmarks.analytic``.

Size and bit operations of ResNet18, ResNet50 and InceptionV3 at W32, W8A8 and W4A4 (first and last layer 8 bit), as our
integer graphs count them and as the paper prints them (Yao et al., "HAWQ-V3", Table I; 1 MB = 2^20 bytes there, one BOP
is one bit operation of section III-E, a float layer counts 32 x 32 for each multiply-accumulate).

How the countings differ: the paper's size is that of weights alone; ours adds what a device needs besides, int32
biases, the multipliers and shifts of requantization and what rounding took from biases. Both are printed. The paper's
ResNet50 has the stride of a stage in its first 1x1 convolution (v1); torchvision's, in the 3x3 (v1.5), has 6 % more
multiply-accumulates, so that v1 is made of it here. The paper prints figures truncated, not rounded.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import nn

from lightning_baqe.benchmarks.setups import console_of, parser_of, table_of
from lightning_baqe.engines.zoo import calibrated
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.lowering import lower
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.tasks.networks import network

TOLERANCE = 0.02
WIDTHS = {"W32": 32, "W8A8": 8, "W4A4": 4}
IMAGE = {"resnet18": 224, "resnet50": 224, "inception_v3": 299}
# (MB, GBOPs) by network and width.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "resnet18": {"W32": (44.6, 1858), "W8A8": (11.1, 116), "W4A4": (5.8, 34)},
    "resnet50": {"W32": (97.8, 3951), "W8A8": (24.5, 247), "W4A4": (13.1, 67)},
    "inception_v3": {"W32": (90.9, 5850), "W8A8": (22.7, 366), "W4A4": (12.3, 92)},
}


@dataclass(frozen=True)
class Row:
    """One network at one width; sizes in MB of 2^20 bytes, operations in units of 10^9."""

    network: str
    width: str
    size_mb: float
    weights_mb: float
    gbops: float

    @property
    def published(self) -> tuple[float, float]:
        return PUBLISHED[self.network][self.width]

    def fits(self) -> tuple[bool, bool]:
        """Whether the weights' size and the BOPs are within 2 % of the paper's, or equal once truncated."""
        size, gbops = self.published
        return (
            abs(self.weights_mb / size - 1) <= TOLERANCE or math.floor(self.weights_mb * 10) / 10 == size,
            abs(self.gbops / gbops - 1) <= TOLERANCE or math.floor(self.gbops) == gbops,
        )


def weights_bytes(graph: IntegerGraph) -> float:
    """Packed weights alone (and a float layer's bias, which the paper's parameter count holds), bytes."""
    total = 0.0
    for node in graph:
        if isinstance(node, ir.Conv | ir.Linear):
            total += node.weight.numel() * float(node.mean_weight_bits) / 8
        elif isinstance(node, ir.FloatConv | ir.FloatLinear):
            total += 4 * (node.weight.numel() + node.bias.numel())
    return total


def paper_network(name: str) -> nn.Module:
    """The paper's variant of a torchvision network, random weights, 1000 classes, eval mode."""
    torch.manual_seed(0)
    module = network(name, 1000)
    if name == "resnet50":  # v1: the stride is in a block's first convolution
        for block in module.modules():
            conv1, conv2 = getattr(block, "conv1", None), getattr(block, "conv2", None)
            if isinstance(conv1, nn.Conv2d) and isinstance(conv2, nn.Conv2d):
                conv1.stride, conv2.stride = conv2.stride, (1, 1)
    return module.eval()


def rows(name: str) -> list[Row]:
    """All widths of one network."""
    module = paper_network(name)
    image = torch.randn(1, 3, IMAGE[name], IMAGE[name], generator=torch.Generator().manual_seed(0))
    found = []
    for label, width in WIDTHS.items():
        # Not a function of the activations' bits: only the weights' and the geometry enter.
        graph = lower(calibrated(module, BitConfig.uniform(module, width, width), image))
        found.append(Row(name, label, graph.size_bytes / 2**20, weights_bytes(graph) / 2**20, graph.bops / 1e9))
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if a figure is out of reach of the paper's."""
    parser = parser_of(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    options = parser.parse_args(arguments)
    console = console_of(140)
    headings = ("network", "width", "paper MB", "weights MB", "all MB", "paper GBOPs", "GBOPs", "MB fits", "GBOPs fits")
    found = [row for name in options.networks for row in rows(name)]
    cells = []
    for row in found:
        size, gbops = row.published
        sizes = (size, f"{row.weights_mb:.2f}", f"{row.size_mb:.2f}")
        verdicts = ("yes" if fits else "NO" for fits in row.fits())
        cells.append((row.network, row.width, *sizes, f"{gbops:.0f}", f"{row.gbops:.1f}", *verdicts))
    title = "HAWQ-V3, Table I: size (MB = 2^20 bytes) and BOPs (10^9)"
    console.print(table_of(title, headings, ("network", "width"), cells))
    console.print(__doc__.split("\n\n")[2].replace("\n", " "), soft_wrap=True)
    return int(not all(all(row.fits()) for row in found))


if __name__ == "__main__":
    sys.exit(main())
