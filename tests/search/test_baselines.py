"""The baselines: all of them pass the conformance suite, and what each is said to do."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState
from sampler_conformance import DISCRETE, SamplerConformance, discrete, minimised, point, suggest

from lightning_baqe.errors import ConfigError
from lightning_baqe.search import (
    AnnealingOptions,
    AnnealingSampler,
    ArdOptions,
    BaqeSampler,
    DeepKernelOptions,
    NoisyImprovementOptions,
    NoisyImprovementSampler,
    PoolSearch,
    SamplerOptions,
    gaussian_process,
    hypervolume,
    nsga2,
    random_search,
    spanning_pool,
    tpe,
)
from lightning_baqe.search.annealing import ranks
from lightning_baqe.search.noisy_improvement import climb
from lightning_baqe.search.space import SearchSpace
from lightning_baqe.search.study_sampler import History

BASELINES: dict[str, Callable[..., BaseSampler]] = {
    "random": random_search,
    "pool": PoolSearch,
    "tpe": partial(tpe, n_initial=4),
    "nsga2": partial(nsga2, population=3),
    "gp": partial(gaussian_process, n_initial=4),
    "annealing": partial(AnnealingSampler, n_initial=4, options=AnnealingOptions(chains=16, steps=20, trees=10)),
    "nehvi": partial(
        NoisyImprovementSampler,
        n_initial=4,
        options=NoisyImprovementOptions(n_samples=8, raw_samples=16, restarts=1, max_iterations=10),
    ),
    "without_ted": partial(
        BaqeSampler,
        initial="random",
        n_initial=4,
        pool_size=60,
        options=SamplerOptions(
            deep_kernel=DeepKernelOptions(widths=(64, 16), steps=10),
            ard=ArdOptions(max_iterations=10),
            n_samples=32,
        ),
    ),
}
LEARNING = [name for name in BASELINES if name not in ("random", "pool")]


@pytest.mark.filterwarnings("ignore:Clip non-finite values")  # of Optuna's GPSampler, about what a test tells it
@pytest.mark.parametrize("baseline", BASELINES)
class TestBaselines(SamplerConformance):
    @pytest.fixture
    def sampler(self, baseline: str) -> Callable[..., BaseSampler]:
        return BASELINES[baseline]


def run(sampler: BaseSampler, n_trials: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    study.optimize(lambda trial: discrete(suggest(trial, DISCRETE)), n_trials=n_trials)
    return study


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_small_space_is_used_up_before_a_point_comes_twice(baseline: str) -> None:
    space: dict[str, BaseDistribution] = {"x": IntDistribution(0, 2), "y": IntDistribution(0, 2)}
    study = optuna.create_study(sampler=BASELINES[baseline](search_space=space))
    study.optimize(lambda trial: float(sum(suggest(trial, space).values())), n_trials=9)
    assert len({point(trial) for trial in study.trials}) == 9
    with pytest.warns(UserWarning, match="all 9 points"):
        study.ask(space)


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_can_be_pickled(baseline: str) -> None:
    sampler = BASELINES[baseline](search_space=DISCRETE)
    copy = pickle.loads(pickle.dumps(sampler))
    assert [trial.params for trial in run(copy, 6).trials] == [trial.params for trial in run(sampler, 6).trials]


# Optuna's NSGA-II breaks ties between ends of a front by an order that follows the sign.
@pytest.mark.parametrize("baseline", [name for name in LEARNING if name != "nsga2"])
def test_directions_mean_the_same_in_either_orientation(baseline: str) -> None:
    straight = run(BASELINES[baseline](search_space=DISCRETE), 8)
    turned = optuna.create_study(
        directions=["minimize", "maximize"], sampler=BASELINES[baseline](search_space=DISCRETE)
    )
    turned.optimize(lambda trial: tuple(-value for value in discrete(suggest(trial, DISCRETE))), n_trials=8)
    assert [trial.params for trial in straight.trials] == [trial.params for trial in turned.trials]


@pytest.mark.parametrize("baseline", ["annealing", "nehvi", "gp", "tpe"])
def test_constraints_are_learned(baseline: str) -> None:
    space: dict[str, BaseDistribution] = {"x": IntDistribution(0, 40), "y": IntDistribution(0, 40)}

    def objective(trial: Trial, constrained: bool) -> tuple[float, float]:
        params = suggest(trial, space)
        if constrained:
            trial.set_constraint("x is at least 20", 20 - params["x"])
        return params["x"] + params["y"] / 10, 5 - params["x"] / 8 + params["y"]

    feasible = {}
    for constrained in (True, False):
        total = 0
        for seed in range(3):
            sampler = BASELINES[baseline](seed=seed, search_space=space)
            study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
            study.optimize(partial(objective, constrained=constrained), n_trials=14)
            total += sum(trial.params["x"] >= 20 for trial in study.trials[4:])
        feasible[constrained] = total
    assert feasible[True] > feasible[False]


@pytest.mark.parametrize("baseline", ["annealing", "nehvi"])
def test_finds_better_fronts_than_random_search(baseline: str) -> None:
    reference, gains = [0.0, 2.2], []
    for seed in range(3):
        options: dict[str, Any] = {
            "annealing": {"chains": 32, "steps": 50},
            "nehvi": {"n_samples": 16, "raw_samples": 64, "restarts": 1},
        }[baseline]
        known = AnnealingOptions(**options) if baseline == "annealing" else NoisyImprovementOptions(**options)
        kind: Any = AnnealingSampler if baseline == "annealing" else NoisyImprovementSampler
        ours = run(kind(seed, DISCRETE, n_initial=6, options=known), 18)
        theirs = run(random_search(seed, DISCRETE), 18)
        gains.append(hypervolume(minimised(ours), reference) / hypervolume(minimised(theirs), reference))
    assert sorted(gains)[1] > 1.0


@given(seed=st.integers(0, 1000), avoided=st.integers(0, 30))
def test_local_search_ends_where_no_neighbour_is_better(seed: int, avoided: int) -> None:
    rng = np.random.default_rng(seed)
    names = "abcde"
    space = SearchSpace({name: CategoricalDistribution((1, 2, 3)) for name in names})
    pairs = rng.normal(size=(5, 5, 3, 3))  # every pair of parameters has its say

    def values_of(rows: Any) -> Any:
        index = rows.astype(int)
        return sum(pairs[i, j, index[:, i], index[:, j]] for i in range(5) for j in range(5))

    every = np.array([*itertools.product(range(3), repeat=5)], dtype=float)
    seen = {tuple(row.tolist()) for row in every[rng.choice(len(every), avoided, replace=False)]}
    start = next(row for row in every[rng.permutation(len(every))] if tuple(row.tolist()) not in seen)
    row, value = climb(values_of, space, start, float(values_of(start[None])[0]), seen, 0.0)
    assert tuple(row.tolist()) not in seen
    assert value == pytest.approx(float(values_of(row[None])[0]))
    near = [other for other in every if (other != row).sum() == 1 and tuple(other.tolist()) not in seen]
    assert not near or value >= values_of(np.array(near)).max() - 1e-12


def test_without_ted_the_first_points_are_others_of_the_same_pool() -> None:
    pool = spanning_pool(DISCRETE, 60, np.random.default_rng(3))
    picked = {}
    for initial in ("ted", "random"):
        sampler = BaqeSampler(0, "paper", DISCRETE, pool, n_initial=5, initial=initial)  # type: ignore[arg-type]
        study = run(sampler, 5)
        assert all(trial.params in pool for trial in study.trials)
        assert [sampler.phase(study, trial) for trial in study.trials] == [initial] * 5
        picked[initial] = {point(trial) for trial in study.trials}
    assert picked["ted"] != picked["random"]


def test_initial_points_of_the_pool_baselines_are_of_the_pool() -> None:
    pool = spanning_pool(DISCRETE, 60, np.random.default_rng(3))
    for kind in (AnnealingSampler, NoisyImprovementSampler):
        study = run(kind(0, DISCRETE, pool, n_initial=5), 5)
        assert all(trial.params in pool for trial in study.trials)
    assert all(trial.params in pool for trial in run(PoolSearch(0, DISCRETE, pool), 12).trials)


def test_ranks_put_infeasible_trials_last_and_follow_the_weights() -> None:
    history = History(
        rows=np.zeros((4, 1)),
        values=torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.0, 0.0]], dtype=torch.float64),
        constraints=torch.tensor([[-1.0], [0.0], [0.0], [2.0]], dtype=torch.float64),
        seen=set(),
        pending=np.zeros((0, 1)),
        finished=torch.ones(4, dtype=torch.bool),
    )
    assert ranks(history, np.array([1.0, 0.0])).tolist() == [3.0, 1.0, 2.0, 0.0]
    assert ranks(history, np.array([0.0, 1.0])).tolist() == [1.0, 3.0, 2.0, 0.0]
    assert ranks(history, np.array([0.5, 0.5])).tolist()[2] == 3.0


def test_failed_trials_do_not_count_as_learned() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=BASELINES["annealing"]())
    for _ in range(6):
        study.tell(study.ask(DISCRETE), state=TrialState.FAIL)
    sampler = study.sampler
    assert isinstance(sampler, AnnealingSampler)
    assert {sampler.phase(study, trial) for trial in study.trials} == {"random"}


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match="n_initial=1"):
        AnnealingSampler(n_initial=1)
    with pytest.raises(ConfigError, match="seed=-1"):
        random_search(-1)
    with pytest.raises(ConfigError, match="epsilon=2"):
        AnnealingOptions(epsilon=2.0)
    with pytest.raises(ConfigError, match="restarts=0"):
        NoisyImprovementOptions(restarts=0)
    with pytest.raises(ConfigError, match="initial='sobol'"):
        BaqeSampler(initial="sobol")  # type: ignore[arg-type]
