"""Networks by name."""

from __future__ import annotations

import pytest
import torch

from lightning_baqe.errors import ConfigError
from lightning_baqe.tasks import network


@pytest.mark.parametrize(
    ("name", "library"),
    [("resnet18", "torchvision"), ("mobilenet_v2", "torchvision"), ("resnet10t", "timm"), ("resnet14", "small")],
)
def test_number_of_classes(name: str, library: str) -> None:
    net = network(name, 7, library).eval()
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_zero_init_residual() -> None:
    assert not network("resnet18", 2, zero_init_residual=True).layer1[0].bn2.weight.any()  # type: ignore[union-attr,index]


@pytest.mark.parametrize(("stride", "sides"), [(1, [32, 16, 8, 4]), (2, [16, 8, 4, 2])])
@torch.no_grad()
def test_stem_for_small_images(stride: int, sides: list[int]) -> None:
    net = network("resnet18", 7, in_channels=1, stem_stride=stride).eval()
    found: list[int] = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        stage.register_forward_hook(lambda _, args, out: found.append(out.shape[-1]))  # type: ignore[union-attr]
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert found == sides


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet19", 10), "did you mean 'resnet1"),
        (("resnet1", 10, "timm"), "did you mean"),
        (("resnet18", 10, "keras"), "one of torchvision, timm, small"),
        (("resnet18", 0), "num_classes"),
        (("resnet10t", 10, "timm", True), "zero_init_residual"),
        (("vgg11", 10, "torchvision", True), "zero_init_residual"),
        (("fasterrcnn_resnet50_fpn", 10), "no classifier"),
        (("resnet18", 10, "torchvision", False, None, 3, 3), "stem_stride=3"),
        (("vgg11", 10, "torchvision", False, None, 3, 1), "torchvision's ResNets"),
    ],
)
def test_errors(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        network(*arguments)  # type: ignore[arg-type]


def test_no_auxiliary_classifiers() -> None:
    net = network("googlenet", 7).train()
    out = net(torch.randn(2, 3, 64, 64))
    assert isinstance(out, torch.Tensor)
    assert out.shape == (2, 7)
