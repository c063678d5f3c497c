"""Operators that are written with others, layers without a module, frames of infinity: integers, and right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_baqe as baqe
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.float_operators import FloatOperator
from lightning_baqe.integer.graph import IntegerGraph

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Around(nn.Module):
    """A function between two convolutions of eight channels."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.LazyConv2d(4, 1)
        self.function = function
        self.eval()(X)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self.first(x))).mean((2, 3))


def lowered(model: nn.Module, fallback: str = "refuse") -> IntegerGraph:
    quantized = baqe.quantize(model, baqe.BitConfig.uniform(model), X, fallback=fallback).eval()
    return baqe.lower(baqe.calibrate(quantized, [X]))


@torch.no_grad()
def similarity(graph: IntegerGraph, model: nn.Module) -> float:
    return float(torch.cosine_similarity(graph.run(X).flatten(), model(X).flatten(), 0))


FRAMED = {
    "stride 2": lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 3, 2),
    "own padding, too": lambda x: F.max_pool2d(F.pad(x, (1, 0, 1, 1), value=float("-inf")), 3, 1, 1),
}  # fmt: skip
INTEGER = {
    "softmax of two": lambda x: (F.softmax(x.view(-1, 2, 4, 8, 8), 1) * x.view(-1, 2, 4, 8, 8)).sum(1),
    "stacked": lambda x: torch.stack([x, torch.relu(x)], 2).flatten(1, 2),
    "fixed filter": lambda x: F.conv2d(x, torch.ones(8, 1, 3, 3) / 9, groups=8, padding=1),
    "an empty part": lambda x: torch.cat([x[:, :, :0], x.flip(2)], 2),
    "clamp by tensors": lambda x: torch.clamp(x, torch.tensor(-0.5), torch.tensor(float("inf"))),
    "blocks that overlap": lambda x: F.fold(F.unfold(x, 3, 1, 1, 2).relu(), (8, 8), 3, 1, 1, 2),
    "dilated blocks": lambda x: F.fold(F.unfold(x, (3, 2), 2, 1).relu(), (8, 8), (3, 2), 2, 1),
    "blocks of two sizes": lambda x: (
        F.fold(F.unfold(x, 3, 1, 1, 2), (8, 8), 3, 1, 1, 2) + F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2)
    ),
    "blocks that leave a rest": lambda x: F.fold(F.unfold(x, 3, stride=3).relu(), (8, 8), 3, stride=3),
    **FRAMED,
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGER)
def test_integers_that_compute_it(name: str) -> None:
    model = Around(INTEGER[name])
    graph = lowered(model)
    assert graph.is_integer_only
    assert similarity(graph, model) > 0.99
    exact = baqe.lower(baqe.quantize(model, baqe.BitConfig.uniform(model, 32, 32), X))
    torch.testing.assert_close(exact.run(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FRAMED)
def test_infinite_frames_are_no_padding(name: str) -> None:
    """Windows end where the image does: no value of a frame is ever the largest, below 0 either."""
    graph = lowered(Around(lambda x: FRAMED[name](-5 - torch.relu(x))))
    assert any(isinstance(node, ir.MaxWindows) for node in graph)
    artifact = baqe.build(graph, schedules="default")
    assert not any(baqe.verify(artifact, X[:1]).values())


class Raw(nn.Module):
    """Weights that no layer holds, one of which is read in two ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.kernel = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 8, 1, 1) * 0.3)
        self.matrix = nn.Parameter(torch.randn(5, 8) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(torch.relu(self.conv(x)), self.kernel) * self.kernel.abs().mean()
        return F.linear(y.mean((2, 3)), self.matrix)


def test_weights_without_a_layer_have_the_other_bits() -> None:
    model = Raw().eval()
    bits = baqe.BitConfig.uniform(model)
    assert list(bits) == ["conv"]
    quantized = baqe.quantize(model, bits, X)
    layers = [name for name, module in quantized.named_modules() if hasattr(module, "weight_quantizer")]
    assert layers == ["conv", "kernel_conv2d", "matrix_linear"]
    graph = lowered(model)
    assert graph.is_integer_only
    assert list(graph.bits) == ["conv"]
    assert similarity(graph, model) > 0.99
    quantized.train()
    baqe.calibrate(quantized, [X])(X).sum().backward()
    assert all(quantized.get_submodule(name).weight.grad is not None for name in layers)


class Attention(nn.Module):
    """PyTorch's own module, which keeps the batch second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.patches, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(tokens)
        return self.head((tokens + self.attention(y, y, y, need_weights=False)[0]).mean(1))


def test_attention_stays_float_and_its_projections_do_not() -> None:
    model = Attention().eval()
    graph = lowered(model, "float")
    floats = [node.operator for node in graph if isinstance(node, FloatOperator)]
    assert floats == ["layer_norm.default", "scaled_dot_product_attention.default"]
    assert similarity(graph, model) > 0.99
    artifact = baqe.build(graph, schedules="default")
    assert not any(baqe.verify(artifact, X[:2]).values())
    one_by_one = torch.cat([graph.run(x[None]) for x in X])
    torch.testing.assert_close(graph.run(X), one_by_one)


def test_what_has_no_integer_form_where_it_stands_stays_float() -> None:
    """Flipping a whole image is movement; the transposed product of two activations is none."""
    model = Around(lambda x: x @ x.transpose(2, 3))
    refused = baqe.check(model, X).floats
    assert [operator.operator for operator in refused] == ["matmul"]
    graph = lowered(model, "float")
    assert not graph.is_integer_only
    assert similarity(graph, model) > 0.98
