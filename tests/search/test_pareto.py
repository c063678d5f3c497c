"""Fronts, hypervolume and ADRS against closed forms, brute force, BoTorch's partitioning and Monte-Carlo."""

from __future__ import annotations

import pytest
import torch
from botorch.utils.multi_objective.box_decompositions.dominated import DominatedPartitioning
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_baqe.errors import ConfigError
from lightning_baqe.search import adrs, default_reference_point, hypervolume, pareto_mask


def points_of(n_objectives: int) -> st.SearchStrategy[list[list[int]]]:
    # A small grid: ties and duplicates are common.
    return st.lists(st.lists(st.integers(0, 4), min_size=n_objectives, max_size=n_objectives), min_size=1, max_size=25)


@given(points=st.integers(1, 4).flatmap(points_of))
@settings(max_examples=80, deadline=None)
def test_pareto_mask_equals_brute_force(points: list[list[int]]) -> None:
    expected = [not any(all(q <= p for q, p in zip(a, b, strict=True)) and a != b for a in points) for b in points]
    assert pareto_mask(torch.tensor(points, dtype=torch.float64)).tolist() == expected


def test_pareto_mask_marks_every_copy_and_works_in_blocks() -> None:
    assert pareto_mask(torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])).tolist() == [
        True,
        True,
        False,
        True,
    ]
    points = torch.rand(1500, 2, generator=torch.Generator().manual_seed(0))
    mask = pareto_mask(points)
    order = points[:, 0].argsort()
    best = torch.cat([torch.tensor([torch.inf]), points[order, 1].cummin(0).values[:-1]])
    assert torch.equal(mask[order], points[order, 1] < best)


@pytest.mark.parametrize(
    ("points", "reference", "expected"),
    [
        ([[1.0, 2.0], [2.0, 1.0]], [3.0, 3.0], 3.0),
        ([[0.0, 0.0, 0.0]], [1.0, 1.5, 1.1], 1.65),
        ([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5]], [1.0, 2.0, 3.0], 6.0),
        ([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], [2.0, 2.0, 2.0], 7.0),
        ([[3.0], [1.0], [9.0]], [4.0], 3.0),
        ([[1.0, 1.0], [1.0, 1.0]], [2.0, 2.0], 1.0),
        ([[4.0, 0.0], [0.0, 4.0]], [3.0, 3.0], 0.0),  # beyond the reference point on one side each
        ([[3.0, 0.0]], [3.0, 3.0], 0.0),
        ([[torch.inf, 0.0], [1.0, 1.0]], [3.0, 3.0], 4.0),
    ],
)
def test_hypervolume_closed_forms(points: list[list[float]], reference: list[float], expected: float) -> None:
    assert hypervolume(torch.tensor(points), reference) == pytest.approx(expected, abs=1e-12)


def test_hypervolume_of_nothing_is_zero() -> None:
    assert hypervolume(torch.empty(0, 3), [1.0, 1.0, 1.0]) == 0.0


@pytest.mark.parametrize("n_objectives", [2, 3, 4])
def test_hypervolume_equals_another_algorithm_and_sampling(n_objectives: int) -> None:
    generator = torch.Generator().manual_seed(n_objectives)
    points = torch.rand(30, n_objectives, generator=generator, dtype=torch.float64)
    reference = torch.full((n_objectives,), 0.9, dtype=torch.float64)
    value = hypervolume(points, reference)
    partitioned = DominatedPartitioning(ref_point=-reference, Y=-points).compute_hypervolume()
    assert value == pytest.approx(float(partitioned), rel=1e-9)
    samples = 0.9 * torch.rand(40_000, n_objectives, generator=generator, dtype=torch.float64)
    share = (samples[:, None, :] >= points).all(-1).any(1).double().mean()
    assert value == pytest.approx(float(share) * 0.9**n_objectives, abs=0.01)


def test_hypervolume_ignores_order_duplicates_and_units() -> None:
    points = torch.rand(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value = hypervolume(points, [1.0, 1.0, 1.0])
    assert hypervolume(torch.cat([points, points]).flip(0), [1.0, 1.0, 1.0]) == pytest.approx(value)
    units = torch.tensor([1.0, 1e3, 1e7], dtype=torch.float64)
    assert hypervolume(points * units, units) == pytest.approx(value * 1e10)


def test_adrs_closed_form() -> None:
    front = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert adrs(front, front) == 0.0
    assert adrs(torch.tensor([[0.0, 2.0], [4.0, 4.0]]), front) == pytest.approx((1 + 5) / 2)
    # The mean runs over what was found (eq. 16 as printed), so a found subset of the front has distance zero.
    assert adrs(front[:1], front) == 0.0
    assert adrs(front, front[:1]) > 0


def test_default_reference_point_lies_behind_the_front() -> None:
    values = torch.tensor([[0.0, 10.0], [1.0, 0.0], [5.0, 5.0]])
    assert default_reference_point(values).tolist() == pytest.approx([1.1, 11.0])
    assert default_reference_point(torch.tensor([[0.0, 2.0], [1.0, 4.0]])).tolist() == pytest.approx([0.1, 2.2])
    assert default_reference_point(torch.ones(3, 2)).tolist() == pytest.approx([1.1, 1.1])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: pareto_mask(torch.ones(3)), r"shape \(3,\)"),
        (lambda: pareto_mask(torch.tensor([[torch.nan, 1.0]])), "NaN in 1 rows"),
        (lambda: hypervolume(torch.ones(2, 3), [1.0, 1.0]), "wanted 3 finite numbers"),
        (lambda: hypervolume(torch.tensor([[-torch.inf, 0.0]]), [1.0, 1.0]), "infinite volume"),
        (lambda: adrs(torch.empty(0, 2), torch.ones(1, 2)), r"found has shape \(0, 2\)"),
        (lambda: adrs(torch.ones(1, 3), torch.ones(1, 2)), "the same m"),
        (lambda: default_reference_point(torch.empty(0, 2)), "at least one row"),
    ],
)
def test_errors_say_what_was_given_and_wanted(call: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        call()  # type: ignore[operator]
