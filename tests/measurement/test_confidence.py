"""The interval of the median: its definition by brute force, its coverage, and when sampling stops."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from lightning_baqe.measurement.confidence import median_interval, relative_half_width
from lightning_baqe.measurement.worker import BLOCK, sample


def _rank(count: int, level: Fraction) -> int:
    """The largest rank whose lower tail of Binomial(count, 1/2) is at most (1 - level) / 2, in exact arithmetic."""
    tail, rank = Fraction(0), 0
    while True:
        tail += Fraction(math.comb(count, rank), 2**count)
        if tail > (1 - level) / 2:
            return rank
        rank += 1


@given(st.integers(1, 300), st.sampled_from([0.5, 0.9, 0.95, 0.99]), st.randoms(use_true_random=False))
def test_ranks_are_those_of_the_definition(count: int, level: float, rng: object) -> None:
    values = list(range(count))
    rng.shuffle(values)  # type: ignore[attr-defined]
    rank = _rank(count, Fraction(level))
    wanted = (rank - 1, count - rank) if rank else (-math.inf, math.inf)
    assert median_interval(values, level) == wanted


def test_a_tail_that_is_met_exactly() -> None:
    assert median_interval([3.0, 1.0], level=0.5) == (1.0, 3.0)  # both below, or both above: a quarter each


@pytest.mark.parametrize(("count", "rank"), [(6, 1), (9, 2), (12, 3), (20, 6), (30, 10), (50, 18), (70, 27), (100, 40)])
def test_tabulated_ranks(count: int, rank: int) -> None:
    """At 95 %, as tables of the sign test have them."""
    assert median_interval(range(1, count + 1)) == (rank, count + 1 - rank)


def test_coverage() -> None:
    rng = np.random.default_rng(0)
    hits = sum(low <= 1.0 <= high for low, high in (median_interval(list(x)) for x in 2 ** rng.normal(size=(4000, 25))))
    assert 0.95 < hits / 4000 < 0.98  # the exact probability for 25 samples is 0.957


def test_it_is_about_as_wide_as_the_bootstrap() -> None:
    x = np.random.default_rng(1).lognormal(size=200)
    other = bootstrap((x,), np.median, n_resamples=999, method="percentile", rng=np.random.default_rng(2))
    low, high = median_interval(list(x))
    assert (high - low) / (other.confidence_interval.high - other.confidence_interval.low) == pytest.approx(1, abs=0.4)


def test_too_few_samples() -> None:
    assert median_interval([]) == median_interval([1.0] * 5) == (-math.inf, math.inf)
    assert relative_half_width([1.0] * 5, 1.0) == math.inf
    assert relative_half_width([1.0] * 6, 1.0) == 0


def test_sampling_stops_when_it_is_sure() -> None:
    rng = np.random.default_rng(3)
    asked: list[int] = []

    def block(count: int) -> list[float]:
        asked.append(count)
        return list(rng.normal(100.0, 5.0, count))

    found = sample(block, 25, 0.02, 60.0)
    assert asked[:3] == [BLOCK, BLOCK, 5]
    assert set(asked[3:]) <= {BLOCK}
    assert len(found["reference_us"]) == len(asked)
    sizes = list(itertools.accumulate(asked))
    widths = [
        relative_half_width(found["samples_us"][:n], float(np.median(found["samples_us"][:n]))) for n in sizes[2:]
    ]
    assert widths[-1] <= 0.02
    assert all(width > 0.02 for width in widths[:-1])
    assert len(sample(block, 7, None, 60.0)["samples_us"]) == 7


def test_sampling_gives_up_at_the_limit() -> None:
    noise = itertools.cycle([1.0, 100.0])
    found = sample(lambda count: [next(noise) for _ in range(count)], 6, 0.02, 0.05)
    assert len(found["samples_us"]) > 6
    assert relative_half_width(found["samples_us"], float(np.median(found["samples_us"]))) > 0.02
