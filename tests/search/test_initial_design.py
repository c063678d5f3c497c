"""TED against a greedy search that computes the objective of eq. 7 from scratch for each candidate set."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search import median_distance, rbf, ted


def trace_objective(k: Tensor, chosen: list[int], mu: float) -> float:
    """Tr(K_VX (K_XX + mu I)^-1 K_XV), BAQE eq. 7."""
    cross = k[:, chosen]
    inner = k[chosen][:, chosen] + mu * torch.eye(len(chosen), dtype=k.dtype)
    return float(torch.trace(cross @ torch.linalg.solve(inner, cross.T)))


@given(seed=st.integers(0, 10_000), mu=st.sampled_from([0.01, 0.1, 1.0]), n=st.integers(2, 16))
@settings(max_examples=30, deadline=None)
def test_each_choice_maximises_eq_7(seed: int, mu: float, n: int) -> None:
    points = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = rbf(points, points)
    chosen = ted(points, min(n, 6), mu=mu).tolist()
    for step, index in enumerate(chosen):
        rest = [i for i in range(n) if i not in chosen[:step]]
        values = {i: trace_objective(k, [*chosen[:step], i], mu) for i in rest}
        assert values[index] >= max(values.values()) - 1e-8


def test_choices_are_distinct_and_nested() -> None:
    points = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    everything = ted(points, 40).tolist()
    assert sorted(everything) == list(range(40))
    assert ted(points, 10).tolist() == everything[:10]
    assert ted(points, 0).tolist() == []


def test_ties_go_to_the_lowest_index() -> None:
    assert ted(torch.ones(5, 2), 3).tolist() == [0, 1, 2]
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert ted(square, 4).tolist()[:2] == [0, 3]


def test_choices_spread_over_clusters() -> None:
    generator = torch.Generator().manual_seed(3)
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    points = (centres[:, None] + 0.02 * torch.randn(4, 25, 2, generator=generator)).reshape(100, 2)
    assert {index // 25 for index in ted(points, 4).tolist()} == {0, 1, 2, 3}


def test_any_kernel_and_it_is_left_alone() -> None:
    points = torch.rand(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    linear = points @ points.T
    before = linear.clone()
    chosen = ted(points, 5, kernel=lambda x, y: linear)
    assert torch.equal(linear, before)
    assert int(chosen[0]) == int((linear.square().sum(0) / (linear.diagonal() + 0.1)).argmax())
    assert ted(points, 5, kernel=functools.partial(rbf, sigma=0.3)).shape == (5,)


def test_rbf_closed_form() -> None:
    x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert rbf(x, y, sigma=5.0).tolist() == [pytest.approx([0.6065306597126334, 1.0])]
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0
    assert median_distance(torch.ones(4, 2)) == 1.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"m": 4}, "m=4 with 3 candidates"),
        ({"m": -1}, "m=-1"),
        ({"m": 1, "mu": 0.0}, "mu=0.0"),
        ({"m": 1, "kernel": lambda x, y: torch.ones(2, 2)}, r"shape \(2, 2\)"),
        ({"m": 1, "kernel": functools.partial(rbf, sigma=0.0)}, "sigma=0.0"),
    ],
)
def test_errors(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ted(torch.rand(3, 2), **arguments)  # type: ignore[arg-type]
