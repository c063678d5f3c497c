"""Simulated annealing over boosted trees: BAQE's second baseline, AutoTVM's strategy, for several objectives.

The paper says "SA with XGBoost as the performance prediction model, which is the strategy of TVM", and not how three
objectives become the one that XGBoost ranks. Here each trial draws random weights and the model ranks the augmented
Chebyshev value, as ParEGO does, so that proposals spread along the front.

| symbol | meaning                                                             | shape |
| ------ | ------------------------------------------------------------------- | ----- |
| Y      | observed objectives, minimised, each scaled to [0, 1]               | n x m |
| w      | weights of the trial, uniform on the simplex                        | m     |
| s      | max_k w_k Y_k + 0.05 sum_k w_k Y_k, the value that is ranked        | n     |

Chen et al., "Learning to Optimize Tensor Programs", NeurIPS 2018 (AutoTVM). Knowles, "ParEGO", IEEE Transactions on
Evolutionary Computation 10 (1), 2006, eq. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.study import Study

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.baselines import PoolBaseline, fresh_point
from lightning_baqe.search.space import Distributions, Key, Rows, SearchSpace
from lightning_baqe.search.study_sampler import History

_RHO = 0.05  # ParEGO's weight of the sum


@dataclass(frozen=True)
class AnnealingOptions:
    """AutoTVM's settings, but for `trees` and `steps`, which are enough for some tens of trials.

    Attributes:
        chains: that anneal side by side.
        steps: of each chain; the temperature falls from 1 to 0.
        epsilon: share of random proposals.
        trees: of the model.
        depth: of a tree.
    """

    chains: int = 128
    steps: int = 250
    epsilon: float = 0.05
    trees: int = 60
    depth: int = 3

    def __post_init__(self) -> None:
        if min(self.chains, self.steps, self.trees, self.depth) < 1 or not 0 <= self.epsilon <= 1:
            raise ConfigError(f"{self}; wanted whole numbers of at least 1, and epsilon in [0, 1]")


class AnnealingSampler(PoolBaseline):
    """XGBoost ranks the trials by a random scalarisation; simulated annealing finds the point it ranks first.

    AutoTVM proposes batches of 64 from one model; here each trial has its own model, which only helps. AutoTVM's
    chains go on where the last batch left them; here half of them start at trials of the study, which is the only
    memory, and half at random. Infeasible trials rank after all feasible ones, by how far they miss.

    Args:
        seed, search_space, candidates, n_initial: see `PoolBaseline`.
        options: the rest.
    """

    def __init__(
        self,
        seed: int = 0,
        search_space: Distributions | None = None,
        candidates: Sequence[Mapping[str, Any]] | None = None,
        n_initial: int = 10,
        options: AnnealingOptions | None = None,
    ) -> None:
        super().__init__(seed, search_space, candidates, n_initial)
        self.options = options or AnnealingOptions()

    def _model_point(self, study: Study, number: int, space: SearchSpace, history: History) -> Key | None:
        rng = self._rng(6, number)
        if rng.random() < self.options.epsilon:
            return fresh_point(space, history, rng)
        weights = rng.dirichlet(np.ones(history.values.shape[1]))
        x, places = space.encode(history.rows).numpy(), ranks(history, weights)
        model = _ranker(x, places, self._derived(7, number), self.options)
        return _anneal(space, model, history, rng, self.options)


def ranks(history: History, weights: Rows) -> Rows:
    """The place of each of `n` trials by `m` weights, n - 1 for the best one, down to 0; equal ones share a place."""
    values = history.values.numpy()
    low, high = values.min(0), values.max(0)
    weighted = weights * (values - low) / np.where(high > low, high - low, 1.0)
    scalar = weighted.max(1) + _RHO * weighted.sum(1)
    missed = history.constraints.clamp_min(0).numpy()
    largest = missed.max(0, initial=0.0)
    scalar = scalar + 2.0 * (missed / np.where(largest > 0, largest, 1.0)).sum(1)
    scalar = scalar + np.where(history.feasible.numpy(), 0.0, 2.0)  # a feasible value is below 1 + _RHO
    return np.asarray((scalar[None, :] > scalar[:, None]).sum(1), dtype=np.float64)


def _ranker(x: Rows, places: Rows, seed: int, options: AnnealingOptions) -> Callable[[Rows], Rows]:
    import xgboost  # slow to load, and one sampler needs it

    settings = {
        "objective": "rank:pairwise",
        "max_depth": options.depth,
        "eta": 0.3,
        "gamma": 1e-4,
        "lambda": 1.0,
        "nthread": 1,
        "seed": seed,
    }
    data = xgboost.DMatrix(x, places, qid=np.zeros(len(x), dtype=np.int64))
    booster = xgboost.train(settings, data, num_boost_round=options.trees)
    return lambda rows: np.asarray(booster.inplace_predict(rows), dtype=np.float64)


def _anneal(
    space: SearchSpace,
    predict: Callable[[Rows], Rows],
    history: History,
    rng: np.random.Generator,
    options: AnnealingOptions,
) -> Key | None:
    """The point with the highest prediction among those that the chains met and no trial holds."""
    n, d = options.chains, len(space.names)
    best: tuple[float, Key | None] = (-np.inf, None)

    def scored(rows: Rows) -> Rows:
        nonlocal best
        scores = predict(space.encode(rows).numpy())
        for index in np.argsort(-scores, kind="stable")[: int((scores > best[0]).sum())]:
            key = tuple(rows[index].tolist())
            if key not in history.seen:
                best = (float(scores[index]), key)
                break
        return scores

    points = space.from_unit(rng.random((n, d)))
    points[: n // 2] = history.rows[rng.integers(len(history.rows), size=n // 2)]
    energy = scored(points)
    for step in range(options.steps):
        temperature = 1.0 - step / options.steps
        moved = points.copy()
        which = rng.integers(d, size=n)
        moved[np.arange(n), which] = space.from_unit(rng.random((n, d)))[np.arange(n), which]
        reached = scored(moved)
        accepted = rng.random(n) < np.exp(np.minimum(0.0, (reached - energy) / (temperature + 1e-5)))
        points[accepted], energy[accepted] = moved[accepted], reached[accepted]
    return best[1]
