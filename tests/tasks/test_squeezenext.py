"""SqueezeNext: as many values as published, and deployed as any other network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_baqe as baqe
from lightning_baqe.errors import ConfigError
from lightning_baqe.tasks import network
from lightning_baqe.tasks.squeezenext import NAMES, SqueezeNext

# Of the implementation in imgclsmob, whose convolutions have biases before their batch norms.
COUNTS = {
    "squeezenext_1.0": 724_056,
    "squeezenext_1.0_v5": 921_816,
    "squeezenext_2.0": 2_583_752,
    "squeezenext_2.0_v5": 3_366_344,
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name: str) -> None:
    net = network(name, 1000, "small")
    biases = sum(m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d))
    assert sum(parameter.numel() for parameter in net.parameters()) + biases == COUNTS[name]


@torch.no_grad()
def test_maps_shrink_as_published() -> None:
    net, shapes = SqueezeNext("squeezenext_1.0", 4, in_channels=1).eval(), []
    for stage in net.stages:
        stage.register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape[1:])))
    assert net(torch.randn(2, 1, 224, 224)).shape == (2, 4)
    assert shapes == [(32, 55, 55), (64, 28, 28), (128, 14, 14), (256, 7, 7)]


def test_it_is_lowered() -> None:
    torch.manual_seed(0)
    net, x = network("squeezenext_1.0", 4, "small").eval(), torch.randn(2, 3, 32, 32)
    model = baqe.calibrate(baqe.quantize(net, baqe.BitConfig.uniform(net), x), [x]).eval()
    graph = baqe.lower(model)
    assert graph.is_integer_only
    with torch.no_grad():
        wanted = model(x)
    assert float((graph.run(x) - wanted).abs().max()) < 0.1 * float(wanted.std())


def test_what_it_has_not() -> None:
    with pytest.raises(ConfigError, match="leave zero_init_residual out"):
        network("squeezenext_1.0", 4, "small", zero_init_residual=True)
