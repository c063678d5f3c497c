"""Networks with random weights that behave like trained ones as far as lowering can tell, and random bit-configs."""

from __future__ import annotations

import random

import torch
from torch import nn

from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.calibration import calibrate
from lightning_baqe.quantization.config import BitConfig, LayerBits
from lightning_baqe.quantization.convert import QuantizedModel, quantize
from lightning_baqe.tasks.networks import network

BATCH = 4
SIZES = (64, 96, 128, 224, 256)


def settled_network(
    name: str, library: str = "torchvision", size: int = 64, seed: int = 0, num_classes: int = 10
) -> tuple[nn.Module, torch.Tensor]:
    """A network with random weights whose batch norms have seen data, in eval mode.

    Args:
        name, library: see :func:`lightning_baqe.tasks.network`.
        size: of the image; where the network does not run on it, the next of :data:`SIZES` that it runs on.
        seed: of weights and images.

    Returns:
        the network and images ``(4, 3, size, size)``.

    Raises:
        ConfigError: no such network, or no size fits.
    """
    torch.manual_seed(seed)
    module = network(name, num_classes, library)
    module.train()
    failure: Exception | None = None
    for candidate in (size, *(larger for larger in SIZES if larger > size)):
        images = torch.randn(BATCH, 3, candidate, candidate)
        try:
            with torch.no_grad():
                module(images)
                return module.eval(), images
        except (RuntimeError, AssertionError, ValueError) as error:  # torch's and timm's complaints about sizes
            failure = failure or error
    raise ConfigError(f"{name} runs on no image of {size} to {SIZES[-1]} pixels: {failure}") from failure


def random_bits(module: nn.Module, seed: int, low: int = 2, high: int = 8) -> BitConfig:
    """Each layer's weights and input at random bits."""
    rng = random.Random(seed)
    return BitConfig(
        {layer: LayerBits(rng.randint(low, high), rng.randint(low, high)) for layer in BitConfig.uniform(module)}
    )


def calibrated(module: nn.Module, bits: BitConfig, images: torch.Tensor) -> QuantizedModel:
    """The fake-quantized network, calibrated on the images."""
    quantized = quantize(module, bits, example_input=images).eval()
    return calibrate(quantized, [images])
