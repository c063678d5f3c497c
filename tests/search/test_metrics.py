"""Figures that searches are compared by: closed forms, other implementations, and what must hold of any input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_baqe.errors import ConfigError
from lightning_baqe.search import hypervolume
from lightning_baqe.search.metrics import (
    bands,
    bootstrap_interval,
    compare_paired,
    found_points,
    holm,
    hypervolume_curve,
    trials_to_reach,
)

FRONT = torch.tensor([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)


def test_found_points_are_distinct_points_of_the_front() -> None:
    found = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 3.0]])
    assert found_points(found, FRONT).tolist() == [False, True, False]
    assert found_points(found, torch.cat([FRONT, FRONT])).tolist() == [False, True, False]
    assert found_points(FRONT + 1e-12, FRONT).all()
    assert found_points(found[:0], FRONT).tolist() == [False] * 3


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), n=st.integers(1, 12), m=st.integers(1, 3))
def test_the_curve_is_the_hypervolume_of_each_beginning(seed: int, n: int, m: int) -> None:
    values = torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.2
    curve = hypervolume_curve(values, [1.0] * m)
    for index in range(n):
        assert float(curve[index]) == pytest.approx(hypervolume(values[: index + 1], [1.0] * m), abs=1e-12)
    assert bool((curve.diff() >= 0).all())


def test_a_failed_trial_leaves_the_curve_flat() -> None:
    values = torch.tensor([[0.5, 0.5], [torch.inf, torch.inf], [0.25, 0.5]], dtype=torch.float64)
    assert hypervolume_curve(values, [1.0, 1.0]).tolist() == pytest.approx([0.25, 0.25, 0.375])


def test_trials_to_reach() -> None:
    curve = torch.tensor([0.1, 0.5, 0.5, 0.9])
    assert trials_to_reach(curve, 0.5) == 2
    assert trials_to_reach(curve, 0.95) is None


def test_bands_are_quartiles() -> None:
    assert bands([torch.full((2,), float(value)) for value in range(5)]).tolist() == [[1, 1], [2, 2], [3, 3]]
    with pytest.raises(ConfigError, match="lengths"):
        bands([torch.zeros(2), torch.zeros(3)])


def test_paired_comparison_by_hand() -> None:
    # Six pairs, all in favour: the exact two-sided p is 2 / 2**6.
    won = compare_paired([2, 3, 4, 5, 6, 8], [1, 1, 1, 1, 1, 1])
    assert won.p == pytest.approx(2 / 64)
    assert (won.effect, won.difference) == (1.0, 3.5)
    # Ranks 1 (against) and 2 (for): (2 - 1) / 3.
    assert compare_paired([0.0, 3.0], [1.0, 1.0]).effect == pytest.approx(1 / 3)
    assert compare_paired([1.0, 1.0], [1.0, 1.0]).p == 1.0


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_paired_comparison_is_antisymmetric(pairs: list[tuple[float, float]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    forth, back = compare_paired(first, second), compare_paired(second, first)
    assert forth.p == pytest.approx(back.p)
    assert forth.effect == pytest.approx(-back.effect)
    assert 0 <= forth.p <= 1
    assert -1 <= forth.effect <= 1


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8})["a"] == 1.0
    assert holm({}) == {}


def test_bootstrap_interval_holds_the_mean_and_is_reproducible() -> None:
    figures = [0.9, 1.0, 1.05, 1.1]
    low, high = bootstrap_interval(figures)
    assert min(figures) <= low < sum(figures) / 4 < high <= max(figures)
    assert bootstrap_interval(figures) == (low, high)
    assert bootstrap_interval([1.0, 1.0]) == (1.0, 1.0)
    with pytest.raises(ConfigError, match="0 figures"):
        bootstrap_interval([])
