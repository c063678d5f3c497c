"""Gradients through the rounding: the paper's formulas, in every quantizer and both of its forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.activation import ACTIVATION_QUANTIZERS
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.functional import quantize_weight
from lightning_baqe.quantization.gradient_scaling import (
    SCALES,
    STRAIGHT,
    GradientScaling,
    gradient_scaling,
)
from lightning_baqe.quantization.observer import RangeObserver


def published(kind: str, g: float, e: float, delta: float, alpha: float) -> float:
    """Schaefer et al., section 3.2, one number at a time."""
    sign = math.copysign(1.0, g)
    return (
        g
        * {
            "ste": 1.0,
            "pbgs": 1 + delta * abs(e),
            "ewgs": 1 + delta * sign * e,
            "acos": 1 + delta * math.sin(math.pi * e),
            "tanh": 1 + delta * sign * math.tanh(alpha * e),
            "invtanh": 1 + delta * sign * math.atanh(alpha * e),
        }[kind]
    )


def arrived(gradient: Tensor, x: Tensor, step: float, low: int, high: int, scaling: GradientScaling) -> Tensor:
    """The gradient to x that is wanted."""
    found = []
    for g, value in zip(gradient.flatten().tolist(), (x.flatten() / step).tolist(), strict=True):
        error = value - round(value)
        found.append(published(scaling.kind, g, error, scaling.delta, scaling.alpha) if low < value < high else 0.0)
    return torch.tensor(found, dtype=x.dtype).view_as(x)


# Each kind, and two of them compiled.
CASES = [*((kind, False) for kind in SCALES), ("ste", True), ("invtanh", True)]


@pytest.mark.parametrize(("kind", "compiled"), CASES)
def test_the_published_formulas(kind: str, compiled: bool) -> None:
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(3, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    scaling = gradient_scaling(kind, 0.3, 1.5)
    form = torch.compile(quantize_weight, backend="aot_eager") if compiled else quantize_weight
    scale = torch.full((3,), 0.4, dtype=torch.float64, requires_grad=True)
    out = form(x, scale, 4, 3, scaling)
    (found,) = torch.autograd.grad(out, x, gradient, retain_graph=True)
    torch.testing.assert_close(found, arrived(gradient, x.detach(), 0.4, -4, 3, scaling))
    plain = quantize_weight(x, scale, 4, 3)
    assert torch.equal(out, plain)
    at_scale = [torch.autograd.grad(of, scale, gradient)[0] for of in (out, plain)]
    torch.testing.assert_close(*at_scale)  # LSQ's gradient to the scale is no gradient through the rounding


@pytest.mark.parametrize("quantizer_kind", ACTIVATION_QUANTIZERS)
@pytest.mark.parametrize(("kind", "compiled"), CASES)
def test_activations(kind: str, quantizer_kind: str, compiled: bool) -> None:
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    quantizer = ACTIVATION_QUANTIZERS[quantizer_kind](3, "q")  # type: ignore[call-arg]
    observer = RangeObserver()
    observer.update(x * 0.5)
    quantizer.initialize(observer)
    scaling = gradient_scaling(kind, 0.3, 1.5)
    quantizer.gradient = scaling
    x.requires_grad_()
    out = (torch.compile(quantizer, backend="aot_eager") if compiled else quantizer)(x)
    (found,) = torch.autograd.grad(out, x, gradient)
    low = -quantizer.zero_point()
    wanted = arrived(gradient, x.detach(), quantizer.step(), low, low + quantizer.qmax, scaling)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_network_gets_one_for_weights_and_one_for_activations() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    model = quantize(net, BitConfig.uniform(net, 4, 4), example_input=torch.randn(2, 3, 3, 3))
    ewgs, invtanh = gradient_scaling("ewgs"), gradient_scaling("invtanh")
    model.scale_gradients(ewgs, invtanh)
    assert {quantizer.gradient for quantizer in model.quantizers().values()} == {invtanh}
    weights = [module.weight_quantizer.gradient for module in model.modules() if hasattr(module, "weight_quantizer")]
    assert weights == [ewgs] * 2
    model.scale_gradients(STRAIGHT, STRAIGHT)
    assert {quantizer.gradient for quantizer in model.quantizers().values()} == {STRAIGHT}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dsq",), "'dsq' is unknown; wanted is one of ste, pbgs, ewgs"),
        (("ewgs", -1.0), "delta=-1.0"),
        (("ewgs", math.nan), "delta=nan"),
        (("invtanh", 0.1, 2.0), "alpha=2.0"),
        (("tanh", 0.1, 0.0), "alpha=0.0"),
    ],
)
def test_what_cannot_be_right(arguments: tuple[str | float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gradient_scaling(*arguments)  # type: ignore[arg-type]
