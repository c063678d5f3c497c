"""Beta: ramps at their ends, the controller against its textbook form, penalties in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_baqe.errors import ConfigError
from lightning_baqe.learned_bits.pressure import RAMPS, Admm, Controller, Ramp, within_target


@pytest.mark.parametrize("kind", RAMPS)
def test_ramps_rise_to_their_end_and_stay(kind: str) -> None:
    ramp = Ramp(8.0, kind, 0.5)
    found = [ramp.beta(t / 100, 2.0) for t in range(101)]
    assert found[0] == 0
    assert found[:51] == sorted(found[:51])
    assert found[50:] == pytest.approx([8.0] * 51)
    middle = {"linear": 4.0, "cosine": 4.0, "exponential": 8 * math.expm1(2.5) / math.expm1(5)}
    assert found[25] == pytest.approx(middle[kind])


def test_the_controller_is_a_pid() -> None:
    """Its velocity form sums up to the positional one."""
    kp, ki, kd = gains = (3.0, 0.5, 0.7)
    controller = Controller(0.5, gains, first=2.0)
    ratios = [4.0, 3.9, 3.0, 3.2, 2.0, 1.1, 0.9, 1.0]
    errors = []
    for place, ratio in enumerate(ratios):
        progress = place / 10
        errors.append(math.log(ratio) - math.log(4.0) * max(1 - progress / 0.5, 0.0))
        change = errors[-1] - errors[-2] if place else 0.0
        wanted = kp * (errors[-1] - errors[0]) + ki * sum(errors) + kd * change
        assert controller.beta(progress, ratio) == pytest.approx(2.0 * math.exp(wanted)), place


def test_the_controller_pushes_until_the_target_is_met() -> None:
    above, below = Controller(), Controller()
    rising = [above.beta(1.0, 1.1) for _ in range(20)]
    falling = [below.beta(1.0, 0.9) for _ in range(20)]
    assert rising == sorted(rising)
    assert rising[-1] > 100 * rising[0]
    assert falling == sorted(falling, reverse=True)
    for _ in range(2000):
        assert math.isfinite(above.beta(1.0, 1.1))


def test_it_goes_on_from_its_state() -> None:
    one, other = Controller(), Controller()
    for step in range(5):
        one.beta(step / 10, 3.0 - step / 5)
    other.restore(one.state())
    assert one.beta(0.5, 1.7) == other.beta(0.5, 1.7)
    assert one.state() == other.state()
    Ramp().restore(Ramp().state())


def test_penalties() -> None:
    bits, counts = torch.tensor([3.0, 6.0], requires_grad=True), torch.tensor([10.0, 20.0])
    found, factor = Ramp(8.0, share=0.5).penalty(0.5, bits, counts, 100.0)
    assert factor == 8.0
    assert float(found.detach()) == pytest.approx(8 * 0.25)
    found.backward()
    torch.testing.assert_close(bits.grad, 8 * 2 * 0.5 * counts / 100)
    bits.grad = None
    Ramp(8.0, share=0.5).penalty(0.5, bits, counts, 160.0)[0].backward()
    assert bits.grad is not None
    assert float(bits.grad.abs().max()) == 0


@given(st.lists(st.tuples(st.floats(-3, 12), st.integers(1, 50)), min_size=1, max_size=8), st.floats(0, 1))
def test_the_nearest_within_a_target(values: list[tuple[float, int]], share: float) -> None:
    """Optimal by the conditions of Karush, Kuhn and Tucker: where bits are inside of their range, all have moved alike,
    and not at all where the target is not reached."""
    bits = torch.tensor([bits for bits, _ in values], dtype=torch.float64)
    counts = torch.tensor([float(count) for _, count in values], dtype=torch.float64)
    target = float(counts.sum()) * (2 + 6 * share)
    found = within_target(bits, counts, target)
    total = float((counts * found).sum())
    assert total <= target + 1e-6
    assert 2 <= float(found.min()) <= float(found.max()) <= 8
    inside = (found > 2 + 1e-9) & (found < 8 - 1e-9)
    moved = (bits - found)[inside]
    if len(moved):
        assert float(moved.max() - moved.min()) < 1e-9
        assert float(moved.max()) < 1e-9 or total == pytest.approx(target, rel=1e-6)


def test_multipliers_bring_bits_to_the_target() -> None:
    """With a loss that wants 8 bits of one and 4 of another, b, z and the target agree in the end, where the loss is
    the smallest: 1 * (8 - b1) = 4 * (4 - b2) / 3."""
    admm, bits = Admm(2.0), torch.tensor([8.0, 8.0], requires_grad=True)
    counts = torch.tensor([1.0, 3.0])
    optimizer = torch.optim.SGD([bits], 0.05)
    for _ in range(4000):
        optimizer.zero_grad()
        penalty, factor = admm.penalty(0.9, bits, counts, 16.0)
        assert factor == 2.0
        (0.5 * (8 - bits[0]).square() + 2 * (4 - bits[1]).square() + penalty).backward()
        optimizer.step()
    first, second = bits.tolist()
    assert first + 3 * second == pytest.approx(16.0, abs=1e-3)
    assert 8 - first == pytest.approx(4 * (4 - second) / 3, abs=1e-3)
    again = Admm(2.0)
    again.restore(admm.state())
    torch.testing.assert_close(again.penalty(0.9, bits, counts, 16.0)[0], admm.penalty(0.9, bits, counts, 16.0)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ramp(kind="steep"), "'steep' is unknown; wanted is one of linear, cosine, exponential"),
        (lambda: Ramp(share=0.0), "share=0.0"),
        (lambda: Ramp(final=-1.0), "beta=-1.0"),
        (lambda: Controller(share=1.5), "share=1.5"),
        (lambda: Admm(0.0), "rho=0.0"),
    ],
)
def test_what_cannot_be_right(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
