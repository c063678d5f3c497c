"""Networks with random weights that behave like trained ones as far as lowering can tell, and random bit-configs."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn

from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.engines.requests import INPUT, OUTPUT, EngineRequest
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.config import BitConfig, LayerBits
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.tasks.networks import network, settle

BATCH = 4
CLASSES = 1000
SIZES = (64, 96, 128, 160, 224, 256)


def settled_network(
    name: str, library: str = "torchvision", size: int = 64, seed: int = 0, num_classes: int = 10
) -> tuple[nn.Module, torch.Tensor]:
    """A network with random weights whose batch norms have seen data, in eval mode.

    Args:
        name, library: see :func:`lightning_baqe.tasks.network`.
        size: of the image; where the network does not run on it, the next that it runs on.
        seed: of weights and images.

    Returns:
        the network and images ``(4, 3, size, size)``.

    Raises:
        ConfigError: no such network, or no size fits.
    """
    torch.manual_seed(seed)
    return settled(network(name, num_classes, library), size, default_size(name))


def settled(module: nn.Module, size: int = 64, last_size: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """As :func:`settled_network`, of a network of one's own.

    Args:
        module: changed in place.
        size: of the image; where the network does not run on it, the next of :data:`SIZES` that it runs on.
        last_size: tried after these; 0 for none.
    """
    failure: ConfigError | None = None
    for candidate in (size, *(larger for larger in SIZES if larger > size), *((last_size,) if last_size else ())):
        images = torch.randn(BATCH, 3, candidate, candidate)
        try:
            return settle(module, images), images
        except ConfigError as error:
            failure = failure or error
    raise ConfigError(
        f"{type(module).__name__} runs on no image of {size} to {SIZES[-1]} pixels: {failure}"
    ) from failure


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


def library_of(name: str) -> str:
    """``"torchvision"`` if it knows the name, else ``"timm"``."""
    return "torchvision" if name in torchvision.models.list_models(module=torchvision.models) else "timm"


def default_size(name: str) -> int:
    """The image size, in pixels, that the library's own weights of a network are evaluated at; 224 without weights."""
    if library_of(name) == "torchvision":
        weights = next(iter(torchvision.models.get_model_weights(name)), None)
        return 224 if weights is None else int(weights.transforms().crop_size[0])
    import timm

    config = timm.get_pretrained_cfg(name)
    return 224 if config is None else int(config.input_size[-1])


def bare_network(name: str) -> nn.Module:
    """The network as the library builds it, without auxiliary classifiers; ConfigError where neither library has it."""
    return network(name, CLASSES, library_of(name))


def random_network(name: str, size: int, seed: int = 0) -> nn.Module:
    """A network with seeded random weights and batch-norm statistics of random images, in eval mode."""
    torch.manual_seed(seed)
    module = bare_network(name).train()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the mean of all batches, without the initial statistics
    with torch.no_grad():
        for _ in range(2):
            module(torch.randn(4, 3, size, size))
    return module.eval()


def load_network(request: EngineRequest) -> nn.Module:
    """The network of a request, with its weights, in eval mode."""
    module = bare_network(request.model)
    module.load_state_dict(torch.load(request.weights, weights_only=True))
    return module.eval()


def export_onnx(module: nn.Module, path: Path, size: int) -> None:
    """Write the float network for the engines that read ONNX: input ``x``, output ``y``, batch 1."""
    with warnings.catch_warnings():  # the exporter that needs no further package is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            module, (torch.zeros(1, 3, size, size),), str(path), dynamo=False,
            input_names=[INPUT], output_names=[OUTPUT], opset_version=17,
        )  # fmt: skip
