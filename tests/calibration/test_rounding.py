"""Rounding by the moments of a layer's inputs: never worse than to the nearest, and locally best."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_baqe.calibration.moments import Moments
from lightning_baqe.calibration.rounding import (
    best_integers,
    best_step,
    closest,
    damped,
    error_of,
    nearest,
    refit_step,
)
from lightning_baqe.quantization.weight import weight_range


def problem(
    seed: int, depth: int, groups: int = 1, channels: int = 3, samples: int = 64
) -> tuple[torch.Tensor, Moments]:
    """Weights, and moments of correlated inputs of two networks."""
    generator, samples = torch.Generator().manual_seed(seed), 64

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(groups, samples, depth) @ normal(groups, depth, depth)
    y = x + 0.3 * normal(groups, samples, depth)
    return normal(groups, channels, depth), Moments(y.mT @ y / samples, x.mT @ y / samples)


PROBLEMS = st.builds(
    problem, st.integers(0, 2**16), st.integers(1, 70), groups=st.integers(1, 3), channels=st.integers(1, 4)
)


@given(given=PROBLEMS, bits=st.integers(2, 8), fraction=st.floats(0.3, 1.2))
def test_never_worse_than_to_the_nearest(given: tuple[torch.Tensor, Moments], bits: int, fraction: float) -> None:
    target, moments = given
    qn, qp = weight_range(bits)
    step = target.abs().amax(-1, keepdim=True) * fraction / qp
    plain, best = nearest(target, step, qn, qp), best_integers(target, step, moments.H, qn, qp)
    assert torch.equal(best, best.round())
    assert best.min() >= -qn
    assert best.max() <= qp
    before, after = (error_of(q * step - target, moments.H) for q in (plain, best))
    assert (after <= before * (1 + 1e-9) + 1e-12).all()


@given(seed=st.integers(0, 2**16), depth=st.integers(1, 6), bits=st.integers(2, 4))
def test_no_single_weight_could_be_better(seed: int, depth: int, bits: int) -> None:
    target, moments = problem(seed, depth)
    qn, qp = weight_range(bits)
    step = target.abs().amax(-1, keepdim=True) / qp
    found = best_integers(target, step, moments.H, qn, qp, sweeps=200)
    least = error_of(found * step - target, moments.H)
    for weight, value in itertools.product(range(depth), range(-qn, qp + 1)):
        other = found.clone()
        other[:, :, weight] = value
        assert (error_of(other * step - target, moments.H) >= least * (1 - 1e-9) - 1e-12).all()


def test_independent_inputs_are_rounded_to_the_nearest() -> None:
    target, _ = problem(0, 20)
    step = torch.full((1, 3, 1), 0.1, dtype=torch.float64)
    H = torch.diag(torch.arange(1.0, 21.0, dtype=torch.float64))[None]
    assert torch.equal(best_integers(target, step, H, 8, 7), nearest(target, step, 8, 7))


def test_where_one_input_always_comes_with_another_their_errors_cancel() -> None:
    """Two equal inputs: the sum of the weights counts, and 0.4 + 0.4 is closer to 1 + 0 than to 0 + 0."""
    H = torch.ones(1, 2, 2, dtype=torch.float64)
    target = torch.tensor([[[0.4, 0.4]]], dtype=torch.float64)
    step = torch.ones(1, 1, 1, dtype=torch.float64)
    assert nearest(target, step, 2, 1).sum() == 0
    assert best_integers(target, step, H, 2, 1).sum() == 1


@given(given=PROBLEMS)
def test_the_closest_weights_solve_the_least_squares(given: tuple[torch.Tensor, Moments]) -> None:
    weight, moments = given
    moments = damped(moments)
    best = closest(weight, moments)
    least = moments.error(weight, best)
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.1, 1.0):
        other = best + scale * torch.randn(best.shape, generator=generator, dtype=torch.float64)
        assert (moments.error(weight, other) >= least - 1e-9 * least.abs() - 1e-12).all()
    same = damped(Moments(moments.H, moments.H))  # both networks have the same inputs
    torch.testing.assert_close(closest(weight, same), weight, rtol=1e-6, atol=1e-6)


def test_an_input_that_is_always_zero_keeps_its_weights() -> None:
    weight, moments = problem(0, 5)
    moments.H[:, 2], moments.H[:, :, 2], moments.C[:, 2], moments.C[:, :, 2] = 0, 0, 0, 0
    assert torch.allclose(closest(weight, damped(moments))[:, :, 2], weight[:, :, 2])
    nothing = Moments(torch.zeros_like(moments.H), torch.zeros_like(moments.C))
    assert torch.allclose(closest(weight, damped(nothing)), weight)


@given(given=PROBLEMS, bits=st.integers(2, 8), known=st.floats(1e-3, 10))
def test_the_best_step_is_no_worse_than_the_known_one(
    given: tuple[torch.Tensor, Moments], bits: int, known: float
) -> None:
    target, moments = given
    qn, qp = weight_range(bits)
    steps = torch.full((*target.shape[:2], 1), known, dtype=torch.float64)
    found = best_step(target, moments.H, qn, qp, steps)
    assert (found > 0).all()
    before, after = (error_of(nearest(target, s, qn, qp) * s - target, moments.H) for s in (steps, found))
    assert (after <= before).all()


@given(given=PROBLEMS, seed=st.integers(0, 100))
def test_a_refitted_step_is_the_least_squares_one(given: tuple[torch.Tensor, Moments], seed: int) -> None:
    target, moments = given
    step = target.abs().amax(-1, keepdim=True) / 7
    q = best_integers(target, step, moments.H, 8, 7)
    found = refit_step(target, q, step, moments.H)
    least = error_of(q * found - target, moments.H)
    for factor in (0.9, 0.999, 1.001, 1.1):
        assert (error_of(q * found * factor - target, moments.H) >= least - 1e-9 * least.abs() - 1e-12).all()


def test_a_channel_without_weights_keeps_its_step() -> None:
    step = torch.full((1, 1, 1), 0.5, dtype=torch.float64)
    zeros = torch.zeros(1, 1, 4, dtype=torch.float64)
    assert refit_step(zeros, zeros, step, torch.eye(4, dtype=torch.float64)[None]) == pytest.approx(0.5)
