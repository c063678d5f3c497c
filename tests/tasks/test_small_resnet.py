"""ResNets for small images: layers, widths and sizes as in the paper's tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from lightning_baqe.errors import ConfigError
from lightning_baqe.tasks import network
from lightning_baqe.tasks.small_resnet import NAMES, SmallResNet


@pytest.mark.parametrize(("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85)])
def test_layers_and_weights(name: str, millions: float) -> None:
    """Table 6 of He et al.; shortcuts and batch norms are a few thousand more."""
    net = SmallResNet(name, 10)
    layers = [m for path, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in path]
    assert len(layers) == int(name.removeprefix("resnet"))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.012)


@torch.no_grad()
def test_maps_shrink_where_channels_double() -> None:
    net = SmallResNet("resnet8", 4, in_channels=1).eval()
    shapes: list[tuple[int, ...]] = []
    for stage in (net.layer1, net.layer2, net.layer3):
        stage.register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape[1:])))
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 4)
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_blocks_may_begin_as_identities() -> None:
    net = network("resnet14", 3, "small", zero_init_residual=True)
    assert all(not block.bn2.weight.any() for block in net.modules() if isinstance(block, BasicBlock))


def test_other_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="resnet18' is no classifier of small"):
        network("resnet18", 3, "small")
    assert "resnet20" in NAMES
