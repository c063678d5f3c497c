"""Moments of a layer's inputs, against the layer itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_baqe.calibration import moments as module
from lightning_baqe.calibration.moments import Weighted, by_group, moments_of

LAYERS: dict[str, tuple[Weighted, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(4, 6, 3), (4, 9, 8)),
    "padded, strided, dilated": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (4, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 9, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding="same", groups=4), (4, 9, 8)),
    "reflecting": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (4, 9, 8)),
    "pointwise": (nn.Conv2d(4, 6, 1, stride=2), (4, 9, 8)),
    "1-d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 17)),
    "1-d, circular": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (4, 17)),
    "linear": (nn.Linear(5, 3), (5,)),
    "over tokens": (nn.Linear(5, 3), (7, 5)),
}


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[Weighted, list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    layer, shape = LAYERS[request.param]
    x = [torch.randn(n, *shape).cumsum(-1) + 1 for n in (5, 3)]
    return layer.double(), [v.double() for v in x], [(v + 0.2 * torch.randn(v.shape)).double() for v in x]


def outputs(layer: Weighted, weight: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    """``(channels, samples)`` of a layer with other weights, without its mean."""
    before = layer.weight.data
    layer.weight.data = weight
    channel = -1 if isinstance(layer, nn.Linear) else 1
    with torch.no_grad():
        found = torch.cat([layer(x).transpose(0, channel).flatten(1) for x in inputs], 1)
    layer.weight.data = before
    return found - found.mean(1, keepdim=True)


def test_the_error_is_that_of_the_layers_outputs(
    case: tuple[Weighted, list[torch.Tensor], list[torch.Tensor]],
) -> None:
    layer, floats, quantized = case
    found = moments_of(layer, floats, quantized)
    one, other = torch.randn_like(layer.weight), torch.randn_like(layer.weight)
    wanted = outputs(layer, layer.weight.data, floats)
    errors = [(outputs(layer, weight, quantized) - wanted).square().mean(1) for weight in (one, other)]
    W = by_group(layer, layer.weight)
    mine = [found.error(W, by_group(layer, weight)).flatten() for weight in (one, other)]
    torch.testing.assert_close(mine[0] - mine[1], errors[0] - errors[1])  # the rest does not depend on the weights
    torch.testing.assert_close(found.H, found.H.mT)


@pytest.mark.parametrize("name", LAYERS)
def test_a_part_of_the_positions_is_nearly_as_good(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    layer = layer.double()
    x = [torch.randn(8, *shape, dtype=torch.float64).cumsum(-1) for _ in range(100)]
    y = [v + 0.2 * torch.randn_like(v) for v in x]
    whole = moments_of(layer, x, y)
    monkeypatch.setattr(module, "WANTED_SAMPLES", sum(module._positions(layer, v) for v in x) // 4)
    monkeypatch.setattr(module, "SAMPLES_EACH", 1)
    part = moments_of(layer, x, y)
    assert not torch.equal(part.H, whole.H)
    for field in ("H", "C"):
        mine, theirs = getattr(part, field), getattr(whole, field)
        assert (mine - theirs).norm() < 0.12 * theirs.norm(), field
