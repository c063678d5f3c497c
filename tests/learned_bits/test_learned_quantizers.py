"""Quantizers with learned bits: grids, gradients against finite differences, bounds that hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_baqe.learned_bits.learned_quantizers import LearnedQuantizer, learned_quantization, learned_weights
from lightning_baqe.quantization.gradient_scaling import SCALES, gradient_scaling

ALL_BITS = range(2, 9)


def make(bits: float = 4, signed: bool = True, step: float = 0.1, channels: int = 0) -> LearnedQuantizer:
    shape = (channels, 1, 1, 1) if channels else ()
    top = step * (2 ** (bits - signed) - 1)
    return LearnedQuantizer(torch.full(shape, top), bits, signed, 10, apart=bool(channels))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_levels_are_those_of_the_bits(bits: int, signed: bool) -> None:
    """2^b of them, from 0 on; signed as many on both sides of 0, which is one less."""
    quantizer = make(bits, signed)
    out = quantizer(torch.linspace(-40, 40, 100_001))
    levels = torch.unique(torch.round(out / 0.1))
    assert len(levels) == 2**bits - signed
    assert (levels.min() == 0) != signed
    torch.testing.assert_close(out, torch.round(out / 0.1) * 0.1, rtol=1e-4, atol=1e-5)
    assert float(quantizer.bits().detach()) == pytest.approx(bits, abs=1e-5)
    torch.testing.assert_close(quantizer(out), out)


def surrogate(x: Tensor, step: Tensor, top: Tensor, signed: bool, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """What the gradients are those of: rounding adds what it adds at this point, whatever moves."""

    def clipped(x: Tensor, step: Tensor, top: Tensor) -> Tensor:
        return torch.clamp(x / step, -top / step if signed else torch.zeros(()).to(x), top / step)

    held = clipped(*at)
    return step * (clipped(x, step, top) + (held.round() - held))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_gradients_are_finite_differences_of_the_surrogate(seed: int, signed: bool, by_channel: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    shape = (3, 1, 1) if by_channel else ()
    step = (0.05 + 0.2 * torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    top = (0.3 + torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    x.requires_grad_()
    learned_quantization(x, step, top, signed).backward(grad)
    at = tuple(t.detach() for t in (x, step, top))
    for place, tensor in enumerate((x, step, top)):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        index = tuple(int(torch.randint(n, (1,), generator=generator)) for n in tensor.shape)
        values = []
        for change in (1e-7, -1e-7):
            moved = [t.clone() for t in at]
            moved[place][index] += change
            values.append(float((surrogate(*moved, signed, at) * grad).sum()))
        assert float(tensor.grad[index]) == pytest.approx((values[0] - values[1]) / 2e-7, abs=1e-5)


@pytest.mark.parametrize("kind", SCALES)
def test_gradient_scaling_changes_the_gradient_to_the_values_alone(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    found = {}
    for name in ("ste", kind):
        quantizer, leaf = make(3), x.clone().requires_grad_()
        quantizer.gradient = gradient_scaling(name, 0.2)
        quantizer(leaf).backward(grad)
        found[name] = (leaf.grad, quantizer.log_levels.grad, quantizer.log_top.grad)
    (plain, *others), (scaled, *same) = found["ste"], found[kind]
    torch.testing.assert_close(others, same)
    ratio = x / 0.1
    inside = ratio.abs() < 3
    torch.testing.assert_close(scaled, torch.where(inside, gradient_scaling(kind, 0.2).scaled(plain, ratio), plain))


@settings(max_examples=100, deadline=None)
@given(st.floats(-200, 200), st.floats(-200, 200), st.booleans(), st.integers(2, 8))
def test_bits_stay_in_range_whatever_a_step_does(at_levels: float, at_top: float, signed: bool, bits: int) -> None:
    quantizer = make(bits, signed)
    with torch.no_grad():
        quantizer.log_levels += at_levels / 10
        quantizer.log_top += at_top / 10
    x = torch.linspace(-1, 1, 9)
    for _ in ("before", "after"):
        assert 2 - 1e-4 <= float(quantizer.bits().detach()) <= 8 + 1e-4
        found = quantizer(x)
        assert bool(torch.isfinite(found).all())
        last = found
        quantizer.project()
    torch.testing.assert_close(quantizer(x), last)  # what acted is what the parameters are now


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("wanted", [-1, 1])
def test_bits_move_both_ways(bits: int, wanted: int) -> None:
    """From either end inwards, and from there to the other end."""
    quantizer = make(5, channels=3)
    optimizer = torch.optim.RMSprop(quantizer.parameters(), 0.05)
    for target in (bits, 10 - bits, 5 + wanted):
        for _ in range(300):
            optimizer.zero_grad()
            (quantizer.bits().mean() - target).square().backward()
            optimizer.step()
            quantizer.project()
        assert float(quantizer.bits().mean().detach()) == pytest.approx(target, abs=0.2)


@pytest.mark.parametrize("bits", [2, 8])
def test_every_weight_moves(bits: int) -> None:
    """Within the range one step moves them all."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(4, 3, 3, 3, generator=generator).requires_grad_()
    step = weight.detach().flatten(1).abs().amax(1) / (2 ** (bits - 1) - 1) * 1.001
    for by_channel in (False, True):
        quantizer = learned_weights(weight, step, bits, by_channel)
        before = weight.detach().clone()
        weight.grad = None
        (quantizer(weight) * torch.randn(weight.shape, generator=generator)).sum().backward()
        torch.optim.SGD([weight], 0.1).step()
        assert bool((weight.detach() != before).all())
        weight.data.copy_(before)


def test_channels_have_their_own_bits() -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([0.1, 0.2, 0.3, 0.4])
    quantizer = learned_weights(weight, step, 4, by_channel=True)
    assert quantizer.bits().shape == (4, 1, 1, 1)
    assert (quantizer.count, quantizer.values) == (12, 48)
    assert float(quantizer.size_bits().detach()) == pytest.approx(4 * 48)
    with torch.no_grad():
        quantizer.log_levels[2] += 1  # 2^3 - 1 = 7 becomes 14 integers
    assert float(quantizer.bits()[2].detach()) == pytest.approx(math.log2(15) + 1)
    assert float(quantizer.size_bits().detach()) == pytest.approx(12 * (3 * 4 + math.log2(15) + 1))
    together = learned_weights(weight, step, 4, by_channel=False)
    assert (together.bits().shape, together.top().shape) == ((), (4, 1, 1, 1))
    assert (together.count, together.values) == (48, 48)
    torch.testing.assert_close(together(weight), learned_weights(weight, step, 4, by_channel=True)(weight))
    quantizer.fix([2, 3, 4, 5])
    assert quantizer.bits().flatten().tolist() == pytest.approx([2, 3, 4, 5])
    assert quantizer.top().flatten().tolist() == pytest.approx([0.7, 1.4, 2.1, 2.8])


@pytest.mark.parametrize("signed", [False, True])
def test_compiled_and_other_layouts_and_precisions(signed: bool) -> None:
    torch.compiler.reset()
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    quantizer = make(4, signed)
    out = quantizer(x)
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), out)
    last = quantizer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, out)
    half = quantizer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), quantizer(x.bfloat16().float()), rtol=1e-2, atol=1e-2)


def test_fixed_bits_go_where_the_module_goes() -> None:
    quantizer = make(4, channels=3)
    quantizer.fix([2, 3, 8])
    moved = quantizer.to("meta")
    assert moved(torch.randn(3, 2, 2, 2, device="meta")).device.type == "meta"
    assert moved.double().bits().dtype == torch.float64


def test_state_dicts_round_trip() -> None:
    first, second = make(3, step=0.2), make(7)
    second.load_state_dict(first.state_dict())
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first(x), second(x))
