"""Costs of an unknown machine: what is known in closed form, scales, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lightning_baqe.costs.part_costs import PartCosts
from lightning_baqe.errors import ConfigError, MeasurementError

RNG = np.random.default_rng(0)
COUNTS = np.hstack([np.ones((300, 1)), RNG.integers(0, 4, (300, 5))])
BASE = np.array([1.0, 2.0, 0.5, 3.0, 1.0, 0.2])
ALIKE = np.array([0.3, 1.0, -0.2, 1.2, 0.1, 0.05])  # what moves together from machine to machine


def costs(slow: float, vector: float) -> np.ndarray:
    return slow * (BASE + vector * ALIKE)


def prior() -> PartCosts:
    machines = itertools.product((1.0, 7.0, 0.02), (-0.3, 0.0, 0.4))
    return PartCosts.of_machines(COUNTS, {f"{s} {v}": COUNTS @ costs(s, v) for s, v in machines})


def test_a_few_measurements_are_enough_where_machines_differ_in_few_ways() -> None:
    truth = COUNTS @ costs(55.0, 0.9)  # beyond all that are known
    measured = RNG.permutation(300)[:4]
    predicted, deviation = prior().given(COUNTS[measured], truth[measured]).predict(COUNTS)
    assert np.abs(predicted / truth - 1).max() < 0.05
    before = np.abs(prior().predict(COUNTS)[0] * truth.mean() / truth - 1).max()
    assert np.abs(predicted / truth - 1).max() < before / 3
    assert (np.abs(predicted - truth) < 4 * deviation).all()


@pytest.mark.parametrize("factor", [1e-6, 1e3])
def test_units_do_not_matter(factor: float) -> None:
    truth = COUNTS @ costs(2.0, 0.2)
    first, second = (prior().given(COUNTS[:5], of[:5]).predict(COUNTS) for of in (truth, factor * truth))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(factor * one, other, rtol=1e-2)


def test_the_posterior_is_that_of_linear_regression() -> None:
    truth = COUNTS @ costs(1.0, 0.1) * (1 + 0.02 * RNG.standard_normal(300))
    before, measured = prior(), np.arange(40)
    found = before.given(COUNTS[measured], truth[measured])
    precision = np.linalg.inv(before.covariance) + COUNTS[measured].T @ COUNTS[measured] / found.noise**2
    right = np.linalg.inv(before.covariance) @ before.mean
    right += COUNTS[measured].T @ (truth[measured] / found.scale) / found.noise**2
    np.testing.assert_allclose(found.covariance, np.linalg.inv(precision), rtol=1e-5, atol=1e-10)
    np.testing.assert_allclose(found.mean, np.linalg.solve(precision, right), rtol=1e-5)
    # What is measured is better known, and nothing is less known.
    assert (np.diag(found.covariance) <= np.diag(before.covariance) + 1e-12).all()


@pytest.mark.parametrize("n", [6, 20, 200])
def test_exact_sums_of_parts_are_taken(n: int) -> None:
    truth = COUNTS @ costs(3.0, 0.1)
    predicted, _ = prior().given(COUNTS[:n], truth[:n]).predict(COUNTS)
    np.testing.assert_allclose(predicted, truth, rtol=0.02)
    with pytest.raises(MeasurementError, match="no parts that cost anything"):
        prior().given(np.zeros((3, 6)), np.ones(3))


def test_the_most_telling_are_those_that_differ() -> None:
    counts = np.array([[1.0, 0, 0], [1, 0, 0], [0, 3, 0], [0, 2.9, 0], [0, 0, 2]])
    even = PartCosts(np.ones(3), np.eye(3))
    assert even.most_telling(counts, 3) == [2, 4, 0]
    with pytest.raises(ConfigError, match="6 measurements of 5 networks"):
        even.most_telling(counts, 6)


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="1 machines are known, but two or more"):
        PartCosts.of_machines(COUNTS, {"one": COUNTS @ BASE})
    for latency, wanted in (
        (np.ones(3), "has 3 latencies of 300 networks"),
        (np.zeros(300), "not above 0"),
        (np.full(300, np.nan), "not finite"),
    ):
        with pytest.raises(MeasurementError, match=wanted):
            prior().given(COUNTS, latency)
