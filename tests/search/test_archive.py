"""The archive against the definition of a Pareto front, whatever the order of the points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_baqe.errors import ConfigError
from lightning_baqe.search import hypervolume, pareto_mask
from lightning_baqe.search.archive import ParetoArchive, hypervolume_contributions

# Few values, so that ties and equal points are common.
POINTS = st.integers(1, 3).flatmap(
    lambda m: st.lists(st.tuples(*[st.integers(0, 4).map(float)] * m), min_size=1, max_size=14)
)


def front_of(points: list[tuple[float, ...]]) -> set[tuple[float, ...]]:
    mask = pareto_mask(torch.tensor(points, dtype=torch.float64)).tolist()
    return {point for point, kept in zip(points, mask, strict=True) if kept}


@given(POINTS)
def test_it_is_the_front_of_all_that_was_offered(points: list[tuple[float, ...]]) -> None:
    archive = ParetoArchive()
    for n, point in enumerate(points, 1):
        before = list(archive.points)
        joined, left = archive.offer(point)
        assert set(archive.points) == front_of(points[:n])
        assert len(set(archive.points)) == len(archive.points)  # of equal points one
        stayed = [p for i, p in enumerate(before) if i not in left]
        assert archive.points == stayed + [point] * joined


@given(POINTS, st.integers(1, 4))
@settings(deadline=None)
def test_a_bounded_archive_holds_points_of_the_true_front(points: list[tuple[float, ...]], size: int) -> None:
    archive = ParetoArchive(size)
    for n, point in enumerate(points, 1):
        archive = ParetoArchive(size, archive.points, archive.crowded_out)  # as after a resume
        archive.offer(point)
        true = front_of(points[:n])
        assert set(archive.points) <= true
        assert 1 <= len(archive.points) <= size
        assert set(archive.points) | set(archive.crowded_out) == true


def test_the_least_contribution_leaves() -> None:
    archive = ParetoArchive(3)
    for point in ((0.0, 10.0), (10.0, 0.0), (5.0, 4.9)):
        assert archive.offer(point)[0]
    assert archive.offer((5.1, 4.85)) == (False, [])  # adds little beside (5, 4.9)
    assert archive.offer((3.0, 3.0)) == (True, [2])


def test_contributions_sum_to_what_removing_one_costs() -> None:
    points = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.5, 0.5], [1.0, 1.0]])
    found = hypervolume_contributions(points)
    whole = hypervolume(points, [1.1, 1.1])
    for i in range(len(points)):
        rest = points[torch.arange(len(points)) != i]
        assert float(found[i]) == pytest.approx(whole - hypervolume(rest, [1.1, 1.1]))
    assert found.tolist()[1] == found.tolist()[3] == found.tolist()[4] == 0


@given(st.floats(1e-3, 1e6), st.floats(-1e3, 1e3))
def test_units_do_not_matter(scale: float, shift: float) -> None:
    points = torch.tensor([[0.0, 3.0], [1.0, 1.0], [2.0, 0.5], [4.0, 0.0]], dtype=torch.float64)
    moved = points * torch.tensor([scale, 1.0], dtype=torch.float64) + torch.tensor([shift, 0.0], dtype=torch.float64)
    assert torch.allclose(hypervolume_contributions(points), hypervolume_contributions(moved), atol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_size=0"):
        ParetoArchive(0)
    archive = ParetoArchive()
    with pytest.raises(ConfigError, match="finite"):
        archive.offer((float("nan"), 1.0))
    archive.offer((1.0, 2.0))
    with pytest.raises(ConfigError, match=r"\[1.0\]; wanted 2 finite numbers"):
        archive.offer((1.0,))
    with pytest.raises(ConfigError, match="at least one row"):
        hypervolume_contributions(torch.zeros(0, 2))
