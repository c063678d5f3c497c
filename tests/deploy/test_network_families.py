"""Whole networks of every family with random mixed bits: what is compiled equals the interpreter on every element."""

from __future__ import annotations

import pytest
import torch
from small_graphs import TILES

import lightning_baqe as baqe
from lightning_baqe.engines.zoo import calibrated, random_bits, settled_network

FAMILIES = [
    ("torchvision", "resnet18", 64),
    ("torchvision", "resnext50_32x4d", 64),
    ("torchvision", "wide_resnet50_2", 64),
    ("torchvision", "vgg11_bn", 64),
    ("torchvision", "mobilenet_v2", 64),
    ("torchvision", "mobilenet_v3_small", 64),
    ("torchvision", "mobilenet_v3_large", 64),
    ("torchvision", "efficientnet_b0", 64),
    ("torchvision", "mnasnet0_5", 64),
    ("torchvision", "regnet_x_400mf", 64),
    ("torchvision", "regnet_y_400mf", 64),
    ("torchvision", "densenet121", 64),
    ("torchvision", "inception_v3", 96),
    ("torchvision", "googlenet", 64),
    ("torchvision", "squeezenet1_0", 64),
    ("torchvision", "shufflenet_v2_x1_0", 64),
    ("timm", "resnet26d", 64),
    ("timm", "efficientnet_lite0", 64),
    ("timm", "tf_efficientnet_lite0", 64),
    ("timm", "mobilenetv2_100", 64),
    ("timm", "mobilenetv3_small_050", 64),
]
FULL_SIZE = [
    ("torchvision", "resnet18", 224),
    ("torchvision", "resnet50", 224),
    ("timm", "mobilenetv2_100", 224),
    ("torchvision", "inception_v3", 299),
]


def assert_equal(library: str, name: str, size: int, seed: int, classes: int, target: str = "native") -> None:
    module, images = settled_network(name, library, size, seed, classes)
    assert images.shape[-1] == size
    graph = baqe.lower(calibrated(module, random_bits(module, seed), images))
    assert graph.is_integer_only
    artifact = baqe.build(graph, target, schedules="default")
    assert not {node: count for node, count in baqe.verify(artifact, images[:1]).items() if count}
    assert torch.equal(artifact.run(images[:2]), graph.run(images[:2]))


@pytest.mark.parametrize(("library", "name", "size"), [("torchvision", "shufflenet_v2_x0_5", 32)])
def test_a_small_one(library: str, name: str, size: int) -> None:
    assert_equal(library, name, size, seed=1, classes=10)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name", "size"), FAMILIES)
def test_every_family(library: str, name: str, size: int) -> None:
    assert_equal(library, name, size, seed=2, classes=10)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name", "size"), FAMILIES)
def test_every_family_on_tiles(library: str, name: str, size: int) -> None:
    assert_equal(library, name, size, seed=4, classes=10, target=TILES)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name", "size"), FULL_SIZE)
def test_full_size(library: str, name: str, size: int) -> None:
    assert_equal(library, name, size, seed=3, classes=1000)
