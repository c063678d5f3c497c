"""Sensitivity of layers: only the layer's own quantizers act, fewer bits disturb more."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, kl_divergence

from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.errors import CalibrationError
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.sensitivity import layer_scores, output_divergence


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 5),
    ).eval()  # fmt: skip


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_scores_are_those_of_the_layer_alone(network: nn.Module, images: torch.Tensor) -> None:
    model = calibrate(quantize(network, BitConfig.uniform(network, 3, 3, first_last=3), images), [images])
    found = layer_scores(model, images)
    assert list(found) == ["0", "2", "5"]
    reference = network(images).log_softmax(1).detach()
    inputs = {"0": "input_1", "2": "_1", "5": "_4"}  # the quantizers that stand before the layers
    assert {name.rpartition(".")[2] for name in model.quantizers()} == set(inputs.values())
    for layer, score in found.items():
        alone = copy.deepcopy(model)
        for other in set(found) - {layer}:
            alone.get_submodule(other).weight_quantizer = nn.Identity()
            setattr(alone.get_submodule("activation_quantizers"), inputs[other], nn.Identity())
        logits = alone(images).log_softmax(1).detach()
        wanted = float(nn.functional.kl_div(logits, reference, reduction="batchmean", log_target=True))
        assert score == pytest.approx(wanted)
        assert score > 0


def test_fewer_bits_disturb_more(network: nn.Module, images: torch.Tensor) -> None:
    by_bits = []
    for bits in (2, 4, 8):
        model = calibrate(quantize(network, BitConfig.uniform(network, bits, bits), images), [images])
        by_bits.append(layer_scores(model, images)["2"])
    assert by_bits[0] > by_bits[1] > by_bits[2] >= 0


def test_the_model_is_left_as_it_was(network: nn.Module, images: torch.Tensor) -> None:
    model = calibrate(quantize(network, BitConfig.uniform(network, 4, 4), images), [images]).train()
    model.get_submodule("2").eval()
    before, modes = model(images), {name: m.training for name, m in model.named_modules()}
    layer_scores(model, images)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(model(images), before)


def test_an_uncalibrated_model_is_refused(network: nn.Module, images: torch.Tensor) -> None:
    with pytest.raises(CalibrationError):
        layer_scores(quantize(network, BitConfig.uniform(network, 4, 4), images), images)


def test_one_output_and_labels_diverge_as_bernoulli_variables() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 1), (8,), (8, 5), (8, 3, 2, 2)):
        reference, found = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        truth, model = (Bernoulli(logits=logits) for logits in (reference, found))
        each = kl_divergence(truth, model)
        wanted = each.flatten(1).sum(1).mean() / (4 if len(shape) == 4 else 1) if len(shape) > 1 else each.mean()
        assert float(output_divergence(reference, found, "labels")) == pytest.approx(float(wanted), rel=1e-5)
        if len(shape) == 1 or shape[1] == 1:  # the softmax of one output tells nothing
            assert float(output_divergence(reference, found)) == pytest.approx(float(wanted), rel=1e-5)


def test_classes_of_pixels_diverge_pixel_by_pixel() -> None:
    reference, found = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0)).unbind()
    rows = [x.movedim(1, -1).reshape(-1, 3) for x in (reference, found)]
    assert float(output_divergence(reference, found)) == pytest.approx(float(output_divergence(*rows)), rel=1e-5)


def test_values_diverge_in_units_of_their_spread() -> None:
    values = torch.arange(8.0)[:, None] + 1000  # whose sigmoids are all 1
    assert float(output_divergence(values, values + 1, "values")) == pytest.approx(1 / 5.25)
    assert float(output_divergence(values * 9, (values + 1) * 9, "values")) == pytest.approx(1 / 5.25)


def test_a_network_of_one_output_has_scores(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 1)).eval()
    model = calibrate(quantize(network, BitConfig.uniform(network, 3, 3, first_last=3), images), [images])
    assert all(score > 0 for score in layer_scores(model, images).values())
