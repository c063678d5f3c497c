"""The walk sees what the two networks compute, and what was changed on the way."""

from __future__ import annotations

import pytest
import torch
from quantization.small_networks import NETWORKS, images, settled
from torch import nn

from lightning_baqe import BitConfig, QuantizedModel, calibrate, quantize
from lightning_baqe.calibration.walk import channel_mean, float_twin, side_by_side
from lightning_baqe.quantization.layers import QuantLayer


def ready(model: nn.Module, x: torch.Tensor, bits: int = 4) -> QuantizedModel:
    return calibrate(quantize(model, BitConfig.uniform(model, bits, bits, None), x).eval(), [x]).eval()


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    return settled(request.param)


@torch.no_grad()
def test_the_twin_is_the_float_network(network: nn.Module) -> None:
    x = images()
    quantized = ready(network, x)
    twin = float_twin(quantized)
    torch.testing.assert_close(twin(x), network(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(quantized(x), network(x), atol=1e-3)  # it is as it was


@torch.no_grad()
def test_every_layer_is_seen_with_what_it_reads_and_gives(network: nn.Module) -> None:
    batches = [images(5, 1), images(3, 2)]
    quantized = ready(network, batches[0])
    twin = float_twin(quantized)
    seen: dict[str, dict[str, list[torch.Tensor]]] = {}

    def watch(net: nn.Module, name: str, what: str) -> None:
        def keep(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            seen.setdefault(name, {}).setdefault(f"{what} input", []).append(args[0])
            seen[name].setdefault(f"{what} output", []).append(out)

        net.get_submodule(name).register_forward_hook(keep)

    layers = [name for name, module in quantized.named_modules() if isinstance(module, QuantLayer)]
    for name in layers:
        watch(quantized, name, "quantized")
        watch(twin, name, "float")
    for x in batches:
        quantized(x)
        twin(x)
    wanted = {name: {what: list(values) for what, values in found.items()} for name, found in seen.items()}
    places = {str(place.node.target): place for place in side_by_side(quantized, [(x,) for x in batches])}
    assert list(places) == [name for name in wanted if name in places]
    assert set(places) == set(layers)
    for name, place in places.items():
        for what, values in (
            ("float input", place.float_input),
            ("float output", place.float_output),
            ("quantized input", place.input),
            ("quantized output", place.output()),
        ):
            for mine, theirs in zip(values, wanted[name][what], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_change_is_seen_by_the_layers_behind_it() -> None:
    x = images()
    quantized = ready(settled("residual"), x)
    for number, place in enumerate(side_by_side(quantized, [(x,)])):
        if number == 0:
            place.layer.weight.zero_()
        elif number == 1:
            assert place.input[0].flatten(2).std(2).max() == 0  # a bias and a batch norm alone
            assert place.float_input[0].flatten(2).std(2).max() > 0


@torch.no_grad()
def test_a_layer_that_is_called_twice_is_passed_over() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Linear(4, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.again(torch.relu(self.again(torch.relu(self.first(x)))))

    x = torch.randn(16, 4)
    places = [str(p.node.target) for p in side_by_side(ready(Twice().eval(), x), [(x,)])]
    assert places == ["first"]


def test_means_by_channel() -> None:
    values = [torch.randn(3, 4, 5, 6), torch.randn(2, 4, 7, 1)]
    wanted = torch.cat([v.transpose(0, 1).flatten(1) for v in values], 1).double().mean(1)
    torch.testing.assert_close(channel_mean(values, 1), wanted)
    torch.testing.assert_close(channel_mean([torch.ones(3, 2, 5)], -1), torch.ones(5, dtype=torch.float64))
