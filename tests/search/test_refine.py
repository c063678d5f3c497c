"""Gradient steps move continuous parameters to an optimum, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor

from lightning_baqe.search.acquisition import refine
from lightning_baqe.search.space import SearchSpace

MIXED: dict[str, BaseDistribution] = {
    "bits": CategoricalDistribution([2, 4, 8]),
    "layout": CategoricalDistribution(["nchw", "nhwc"]),  # two columns
    "rate": FloatDistribution(1e-4, 1.0, log=True),
    "share": FloatDistribution(0.0, 1.0, step=0.25),
    "tile": IntDistribution(1, 64),
    "x": FloatDistribution(-2.0, 2.0),
}


def test_continuous_parameters_reach_the_optimum_and_the_others_stay() -> None:
    space = SearchSpace(MIXED)
    best = {"bits": 4, "layout": "nhwc", "rate": 0.01, "share": 0.5, "tile": 3, "x": 0.5}
    goal = space.encode(np.array([space.internal(best)]))

    def score(x: Tensor) -> Tensor:
        return -(x - goal).square().sum(-1)

    rows = space.from_unit(np.random.default_rng(0).random((4, len(space.names))))
    moved = refine(space, rows, score)
    for before, after in zip(rows, moved, strict=True):
        old, new = space.external(before), space.external(after)
        assert new == {**old, "rate": pytest.approx(0.01, rel=1e-3), "x": pytest.approx(0.5, abs=1e-3)}
    assert bool((score(space.encode(moved)) >= score(space.encode(rows))).all())


def test_an_optimum_outside_ends_at_the_border() -> None:
    space = SearchSpace({"x": FloatDistribution(-2.0, 2.0)})
    assert refine(space, np.array([[0.3]]), lambda x: x.sum(-1)).item() == pytest.approx(2.0)


def test_nothing_moves_in_a_discrete_space() -> None:
    space = SearchSpace({"bits": CategoricalDistribution([2, 4, 8])})
    rows = np.array([[0.0], [2.0]])
    assert refine(space, rows, lambda x: torch.zeros(len(x))) is rows
