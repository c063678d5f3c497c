"""Encoding of Optuna distributions, pools that span a space, and breeding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_baqe.errors import ConfigError
from lightning_baqe.search import SearchSpace, encode, spanning_pool
from lightning_baqe.search.pool import breed

MIXED: dict[str, BaseDistribution] = {
    "a_float": FloatDistribution(-1.0, 3.0),
    "b_log": FloatDistribution(1e-4, 1e-2, log=True),
    "c_step": FloatDistribution(0.2, 0.8, step=0.1),
    "d_int": IntDistribution(0, 1000),
    "e_int_log": IntDistribution(1, 64, log=True),
    "f_bits": CategoricalDistribution([8, 2, 4]),
    "g_layout": CategoricalDistribution(["nhwc", "nchw", None]),
    "h_flag": CategoricalDistribution([False, True]),
    "i_step": IntDistribution(0, 10, step=5),
}


def test_encoding_by_hand() -> None:
    point = {
        "a_float": 1.0,
        "b_log": 1e-3,
        "c_step": 0.5,
        "d_int": 250,
        "e_int_log": 8,
        "f_bits": 4,
        "g_layout": "nchw",
        "h_flag": True,
        "i_step": 10,
    }
    expected = [0.5, 0.5, 0.5, 0.25, 0.5, 0.5, 0.0, math.sqrt(0.5), 0.0, 1.0, 1.0]
    assert encode(MIXED, [point])[0].tolist() == pytest.approx(expected)
    assert encode(MIXED, []).shape == (0, 11)
    choices = [{"g": choice} for choice in ("x", "y")]
    x = encode({"g": CategoricalDistribution(["x", "y"])}, choices)
    assert float(torch.dist(x[0], x[1])) == pytest.approx(1.0)


@given(u=st.lists(st.floats(0, 1, exclude_max=True), min_size=9, max_size=9))
@settings(max_examples=100, deadline=None)
def test_internal_values_round_trip_and_lie_in_the_space(u: list[float]) -> None:
    space = SearchSpace(MIXED)
    row = space.from_unit(np.array([u]))[0]
    params = space.external(row)
    assert space.holds(params)
    assert all(MIXED[name]._contains(MIXED[name].to_internal_repr(value)) for name, value in params.items())
    assert space.internal(params) == tuple(row.tolist())
    columns = space.encode(row[None])
    assert bool(((columns >= 0) & (columns <= 1)).all())


def test_pool_is_unique_deterministic_and_inside() -> None:
    pool = spanning_pool(MIXED, 200, np.random.default_rng(0))
    assert len({tuple(map(str, point.values())) for point in pool}) == 200
    assert pool == spanning_pool(MIXED, 200, np.random.default_rng(0))
    assert all(SearchSpace(MIXED).holds(point) for point in pool)


def test_shares_of_a_choice_vary_from_candidate_to_candidate() -> None:
    space = {f"bits{i}": CategoricalDistribution([2, 4, 8]) for i in range(30)}
    pool = spanning_pool(space, 500, np.random.default_rng(0))
    share = np.array([[list(point.values()).count(choice) / 30 for choice in (2, 4, 8)] for point in pool])
    assert share.mean(0) == pytest.approx([1 / 3] * 3, abs=0.05)
    assert (share.max(0) > 0.95).all()  # nearly uniform candidates of each choice
    assert (share.std(0) > 0.25).all()  # independent draws would have about 0.09


@pytest.mark.parametrize("equal", [True, False])
def test_equal_distributions_share_and_others_do_not(equal: bool) -> None:
    groups = [[f"a{i}" for i in range(40)], [f"b{i}" for i in range(40)]]
    space = dict.fromkeys(groups[0], CategoricalDistribution([0, 1]))
    space |= dict.fromkeys(groups[1], CategoricalDistribution([0, 1] if equal else [1, 0]))
    pool = spanning_pool(space, 400, np.random.default_rng(0))
    means = np.array([[np.mean([point[name] for name in group]) for group in groups] for point in pool])
    correlation = np.corrcoef(means.T)[0, 1]
    assert correlation > 0.8 if equal else abs(correlation) < 0.2


def test_small_spaces_are_listed_whole() -> None:
    space = {"x": IntDistribution(0, 2), "y": CategoricalDistribution(["p", "q"])}
    pool = spanning_pool(space, 100, np.random.default_rng(0))
    assert sorted((point["x"], point["y"]) for point in pool) == [(x, y) for x in range(3) for y in "pq"]


def test_children_take_after_their_parents() -> None:
    space = SearchSpace({f"x{i}": IntDistribution(0, 9) for i in range(50)})
    parents = np.stack([np.zeros(50), np.full(50, 9.0)])
    children = breed(space, parents, 300, np.random.default_rng(0))
    assert children.shape == (300, 50)
    inherited = ((children == 0) | (children == 9)).mean()
    assert 0.93 < inherited < 1.0
    assert set(np.unique(children)) <= set(map(float, range(10)))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: SearchSpace({}), "search_space is empty"),
        (lambda: SearchSpace({"x": 3}), "x: 3; wanted"),  # type: ignore[dict-item]
        (lambda: encode(MIXED, [{"a_float": 0.0}]), "no value for"),
        (lambda: encode({"x": IntDistribution(0, 3)}, [{"x": 4}]), "x=4; wanted"),
        (lambda: spanning_pool(MIXED, 0, np.random.default_rng(0)), "n=0"),
    ],
)
def test_errors(call: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        call()
