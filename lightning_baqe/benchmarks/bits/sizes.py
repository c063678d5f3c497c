"""Sizes of networks before they are quantized, as Schaefer et al. count them in Table 1: weights and activations.

    python -m lightning_baqe.benchmarks.bits.sizes

A network is made as for learning bits, at 224x224; what its quantizers count is what a target limits. The published
sizes are those of 2 bytes a value with the batch norms' parameters, and without the image, which no layer makes.
Layers' inputs are also counted at the modules of the float network, where padding is not yet in them: networks that
came from TensorFlow pad unevenly, outside of their convolutions, and the zeros are then read through a quantizer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lightning_baqe.benchmarks.setups import check_positive, console_of, parser_of, table_of
from lightning_baqe.entrance.admission import admit
from lightning_baqe.learned_bits.learned_network import learn_bits
from lightning_baqe.tasks import network

PUBLISHED_MB = {("timm", "tf_efficientnet_lite0"): 22.66, ("torchvision", "mobilenet_v2"): 20.25}
OTHERS = (("torchvision", "resnet18"),)
TOLERANCE = 0.02
_BYTES = 2  # of bfloat16


@dataclass(frozen=True)
class Sizes:
    """Values of a network for one image.

    Attributes:
        weights: of layers.
        inputs: of layers, as their quantizers read them; what several read once.
        unpadded: the same, as the float network's modules get them.
        image: of the network's input, which is the first layer's.
        norms: gains and shifts.
    """

    weights: int
    inputs: int
    unpadded: int
    image: int
    norms: int

    @property
    def megabytes(self) -> float:
        """As published, 10^6 bytes."""
        return _BYTES * (self.weights + self.unpadded - self.image + self.norms) / 1e6


def sizes_of(net: nn.Module, side: int) -> Sizes:
    """Of a network of images of ``side`` pixels."""
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    weights, inputs = learn_bits(admit(net, x), [x], 8).bytes_of(8)
    norms = sum(p.numel() for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    return Sizes(int(weights), int(inputs), _at_modules(net, x), x.numel(), norms)


@torch.no_grad()
def _at_modules(net: nn.Module, x: torch.Tensor) -> int:
    """Inputs of all layers, each tensor once, counted where the modules of the float network are called."""
    seen: dict[int, torch.Tensor] = {}  # holds them, so that no address is given twice

    def see(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[id(inputs[0])] = inputs[0]

    handles = [m.register_forward_pre_hook(see) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        net.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
    return sum(tensor.numel() for tensor in seen.values())


def measure(side: int) -> Iterator[tuple[str, Sizes, float | None]]:
    """Each network's sizes, and the published one at 224."""
    for library, name in (*PUBLISHED_MB, *OTHERS):
        published = PUBLISHED_MB.get((library, name)) if side == 224 else None
        yield name, sizes_of(network(name, 1000, library=library).eval(), side), published


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 if every size is within 2 % of the published one, else 1."""
    parser = parser_of(__doc__)
    parser.add_argument("--side", type=int, default=224, help="of the image, pixels")
    options = parser.parse_args(arguments)
    check_positive(parser, options, "side")
    rows, off = [], 0
    for name, sizes, published in measure(options.side):
        difference = math.nan if published is None else sizes.megabytes / published - 1
        off += published is not None and abs(difference) > TOLERANCE
        rows.append([
            name, f"{sizes.weights:,}", f"{sizes.inputs:,}", f"{sizes.inputs - sizes.unpadded:,}", f"{sizes.image:,}",
            f"{sizes.norms:,}", f"{sizes.megabytes:.2f}", published or "", f"{difference:+.2%}" if published else "",
        ])  # fmt: skip
    headings = ("network", "weights", "layers' inputs", "of them padding", "the image", "batch norms", "MB",
                "published", "difference")  # fmt: skip
    title = (
        f"values for one image of {options.side}x{options.side}; MB: {_BYTES} bytes each, without the image and padding"
    )
    console_of(150).print(table_of(title, headings, ("network",), rows))
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
