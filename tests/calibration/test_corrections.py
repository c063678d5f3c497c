"""Corrections: closer to the float network, means exactly so, and exact on the device."""

from __future__ import annotations

import pytest
import torch
from quantization.small_networks import NETWORKS, images, settled
from torch import nn

import lightning_baqe as baqe
from lightning_baqe import BitConfig, QuantizedModel
from lightning_baqe.calibration.corrections import Correction
from lightning_baqe.calibration.walk import float_twin
from lightning_baqe.errors import CalibrationError, ConfigError
from lightning_baqe.integer.nodes import Conv, Linear
from lightning_baqe.quantization.batch_norm import fold_batch_norm, foldable
from lightning_baqe.quantization.layers import QuantLayer

CORRECT = ("none", "fast", "best")


def smooth(count: int, seed: int = 1) -> torch.Tensor:
    """Images whose neighbouring pixels are alike, as in pictures."""
    found = images(count, seed).cumsum(-1).cumsum(-2)
    return found / found.std()


def quantized(
    model: nn.Module, correct: str | Correction, bits: int = 4, x: torch.Tensor | None = None
) -> QuantizedModel:
    x = smooth(64) if x is None else x
    found = baqe.quantize(model, BitConfig.uniform(model, bits, 8, None), x[:2]).eval()
    return baqe.calibrate(found, x.split(16), correct=correct)


def error(model: nn.Module, found: nn.Module) -> float:
    x = smooth(256, seed=7)
    with torch.no_grad():
        return float((found(x) - model(x)).square().mean())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", [3, 4])
def test_closer_to_the_float_network_on_other_images(name: str, bits: int) -> None:
    model = settled(name)
    none, fast, best = (error(model, quantized(model, correct, bits)) for correct in CORRECT)
    assert fast < 0.9 * none
    assert best < 0.7 * none


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("correct", ["fast", "best", Correction(centre=True)])
@torch.no_grad()
def test_the_mean_of_every_channel_is_the_float_networks(name: str, correct: str | Correction) -> None:
    """On the data that it was corrected with, to single precision; behind the batch norm where there is one."""
    model, x = settled(name), smooth(64)
    found = quantized(model, correct, x=x)
    norms = {pair.layer: pair.names[0] for pair in foldable(found)}
    means: dict[str, list[torch.Tensor]] = {}
    for name, module in found.named_modules():
        if isinstance(module, QuantLayer) and (module in norms or module.bias is not None):
            behind = norms.get(module, name)  # type: ignore[call-overload]
            channel = -1 if isinstance(module, nn.Linear) else 1
            for net in (model, found):
                net.get_submodule(behind).register_forward_hook(
                    lambda _, args, out, key=behind, channel=channel: means.setdefault(key, []).append(
                        out.transpose(0, channel).flatten(1)
                    )
                )
    model(x)
    found(x)
    assert means
    for key, (wanted, mine) in means.items():
        scale = wanted.std(1).max()
        assert (wanted.mean(1) - mine.mean(1)).abs().max() < 1e-5 * max(float(scale), 1.0), key


@pytest.mark.parametrize("name", ["residual", "functional"])
@torch.no_grad()
def test_normalised_channels_vary_as_in_float(name: str) -> None:
    """Means and variances behind batch norms, on the data that it was corrected with."""
    model, x = settled(name), smooth(64)
    found = quantized(model, Correction(statistics=True), 3, x)
    values: dict[str, list[torch.Tensor]] = {}
    for pair in foldable(found):
        for net in (model, found):
            net.get_submodule(pair.names[0]).register_forward_hook(
                lambda _, args, out, key=pair.names[0]: values.setdefault(key, []).append(
                    out.double().transpose(0, 1).flatten(1)
                )
            )
    model(x)
    found(x)
    assert values
    for wanted, mine in values.values():
        torch.testing.assert_close(mine.mean(1), wanted.mean(1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.var(1), wanted.var(1), atol=1e-5, rtol=1e-3)


def test_equalized_channels_change_nothing_in_float() -> None:
    model, x = settled("residual"), smooth(64)
    found = quantized(model, Correction(equalize=True), 8, x)
    with torch.no_grad():
        torch.testing.assert_close(float_twin(found)(x), model(x), rtol=1e-4, atol=1e-5)
    plain = quantized(model, "none", 8, x)
    assert any(not torch.equal(a, b) for a, b in zip(found.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("correct", ["best", Correction(equalize=True), Correction(reconstruct_s=1)])
@pytest.mark.parametrize("batches", [[], [torch.randn(2, 5, 8, 8)]])
def test_data_that_do_not_fit_are_refused_whatever_is_corrected(
    correct: str | Correction, batches: list[torch.Tensor]
) -> None:
    model = settled("residual")
    found = baqe.quantize(model, BitConfig.uniform(model, 4, 8), images(2)).eval()
    before = {name: value.clone() for name, value in found.state_dict().items() if "quantizer" not in name}
    with pytest.raises(CalibrationError):
        baqe.calibrate(found, batches, correct=correct)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("correct", ["fast", "best"])
@pytest.mark.parametrize("folded", [False, True])
def test_weights_lie_on_their_grids_and_the_device_computes_with_them(name: str, correct: str, folded: bool) -> None:
    model, x = settled(name), smooth(64)
    found = baqe.quantize(model, BitConfig.uniform(model, 4, 8, None), x[:2]).eval()
    if folded:  # gains are negative here and there
        fold_batch_norm(found)
    baqe.calibrate(found, x.split(16), correct=correct)
    for module in found.modules():
        if isinstance(module, QuantLayer):
            weight = module.weight.detach()
            torch.testing.assert_close(module.weight_quantizer(weight), weight, rtol=1e-6, atol=1e-8)
    graph = baqe.lower(found, x[:1])
    layers = {name: m for name, m in found.named_modules() if isinstance(m, QuantLayer)}
    nodes = {node.layer: node for node in graph if isinstance(node, Conv | Linear)}
    assert len(nodes) == len(layers)
    for name, layer in layers.items():
        integers, _ = layer.weight_quantizer.integers(layer.weight)
        assert torch.equal(nodes[name].weight.reshape(integers.shape).abs(), integers.abs())
    y = smooth(64, seed=3)
    with torch.no_grad():
        assert (graph.run(y) - found(y)).abs().mean() < 0.02 * found(y).std()


def test_nothing_is_corrected_unless_it_is_asked_for() -> None:
    model = settled("residual")
    found = quantized(model, "none")
    weights = {n: m.weight for n, m in found.named_modules() if isinstance(m, QuantLayer)}
    for name, weight in weights.items():
        assert torch.equal(weight, model.get_submodule(name).weight)


def test_modes_come_back_and_the_float_network_is_untouched() -> None:
    model = settled("residual")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = baqe.quantize(model, BitConfig.uniform(model, 4, 8), images(2)).train()
    found.fc.eval()
    baqe.calibrate(found, [images(16)], correct="best")
    assert found.training
    assert not found.fc.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found(images(4)).sum().backward()  # and can be trained from there
    assert found.stem.weight.grad is not None


def test_several_inputs_and_transposed_convolutions() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 2, 2, bias=False)
            self.other, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            z = torch.relu(self.up(torch.relu(self.down(x)))).mean((2, 3))
            return self.last(z + torch.relu(self.other(y)))

    torch.manual_seed(0)
    model = Two().eval()
    x, y = torch.randn(32, 3, 8, 8), torch.randn(32, 5)
    errors = []
    for correct in CORRECT:
        found = baqe.quantize(model, BitConfig.uniform(model, 3, 8, None), (x[:2], y[:2])).eval()
        baqe.calibrate(found, [((x[:16], y[:16]), 0), ((x[16:], y[16:]), 0)], correct=correct)
        with torch.no_grad():
            errors.append(float((found(x, y) - model(x, y)).square().mean()))
    assert errors[2] < errors[0]
    assert errors[1] < errors[0]
    assert found.up.bias is None  # the structure is the bit-config's


def test_errors() -> None:
    model = settled("residual")
    found = baqe.quantize(model, BitConfig.uniform(model), images(2))
    with pytest.raises(ConfigError, match=r"correct='better', wanted is one of 'none', 'fast', 'best'"):
        baqe.calibrate(found, [images()], correct="better")
    with pytest.raises(CalibrationError, match="no batches"):
        baqe.calibrate(found, [], correct="best")
    with pytest.raises(CalibrationError, match="batch 1 of calibrate"):
        baqe.calibrate(found, [torch.zeros(2, 3)], correct="best")
    with pytest.raises(CalibrationError, match="not finite"):
        baqe.calibrate(found, [images().fill_(torch.nan)], correct="best")
