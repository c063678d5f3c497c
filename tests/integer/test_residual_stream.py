"""A residual stream that stays in int32 (HAWQ-V3, section III-C)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_baqe as baqe
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.activation import ResidualStream


class TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (self.a2(self.a1(x).relu()) + x).relu()
        x = (self.b2(self.b1(x).relu()) + x).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def lowered(images: torch.Tensor, residual: int | None) -> tuple[baqe.QuantizedModel, baqe.IntegerGraph, nn.Module]:
    torch.manual_seed(1)
    model = TwoBlocks().eval()
    bits = baqe.BitConfig.uniform(model, 8, 8, residual=residual)
    quantized = baqe.calibrate(baqe.quantize(model, bits, images), [images]).eval()
    return quantized, baqe.lower(quantized), model


def test_the_stream_is_int32_and_layers_read_8_bits(images: torch.Tensor) -> None:
    _, graph, _ = lowered(images, 32)
    adds = [node for node in graph if node.kind == "add"]
    assert [node.type.high for node in adds] == [2**30, 2**8 - 1]  # only the pooling reads the last one
    assert all(graph[name].type.high == 2**30 for node in adds for name in node.inputs)
    assert all(node.input_range == (0, 255) for node in graph if node.kind == "conv")
    assert graph.is_integer_only


def test_it_is_closer_to_float_than_a_stream_of_few_bits(images: torch.Tensor) -> None:
    errors = {}
    for residual in (3, 32):
        _, graph, model = lowered(images, residual)
        errors[residual] = float((graph.run(images) - model(images).detach()).square().mean())
    assert errors[32] < 0.5 * errors[3]


def test_fake_quant_agrees_with_integers(images: torch.Tensor) -> None:
    quantized, graph, _ = lowered(images, 32)
    with torch.no_grad():
        difference = (graph.run(images) - quantized(images)).abs().max()
    assert difference < 0.01 * quantized(images).abs().max()


def test_state_and_json_round_trip(images: torch.Tensor) -> None:
    quantized, graph, model = lowered(images, 32)
    bits = baqe.BitConfig.from_json(quantized.bits.to_json())
    assert bits.residual == 32
    again = baqe.quantize(model, bits, images).eval()
    again.load_state_dict(quantized.state_dict())
    assert torch.equal(baqe.lower(again).run(images), graph.run(images))
    streams = [m for m in again.modules() if isinstance(m, ResidualStream)]
    assert streams
    assert not any(stream.scale.requires_grad for stream in streams)


def test_bits_of_the_stream_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"residual must be an integer within 2\.\.8 or 32"):
        baqe.BitConfig.uniform(TwoBlocks(), residual=16)
