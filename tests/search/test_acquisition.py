"""The improvement of one point against differences of hypervolumes, its expectation against plain sampling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search import (
    best_candidate,
    expected_hypervolume_improvement,
    hypervolume,
    hypervolume_improvement,
    joint_samples,
    nondominated_cells,
)


def front_of(n: int, m: int, seed: int) -> Tensor:
    return torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(n=st.integers(0, 12), m=st.integers(1, 4), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_improvement_is_a_difference_of_hypervolumes(n: int, m: int, seed: int) -> None:
    front, reference = front_of(n, m, seed), [0.9] * m
    points = 1.2 * front_of(6, m, seed + 1) - 0.1
    improvement = hypervolume_improvement(points, nondominated_cells(front, reference))
    for point, value in zip(points, improvement, strict=True):
        expected = hypervolume(torch.cat([front, point[None]]), reference) - hypervolume(front, reference)
        assert float(value) == pytest.approx(expected, abs=1e-9)


def test_samples_have_the_moments_of_the_posterior() -> None:
    root = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance, mean = root @ root.transpose(1, 2), torch.arange(15, dtype=torch.float64).reshape(5, 3)
    samples = joint_samples(mean, covariance, 4096, seed=0)
    assert samples.shape == (4096, 5, 3)
    torch.testing.assert_close(samples.mean(0), mean, atol=0.05, rtol=0.0)
    centred = samples - mean
    torch.testing.assert_close(torch.einsum("snp,snq->npq", centred, centred) / 4096, covariance, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("m", [2, 3])
def test_expectation_equals_monte_carlo_over_explicit_hypervolumes(m: int) -> None:
    front, reference = front_of(6, m, 5), [1.0] * m
    mean = torch.full((2, m), 0.3, dtype=torch.float64)
    mean[1] = 0.5
    covariance = (0.02 * torch.eye(m) + 0.01).double().expand(2, m, m)  # correlated objectives
    expected = expected_hypervolume_improvement(mean, covariance, front, reference, n_samples=1024)
    normal = torch.randn(2000, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = hypervolume(front, reference)
    for index in range(2):
        draws = mean[index] + normal @ torch.linalg.cholesky(covariance[index]).T
        gains = torch.tensor([hypervolume(torch.cat([front, draw[None]]), reference) - base for draw in draws])
        error = float(gains.std() / math.sqrt(len(gains)))
        assert float(expected[index]) == pytest.approx(float(gains.mean()), abs=4 * error + 1e-4)


def test_one_objective_is_expected_improvement() -> None:
    mean, sigma, best = torch.tensor([[0.2], [0.0], [-1.0]], dtype=torch.float64), 0.5, 0.1
    covariance = torch.full((3, 1, 1), sigma**2, dtype=torch.float64)
    front = torch.tensor([[best], [3.0]], dtype=torch.float64)
    value = expected_hypervolume_improvement(mean, covariance, front, [10.0], n_samples=4096)
    u = (best - mean[:, 0]) / sigma
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = sigma * (u * normal.cdf(u) + normal.log_prob(u).exp())
    torch.testing.assert_close(value, expected, atol=2e-3, rtol=0.0)


def test_certain_predictions_give_the_plain_improvement() -> None:
    front = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    mean = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    value = expected_hypervolume_improvement(mean, torch.zeros(3, 2, 2), front, [3.0, 3.0])
    assert value.tolist() == pytest.approx([1.0, 0.0, 6.0])


def test_constraints_scale_by_the_probability_of_feasibility() -> None:
    mean = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, -9.0], [0.5, 0.5, 9.0]], dtype=torch.float64)
    covariance = torch.diag(torch.tensor([1e-12, 1e-12, 1.0], dtype=torch.float64)).expand(3, 3, 3)
    front = torch.empty(0, 2)
    value = expected_hypervolume_improvement(mean, covariance, front, [1.0, 1.0], n_constraints=1, n_samples=1024)
    assert value.tolist() == pytest.approx([0.125, 0.25, 0.0], abs=2e-3)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = front_of(50, 3, 1)
    covariance = (0.01 * torch.eye(3)).double().expand(50, 3, 3)
    arguments = (mean, covariance, front_of(8, 3, 2), [1.0] * 3)
    whole = expected_hypervolume_improvement(*arguments)
    monkeypatch.setattr("lightning_baqe.search.acquisition._ELEMENTS_AT_ONCE", 10_000)
    torch.testing.assert_close(expected_hypervolume_improvement(*arguments), whole)


def test_ties_at_zero_go_to_the_least_known() -> None:
    covariance = torch.tensor([1.0, 3.0, 3.0, 2.0])[:, None, None] * torch.eye(2)
    assert best_candidate(torch.zeros(4), covariance) == 1
    assert best_candidate(torch.tensor([0.0, 0.0, 0.5, 0.5]), covariance) == 2


def test_shapes_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"mean \(4, 3\), covariance \(4, 2, 2\)"):
        expected_hypervolume_improvement(torch.ones(4, 3), torch.ones(4, 2, 2), torch.ones(1, 3), [1.0] * 3)
