"""Equalization leaves the float function as it was, and makes channels alike."""

from __future__ import annotations

import pytest
import torch
from quantization.small_networks import NETWORKS, images, settled
from torch import nn

import lightning_baqe as baqe
from lightning_baqe import BitConfig, QuantizedModel
from lightning_baqe.calibration.equalization import equalize, pairs
from lightning_baqe.calibration.walk import float_twin


def quantized(model: nn.Module, x: torch.Tensor, weight: int = 4, activation: int = 4) -> QuantizedModel:
    return baqe.quantize(model, BitConfig.uniform(model, weight, activation, None), x[:2]).eval()


class Chain(nn.Module):
    """Pairs of every kind, with channels of very different size in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(16, 8, 1, groups=2)
        self.last = nn.Conv2d(8, 4, 3)
        self.clipped = nn.Conv2d(4, 4, 1)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-2, 2, 8))
            self.grouped.weight.mul_(torch.logspace(-1, 1, 8).view(-1, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.a(x))), 2)
        x = self.grouped(torch.relu(self.depthwise(x)))
        x = nn.functional.relu6(self.last(torch.relu(x)))
        return self.clipped(x)


@torch.no_grad()
def test_the_float_function_stays() -> None:
    torch.manual_seed(0)
    model, x = Chain().eval(), images(16)
    found = quantized(model, x)
    assert [pair.path for pair in pairs(found)] == ["depthwise", "grouped", "last"]  # not behind a fixed clip
    before = found.a.weight.clone()
    assert equalize(found, [(x[:8],), (x[8:],)]) == 3
    assert torch.equal(found.a.weight, before)  # the batch norm takes it up
    y = images(64, seed=5)
    torch.testing.assert_close(float_twin(found)(y), model(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_of_usual_networks(name: str) -> None:
    model, x = settled(name), images(16)
    found = quantized(model, x)
    count = equalize(found, [(x,)])
    assert count > 0 or name != "residual"
    torch.testing.assert_close(float_twin(found)(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_channels_before_a_depthwise_layer_become_alike() -> None:
    torch.manual_seed(0)
    model, x = Chain().eval(), images(64)
    found = quantized(model, x)
    equalize(found, [(x,)])
    seen = []
    twin = float_twin(found)
    twin.depthwise.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    twin(x)
    largest = seen[0].transpose(0, 1).flatten(1).amax(1)
    torch.testing.assert_close(largest, largest.mean().expand(8), rtol=1e-4, atol=0)


@torch.no_grad()
def test_quantized_it_is_closer() -> None:
    torch.manual_seed(0)
    model, x = Chain().eval(), images(64)
    y, errors = images(64, seed=9), []
    for equal in (False, True):
        found = quantized(model, x, 8, 5)
        if equal:
            equalize(found, [(x,)])
        baqe.calibrate(found, [x])
        errors.append(float((found(y) - model(y)).square().mean()))
    assert errors[1] < 0.8 * errors[0]


@torch.no_grad()
def test_dead_channels_stay() -> None:
    torch.manual_seed(0)
    model, x = Chain().eval(), images(8)
    model.norm.weight[2], model.norm.bias[2] = 0, -1
    model.grouped.weight[:, 3] = 0
    found = quantized(model, x)
    equalize(found, [(x,)])
    assert all(torch.isfinite(value).all() for value in found.state_dict().values())
    torch.testing.assert_close(float_twin(found)(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_others_read_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.a(x))
            z = self.c(torch.relu(self.b(y)))
            return z + y

    x = images(8)
    assert [pair.path for pair in pairs(quantized(Twice().eval(), x))] == ["c"]
