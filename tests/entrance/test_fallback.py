"""Networks of which something stays float are computed rightly; what cannot is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_baqe as baqe
from lightning_baqe.errors import UnsupportedModelError

IMAGES, TOKENS = (6, 3, 16, 16), (6, 7, 16)


class Around(nn.Module):
    """A function of two convolutions of an image."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.first(x), self.second(x)).mean((2, 3))


class OfTokens(nn.Module):
    """The classes of a sequence."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(16, 5)

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(args[0]).mean(1))


class OneNumber(nn.Module):
    """A binary classifier whose output has no dimension of its own; it gets arguments that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3))).squeeze(1)


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def middle(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3), keepdim=True)


RIGHT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "the larger by where": (lambda: Around(lambda a, b: torch.where(a > b, a, b)), IMAGES),
    "where of one tensor": (lambda: Around(lambda a, b: torch.where(a > middle(a), a, -a)), IMAGES),
    "masked": (lambda: Around(lambda a, b: a.masked_fill(a < middle(a), 0.5)), IMAGES),
    "times a mask": (lambda: Around(lambda a, b: a * (a > b)), IMAGES),
    "times a mask of floats": (lambda: Around(lambda a, b: a * (a > b).float()), IMAGES),
    "encoder that normalises first": (lambda: OfTokens(encoder(norm_first=True)), TOKENS),
    "encoder": (lambda: OfTokens(encoder()), TOKENS),
    "one number for each image": (OneNumber, IMAGES),
}


@pytest.mark.parametrize("name", RIGHT)
def test_it_is_right_and_compiled_code_agrees(name: str) -> None:
    torch.manual_seed(0)
    make, shape = RIGHT[name]
    model, x = make().eval(), torch.randn(shape)
    quantized = baqe.quantize(model, baqe.BitConfig.uniform(model), x, fallback="float").eval()
    graph = baqe.lower(baqe.calibrate(quantized, [x]))
    with torch.no_grad():
        wanted, found = model(x), graph.run(x)
        assert found.shape == wanted.shape == quantized(x).shape
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.995
    artifact = baqe.build(graph)
    assert artifact.run(x).shape == wanted.shape
    assert not any(baqe.verify(artifact, x).values())


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda a, b: a.sum() + b, r"sum in the forward \(Around\).*one dimension alone"),
        (lambda a, b: F.gumbel_softmax(a, 1), r"the forward of Around draws random numbers.*exponential"),
        (
            lambda a, b: F.grid_sample(a, b[:, :2].movedim(1, 3), align_corners=False),
            r"grid_sampler_2d in the forward \(Around\)",
        ),
        (lambda a, b: torch.where((a > b) & (a > 0), a, b), r"bitwise_and in the forward \(Around\)"),
    ],
)
def test_what_cannot_stay_float_is_refused_by_name(function: Callable[..., torch.Tensor], reason: str) -> None:
    model = Around(function).eval()
    with pytest.raises(UnsupportedModelError, match=reason):
        baqe.quantize(model, baqe.BitConfig.uniform(model), torch.randn(IMAGES), fallback="float")


def test_a_loss_is_no_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0), nn.Unflatten(0, (1, -1)))
    model.append(nn.Module())
    model[-1].forward = lambda x: x.mean()  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match=r"returns one number for a whole batch.*leave the loss out"):
        baqe.quantize(model.eval(), baqe.BitConfig.uniform(model), torch.randn(IMAGES))
