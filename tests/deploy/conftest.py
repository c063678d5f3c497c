"""Fixtures of the deployment tests: one mixed-precision ResNet-18."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torchvision

import lightning_baqe as baqe
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.integer.graph import IntegerGraph


def lowered(
    name: str, size: int, seed: int, classes: int = 10, floats: tuple[str, ...] = ()
) -> tuple[IntegerGraph, torch.Tensor]:
    """A torchvision network with random mixed bits, lowered, and images ``(2, 3, size, size)``."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    network = torchvision.models.get_model(name, weights=None, num_classes=classes)
    x = torch.randn(4, 3, size, size)
    network.train()
    with torch.no_grad():
        network(x)
    network.eval()
    layers = baqe.BitConfig.uniform(network)
    bits = baqe.BitConfig(
        {
            layer: baqe.LayerBits(32, 32) if layer in floats else baqe.LayerBits(rng.randint(2, 8), rng.randint(2, 8))
            for layer in layers
        }
    )
    quantized = baqe.quantize(network, bits, example_input=x)
    baqe.calibrate(quantized, [x])
    return baqe.lower(quantized.eval(), example_input=x[:1]), x[:2]


@pytest.fixture(scope="session")
def resnet() -> tuple[IntegerGraph, torch.Tensor]:
    """ResNet-18 with random bits at 32x32."""
    return lowered("resnet18", 32, seed=0)


@pytest.fixture(scope="session")
def resnet_artifact(resnet: tuple[IntegerGraph, torch.Tensor]) -> Artifact:
    """Its artifact with default schedules."""
    return baqe.build(resnet[0], schedules="default")


@pytest.fixture(scope="session")
def saved_resnet(resnet_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artifact's folder: copy it before you change it."""
    return resnet_artifact.save(tmp_path_factory.mktemp("artifacts") / "resnet")
