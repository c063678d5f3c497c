"""Networks of one kind that are trained side by side: float, ours, and other projects' in their documented form."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.quantization.config import BitConfig

BITS = 4  # first and last layer 8
Make = Callable[[nn.Module, Tensor], nn.Module]


def float_network(seed: int = 0) -> nn.Module:
    """ResNet-18 of random weights."""
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=10)


def _float(net: nn.Module, x: Tensor) -> nn.Module:
    return copy.deepcopy(net).train()


def _ours(net: nn.Module, x: Tensor) -> nn.Module:
    model = quantize(net.eval(), BitConfig.uniform(net, BITS, BITS), x)
    return calibrate(model, [x]).train()


def _brevitas(net: nn.Module, x: Tensor) -> nn.Module:
    """As its own examples of quantization-aware training have it: learned scales, of weights by output channel; every
    ReLU and every sum is quantized, the network's input at 8 bits.
    """
    from brevitas import nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    weights = Int8WeightPerChannelFloat.let(scaling_impl_type="parameter_from_stats")
    model: Any = copy.deepcopy(net)
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for name in convs:
        old, bits = model.get_submodule(name), 8 if name == convs[0] else BITS
        new = qnn.QuantConv2d(
            old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False,
            weight_quant=weights, weight_bit_width=bits,
        )  # fmt: skip
        _swap(model, name, new)
    for name in [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]:
        _swap(model, name, qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=BITS))
    model.fc = qnn.QuantLinear(512, 10, True, weight_quant=Int8WeightPerChannelFloat, weight_bit_width=8)
    return nn.Sequential(qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat, bit_width=8), model).train()


def _swap(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent).add_module(leaf, new)


CANDIDATES: dict[str, tuple[Make, bool]] = {
    "float": (_float, False),
    "float, compiled": (_float, True),
    "ours": (_ours, False),
    "ours, compiled": (_ours, True),
    "Brevitas": (_brevitas, False),
}


def available() -> list[str]:
    """Those whose packages are installed."""
    missing = importlib.util.find_spec("brevitas") is None
    return [name for name in CANDIDATES if not (missing and name.startswith("Brevitas"))]


class Trainee:
    """One candidate, and a step of its training.

    Args:
        name: of :data:`CANDIDATES`.
        batch, side: images, pixels.
        device: that it trains on.
        channels_last: the memory format of images and weights.
    """

    def __init__(self, name: str, batch: int, side: int, device: torch.device, channels_last: bool) -> None:
        make, compiled = CANDIDATES[name]
        layout = torch.channels_last if channels_last else torch.contiguous_format
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, 3, side, side, generator=generator).to(device).contiguous(memory_format=layout)
        self.y = torch.randint(10, (batch,), generator=generator).to(device)
        model = make(float_network(), self.x.cpu()).to(device).to(memory_format=layout)
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        self.forward = torch.compile(model) if compiled else model
        self.device = device

    def step(self) -> float:
        """Forward, backward, update; the loss."""
        loss = nn.functional.cross_entropy(self.forward(self.x), self.y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()  # waits for the device
