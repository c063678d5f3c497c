from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_baqe.errors import CalibrationError, ConfigError
from lightning_baqe.quantization.activation import ACTIVATION_QUANTIZERS, ActivationQuantizer
from lightning_baqe.quantization.functional import quantize_activation, quantize_weight, scale_gradient
from lightning_baqe.quantization.layers import QuantConv2d
from lightning_baqe.quantization.observer import RANGE_METHODS, RangeObserver
from lightning_baqe.quantization.weight import WEIGHT_INITS, WeightQuantizer, initial_weight_scale, weight_range

ALL_BITS = range(2, 9)
SIGNS = {"unsigned": (0.0, 4.0), "signed": (-2.0, 2.0), "skewed": (-0.5, 3.0), "negative": (-3.0, 0.0)}


class ActivationConformance:
    """What every activation quantizer must do; inherit and set ``kind``."""

    kind: type[ActivationQuantizer]

    def make(self, bits: int, low: float, high: float, method: str = "minmax") -> ActivationQuantizer:
        quantizer = self.kind(bits, "q", range_method=method)  # type: ignore[call-arg]
        observer = RangeObserver()
        observer.update(torch.linspace(low, high, 1001))
        quantizer.initialize(observer)
        return quantizer.eval()

    @pytest.mark.parametrize("bits", ALL_BITS)
    @pytest.mark.parametrize("sign", SIGNS)
    def test_grid_round_trips(self, bits: int, sign: str) -> None:
        quantizer = self.make(bits, *SIGNS[sign])
        grid = (torch.arange(2**bits) - quantizer.zero_point()) * torch.tensor(quantizer.step())
        assert torch.equal(quantizer(grid), grid)

    @pytest.mark.parametrize("bits", ALL_BITS)
    @pytest.mark.parametrize("sign", SIGNS)
    def test_range_levels_and_zero(self, bits: int, sign: str) -> None:
        quantizer = self.make(bits, *SIGNS[sign])
        out = quantizer(torch.linspace(-10, 10, 5001))
        levels = torch.round(out / quantizer.step()) + quantizer.zero_point()
        assert levels.min() == 0
        assert levels.max() == 2**bits - 1
        assert 0 <= quantizer.zero_point() <= 2**bits - 1
        assert quantizer(torch.zeros(3)).abs().max() == 0

    @pytest.mark.parametrize("bits", ALL_BITS)
    @pytest.mark.parametrize("method", RANGE_METHODS)
    def test_error_within_half_a_step(self, bits: int, method: str) -> None:
        low, high = SIGNS["skewed"]
        quantizer = self.make(bits, low, high, method)
        step, zero = quantizer.step(), quantizer.zero_point()
        x = torch.linspace(-zero * step, (quantizer.qmax - zero) * step, 777)
        assert (quantizer(x) - x).abs().max() <= step / 2 * (1 + 1e-4)

    def test_uninitialised_refuses_in_eval_and_initialises_in_training(self) -> None:
        quantizer = self.kind(4, "q")
        with pytest.raises(CalibrationError, match="'q' has no scale yet"):
            quantizer.eval()(torch.randn(2, 3))
        quantizer.train()(torch.linspace(-1, 1, 64).reshape(2, 32))
        assert bool(quantizer.initialized)
        assert 0 < quantizer.step() < 1

    def test_state_dict_round_trip(self) -> None:
        first, second = self.make(5, -1.0, 2.0), self.kind(5, "q").eval()
        second.load_state_dict(first.state_dict())
        x = torch.linspace(-3, 3, 100)
        assert torch.equal(first(x), second(x))

    def test_all_zero_tensor_has_a_usable_scale(self) -> None:
        quantizer = self.make(8, 0.0, 0.0)
        assert 1e-3 < quantizer.step() < 1

    def test_refuses_data_that_are_not_finite(self) -> None:
        observer = RangeObserver()
        observer.update(torch.tensor([1.0, math.nan]))
        with pytest.raises(CalibrationError, match="not finite"):
            self.kind(4, "q").initialize(observer)
        with pytest.raises(CalibrationError, match="no data"):
            self.kind(4, "q").initialize(RangeObserver())

    def test_gradient_goes_straight_through_within_the_range(self) -> None:
        quantizer = self.make(4, -1.0, 2.0)
        step, zero = quantizer.step(), quantizer.zero_point()
        x = torch.tensor([[-zero - 1.0, 0.1, quantizer.qmax - zero + 1.0]]) * step
        x.requires_grad_()
        quantizer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [[0.0, 1.0, 0.0]]


class LearningConformance(ActivationConformance):
    """What every activation quantizer whose scale learns must do, too."""

    def test_gradient_reaches_the_scale_with_the_lsq_factor(self) -> None:
        quantizer = self.make(4, 0.0, 3.0)
        x = torch.full((2, 10), 100.0)  # all above: d/ds = Q for each element
        quantizer(x).sum().backward()
        expected = 20 * quantizer.qmax / math.sqrt(10 * quantizer.qmax)
        assert quantizer.scale.grad is not None
        torch.testing.assert_close(quantizer.scale.grad, torch.tensor(expected), rtol=1e-4, atol=1e-4)


class TestLSQ(LearningConformance):
    kind = ACTIVATION_QUANTIZERS["lsq"]

    def test_zero_point_is_fixed(self) -> None:
        assert self.make(4, 0.0, 1.0).zero_point() == 0
        assert self.make(4, -1.0, 1.0).zero_point() == 8


class TestStatic(ActivationConformance):
    kind = ACTIVATION_QUANTIZERS["static"]

    def test_training_leaves_the_range_alone(self) -> None:
        quantizer = self.make(4, -1.0, 2.0).train()
        assert not any(parameter.requires_grad for parameter in quantizer.parameters())
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        for factor in (1.0, 100.0):
            quantizer(torch.linspace(-1, 2, 50).reshape(1, 50).mul(factor).requires_grad_()).sum().backward()
        assert quantizer.scale.grad is None
        assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())

    def test_the_zero_point_is_where_the_range_says(self) -> None:
        quantizer = self.make(8, -1.0, 3.0)
        assert quantizer.zero_point() == round(255 / 4)
        torch.testing.assert_close(quantizer.step(), 4 / 255)


def test_every_activation_quantizer_is_held_to_the_conformance() -> None:
    held = {test.kind for test in (TestLSQ, TestLSQPlus, TestStatic)}
    assert held == set(ACTIVATION_QUANTIZERS.values())


class TestLSQPlus(LearningConformance):
    kind = ACTIVATION_QUANTIZERS["lsq+"]

    def test_offset_learns(self) -> None:
        quantizer = self.make(4, -1.0, 1.0)
        quantizer(torch.full((1, 4), -5.0)).sum().backward()
        offset = quantizer.get_parameter("offset")
        torch.testing.assert_close(offset.grad, torch.tensor(4 / math.sqrt(4 * 15)))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10_000), st.floats(0.01, 0.5))
def test_activation_gradients_equal_the_closed_form(bits: int, seed: int, step: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    qmax = 2**bits - 1
    zero = seed % (qmax + 1)
    scale = torch.tensor(step, dtype=torch.float64, requires_grad=True)
    offset = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    quantize_activation(x, scale, offset, torch.tensor(zero), qmax).backward(grad)
    v = x.detach() / step
    below, above = v <= -zero, v >= qmax - zero
    inside = ~below & ~above
    ds = torch.where(inside, torch.round(v) - v, torch.where(above, float(qmax), 0.0))
    torch.testing.assert_close(x.grad, grad * inside)
    assert offset.grad is not None
    torch.testing.assert_close(offset.grad, (grad * ~inside).sum())
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, (grad * ds).sum(), rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10_000))
def test_weight_gradients_equal_the_closed_form(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    scale = (torch.rand(4, generator=generator, dtype=torch.float64) + 0.02).requires_grad_()
    qn, qp = weight_range(bits)
    out = quantize_weight(weight, scale, qn, qp)
    out.backward(grad)
    v = weight.detach() / scale.detach()[:, None, None, None]
    inside = (v > -qn) & (v < qp)
    ds = torch.where(inside, torch.round(v) - v, torch.where(v > 0, float(qp), float(-qn)))
    torch.testing.assert_close(weight.grad, grad * inside)
    torch.testing.assert_close(scale.grad, (grad * ds).sum((1, 2, 3)))
    torch.testing.assert_close(out.detach(), torch.round(v).clamp(-qn, qp) * scale.detach()[:, None, None, None])


def test_gradients_outside_the_range_equal_finite_differences() -> None:
    # Clipped values are linear in the scale and, above, in nothing else: the closed form is the true derivative.
    weight = torch.tensor([[9.0, -9.0]], dtype=torch.float64)
    scale = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    quantize_weight(weight, scale, 8, 7).sum().backward()
    with torch.no_grad():
        change = quantize_weight(weight, scale + 1e-3, 8, 7).sum() - quantize_weight(weight, scale - 1e-3, 8, 7).sum()
    torch.testing.assert_close(scale.grad, (change / 2e-3).reshape(1))


def test_blocks_do_not_change_results() -> None:
    # Larger than one cache-sized block, compared with itself cut in pieces.
    weight = torch.randn(96, 4096, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(96, generator=torch.Generator().manual_seed(1)) + 0.1
    whole = quantize_weight(weight, scale, 8, 7)
    pieces = torch.cat([quantize_weight(weight[i : i + 5], scale[i : i + 5], 8, 7) for i in range(0, 96, 5)])
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("init", WEIGHT_INITS)
def test_weight_quantizer(bits: int, init: str) -> None:
    weight = (
        torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(bits))
        * torch.logspace(-3, 2, 6)[:, None, None, None]
    )
    quantizer = WeightQuantizer(weight, bits, init)
    out = quantizer(weight)
    integers, scale = quantizer.integers(weight)
    qn, qp = weight_range(bits)
    assert -qn <= integers.min() <= integers.max() <= qp
    torch.testing.assert_close(out, (integers * scale[:, None, None, None]).float())
    assert torch.equal(quantizer(out), out)  # on the grid: round-trips
    error = ((out - weight) ** 2).flatten(1).mean(1) / (weight**2).flatten(1).mean(1)
    assert error.max() < ({2: 0.8} if init == "max" else {2: 0.5, 3: 0.2}).get(bits, 0.2 if init == "max" else 0.1)


def test_8_bit_weights_are_narrow() -> None:
    assert weight_range(8) == (127, 127)
    assert weight_range(4) == (8, 7)


def test_published_initial_scales() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.0]])
    torch.testing.assert_close(initial_weight_scale(weight, 4, "lsq"), torch.tensor([2 * 1.5 / math.sqrt(7)]))
    std = weight.std(correction=0)
    torch.testing.assert_close(initial_weight_scale(weight, 4, "lsq+"), (3 * std / 8).reshape(1))
    with pytest.raises(ConfigError, match="weight_init"):
        initial_weight_scale(weight, 4, "best")


def test_least_squares_scale_beats_the_published_ones() -> None:
    weight = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    for bits in ALL_BITS:
        errors = {
            init: ((WeightQuantizer(weight, bits, init)(weight) - weight) ** 2).mean().item() for init in WEIGHT_INITS
        }
        assert errors["mse"] <= min(errors.values()) * (1 + 1e-6)


def test_mse_range_clips_outliers() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).relu()
    values[7] = 20.0
    observer = RangeObserver()
    observer.update(values)
    assert observer.range(15, "minmax") == (0.0, 20.0)
    low, high = observer.range(15, "mse")
    assert low == 0.0
    assert high < 10.0


def test_scale_gradient_is_the_identity() -> None:
    value = torch.tensor([0.1, 0.3], requires_grad=True)
    out = scale_gradient(value, 0.25)
    out.sum().backward()
    assert torch.equal(out, value)
    torch.testing.assert_close(value.grad, torch.full((2,), 0.25))


def test_half_precision_inputs() -> None:
    x = torch.linspace(-1, 1, 32).to(torch.bfloat16)
    out = quantize_activation(x, torch.tensor(0.1), torch.tensor(0.0), torch.tensor(8), 15)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ACTIVATION_QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compiled_quantizers_are_the_same(kind: str, bits: int) -> None:
    """In one graph, without a break, and with the gradients of the other form."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 5, 4, 6, generator=generator, requires_grad=True)
    quantizer = ACTIVATION_QUANTIZERS[kind](bits, "q")  # type: ignore[call-arg]
    observer = RangeObserver()
    observer.update(x.detach() * 0.7)
    quantizer.initialize(observer)
    again = ACTIVATION_QUANTIZERS[kind](bits, "q")  # type: ignore[call-arg]
    again.load_state_dict(quantizer.state_dict())  # a loaded one compiles as well
    quantizer = again
    layer = nn.Conv2d(5, 7, 3)
    layer = QuantConv2d(layer, WeightQuantizer(layer.weight, bits))

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantizer(x), layer.weight_quantizer(layer.weight)

    found = []
    for form in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        activation, weight = form(x)
        learns = [
            x,
            layer.weight,
            layer.weight_quantizer.scale,
            *(p for p in quantizer.parameters() if p.requires_grad),
        ]
        loss = (activation * x.detach()).sum() + (weight * layer.weight.detach()).square().sum()
        found.append((activation, weight, torch.autograd.grad(loss, learns)))
    (one, other), (first, second), (gradients, others) = zip(*found, strict=True)
    assert torch.equal(one, other)
    assert torch.equal(first, second)
    torch.testing.assert_close(gradients, others, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lsq", "lsq+"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_training_that_diverged_shows(kind: str, value: float) -> None:
    for name in ("scale", "offset") if kind == "lsq+" else ("scale",):
        quantizer = ACTIVATION_QUANTIZERS[kind](4, "q")  # type: ignore[call-arg]
        quantizer(torch.linspace(-1, 1, 50)[None])
        quantizer.get_parameter(name).data.fill_(value)
        for form in (quantizer, torch.compile(quantizer, backend="aot_eager")):
            assert bool(form(torch.linspace(-1, 1, 50)[None]).isnan().all()), name


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_memory_format_changes_nothing_but_the_order_in_memory(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x, scale = torch.randn(3, 5, 4, 6, generator=generator), torch.tensor(0.21, requires_grad=True)
    weight, steps = torch.randn(7, 5, 3, 3, generator=generator), torch.full((7,), 0.3, requires_grad=True)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = [t.clone().contiguous(memory_format=layout).requires_grad_() for t in (x, weight)]
        activation = quantize_activation(inputs[0], scale, scale.detach(), torch.tensor(1), 2**bits - 1)
        quantized = quantize_weight(inputs[1], steps, 2 ** (bits - 1), 2 ** (bits - 1) - 1)
        assert activation.is_contiguous(memory_format=layout)
        assert quantized.is_contiguous(memory_format=layout)
        loss = (activation * x).sum() + (quantized * weight).sum()
        found.append((activation, quantized, *torch.autograd.grad(loss, [*inputs, scale, steps])))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)  # sums in another order
