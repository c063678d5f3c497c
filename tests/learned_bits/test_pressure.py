"""Beta: ramps at their ends, the controller against its textbook form, penalties in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_baqe.errors import ConfigError
from lightning_baqe.learned_bits.pressure import RAMPS, Controller, Ramp, size_penalty


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
    size = torch.tensor(150.0, requires_grad=True)
    within = torch.tensor(90.0, requires_grad=True)
    found = size_penalty([(size, 100.0), (within, 100.0)], [8.0, 8.0])
    assert float(found.detach()) == pytest.approx(8 * 0.25)
    found.backward()
    assert size.grad is not None
    assert float(size.grad) == pytest.approx(8 * 2 * 0.5 / 100)
    assert within.grad is not None
    assert float(within.grad) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ramp(kind="steep"), "'steep' is unknown; wanted is one of linear, cosine, exponential"),
        (lambda: Ramp(share=0.0), "share=0.0"),
        (lambda: Ramp(final=-1.0), "beta=-1.0"),
        (lambda: Controller(share=1.5), "share=1.5"),
    ],
)
def test_what_cannot_be_right(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
