"""`BaqeSampler`: the conformance suite in both modes, its phases, and that it finds better fronts than chance."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import Trial, TrialState
from sampler_conformance import DISCRETE, REFERENCE, SamplerConformance, discrete, minimised, point, suggest

from lightning_baqe.errors import ConfigError
from lightning_baqe.search import (
    ArdOptions,
    BaqeSampler,
    DeepKernelOptions,
    SamplerOptions,
    encode,
    hypervolume,
    spanning_pool,
    ted,
)

QUICK = SamplerOptions(
    deep_kernel=DeepKernelOptions(widths=(64, 16), steps=30),
    ard=ArdOptions(max_iterations=30),
    n_samples=32,
    children=40,
    rounds=2,
)
quick = partial(BaqeSampler, mode="paper", options=QUICK, n_initial=4, pool_size=60)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


class TestPaperMode(SamplerConformance):
    @pytest.fixture
    def sampler(self) -> Callable[..., BaseSampler]:
        return partial(quick, mode="paper")


class TestBeyondMode(SamplerConformance):
    @pytest.fixture
    def sampler(self) -> Callable[..., BaseSampler]:
        return partial(quick, mode="beyond")


def new_study(sampler: BaseSampler) -> optuna.Study:
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)


def run(sampler: BaseSampler, n_trials: int) -> optuna.Study:
    study = new_study(sampler)
    study.optimize(lambda trial: discrete(suggest(trial, DISCRETE)), n_trials=n_trials)
    return study


def phases(study: optuna.Study) -> list[str]:
    assert isinstance(study.sampler, BaqeSampler)
    return [study.sampler.phase(study, trial) for trial in study.trials]


def test_phases_with_and_without_a_known_space() -> None:
    assert phases(run(quick(search_space=DISCRETE), 7)) == ["ted"] * 4 + ["bo"] * 3
    assert phases(run(quick(), 8)) == ["random"] + ["ted"] * 4 + ["bo"] * 3


def test_first_trials_are_the_ted_picks_of_the_candidates_that_were_given() -> None:
    pool = spanning_pool(DISCRETE, 50, np.random.default_rng(7))
    picks = ted(encode(DISCRETE, pool), 4).tolist()
    for candidates in (pool, lambda n, rng: pool):
        study = run(quick(search_space=DISCRETE, candidates=candidates), 8)
        assert [trial.params for trial in study.trials[:4]] == [pool[index] for index in picks]
        assert all(trial.params in pool for trial in study.trials)


def test_failed_ted_picks_are_skipped_and_the_missing_ones_are_found_again() -> None:
    whole = [trial.params for trial in run(quick(search_space=DISCRETE), 4).trials]
    study = new_study(quick(search_space=DISCRETE))
    study.add_trial(optuna.create_trial(params=whole[1], distributions=DISCRETE, state=TrialState.FAIL))
    study.add_trial(optuna.create_trial(params=whole[2], distributions=DISCRETE, values=[0.0, 1.0]))
    study.optimize(lambda trial: discrete(suggest(trial, DISCRETE)), n_trials=3)
    assert [trial.params for trial in study.trials[2:4]] == [whole[0], whole[3]]
    assert phases(study) == ["given", "given", "ted", "ted", "bo"]


def test_a_proposal_that_was_not_suggested_yet_counts_as_taken() -> None:
    study = new_study(quick(search_space=DISCRETE))
    first = study.ask()
    first.suggest_categorical("bits0", [2, 4, 8])  # the others are not written yet
    second = study.ask(DISCRETE)
    assert second.params != suggest(first, DISCRETE)


def test_ted_goes_on_until_two_trials_are_complete() -> None:
    study = new_study(quick(search_space=DISCRETE))
    for number in range(8):
        trial = study.ask(DISCRETE)
        study.tell(trial, state=TrialState.FAIL) if number < 5 else study.tell(trial, discrete(trial.params))
    assert phases(study) == ["ted"] * 7 + ["bo"]


def test_a_used_up_pool_is_refilled_and_a_used_up_space_says_so() -> None:
    study = run(quick(search_space=DISCRETE, n_initial=2, pool_size=5), 9)
    assert len({point(trial) for trial in study.trials}) == 9
    space: dict[str, BaseDistribution] = {"x": IntDistribution(0, 2), "y": IntDistribution(0, 1)}
    small = optuna.create_study(sampler=quick(search_space=space))
    small.optimize(lambda trial: float(sum(suggest(trial, space).values())), n_trials=6)
    assert len({point(trial) for trial in small.trials}) == 6
    with pytest.warns(UserWarning, match="all 6 points"):
        small.ask(space)


def test_beyond_mode_leaves_the_pool() -> None:
    pool = spanning_pool(DISCRETE, 30, np.random.default_rng(0))
    study = run(quick(search_space=DISCRETE, mode="beyond", candidates=pool), 10)
    assert any(trial.params not in pool for trial in study.trials)
    assert len({point(trial) for trial in study.trials}) == 10


def test_directions_and_reference_point_mean_the_same_in_either_orientation() -> None:
    straight = new_study(quick(search_space=DISCRETE, reference_point=REFERENCE))
    straight.optimize(lambda trial: discrete(suggest(trial, DISCRETE)), n_trials=9)
    turned = optuna.create_study(
        directions=["minimize", "maximize"],
        sampler=quick(search_space=DISCRETE, reference_point=[-value for value in REFERENCE]),
    )
    turned.optimize(lambda trial: tuple(-value for value in discrete(suggest(trial, DISCRETE))), n_trials=9)
    assert [trial.params for trial in straight.trials] == [trial.params for trial in turned.trials]


def test_infeasible_trials_stay_off_the_front_and_are_avoided() -> None:
    space: dict[str, BaseDistribution] = {"x": IntDistribution(0, 40), "y": IntDistribution(0, 40)}

    def objective(trial: Trial, constrained: bool) -> tuple[float, float]:
        params = suggest(trial, space)
        if constrained:
            trial.set_constraint("x is at least 20", 20 - params["x"])
        return params["x"] + params["y"] / 10, 40 - params["x"] + params["y"]

    feasible = {}
    for constrained in (True, False):
        study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=quick(mode="beyond", search_space=space)
        )
        study.optimize(partial(objective, constrained=constrained), n_trials=12)
        feasible[constrained] = sum(trial.params["x"] >= 20 for trial in study.trials[4:])
    assert feasible[True] >= 6
    assert feasible[True] > feasible[False]


def test_trials_that_lack_a_constraint_are_left_out_with_a_warning() -> None:
    study = new_study(quick(search_space=DISCRETE))

    def three_trials() -> None:  # the last one sees a trial with a constraint and one without
        for number in range(3):
            trial = study.ask(DISCRETE)
            if number > 0:
                trial.set_constraint("size", 1.0)
            study.tell(trial, discrete(trial.params))

    with pytest.warns(UserWarning, match=r"1 complete trials lack .*'size'"):
        three_trials()


@pytest.mark.parametrize("mode", ["paper", "beyond"])
def test_finds_better_fronts_than_random_search(mode: Any) -> None:
    reference = [-REFERENCE[0], REFERENCE[1]]
    options = SamplerOptions(
        deep_kernel=DeepKernelOptions(widths=(200, 50, 16)), ard=ArdOptions(max_iterations=30), children=100
    )
    gains = []
    for seed in range(3):
        sampler = BaqeSampler(
            seed, mode, DISCRETE, n_initial=6, pool_size=200, reference_point=REFERENCE, options=options
        )
        ours = run(sampler, 18)
        theirs = run(RandomSampler(seed=seed), 18)
        gains.append(hypervolume(minimised(ours), reference) / hypervolume(minimised(theirs), reference))
    assert median(gains) > 1.05


def test_one_objective_reaches_the_minimum() -> None:
    study = optuna.create_study(sampler=quick(mode="beyond", search_space={"x": FloatDistribution(-2.0, 2.0)}))
    study.optimize(lambda trial: (trial.suggest_float("x", -2.0, 2.0) - 0.7) ** 2, n_trials=14)
    assert study.best_value < 1e-3


def test_a_sampler_can_be_pickled() -> None:
    sampler = quick(search_space=DISCRETE)
    run(sampler, 5)
    copy = pickle.loads(pickle.dumps(sampler))
    assert [trial.params for trial in run(copy, 6).trials] == [trial.params for trial in run(sampler, 6).trials]


def test_candidates_and_reference_point_are_checked_against_the_study() -> None:
    pool = spanning_pool(DISCRETE, 20, np.random.default_rng(0))
    for candidates, text in [
        ([{**pool[0], "more": 1}], "name \\['more'\\]"),
        ([{"bits0": 2}], "no value for"),
        ([{**pool[0], "bits0": 3}], "bits0=3; wanted"),
        (lambda n, rng: [], "gave none"),
    ]:
        with pytest.raises(ConfigError, match=text):
            run(quick(search_space=DISCRETE, candidates=candidates), 1)
    with pytest.raises(ConfigError, match="wanted 2 finite numbers"):
        run(quick(search_space=DISCRETE, reference_point=[1.0]), 6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mode": "best"}, "mode='best'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
        ({"n_initial": -1}, "n_initial=-1"),
        ({"n_initial": 20, "pool_size": 10}, "pool_size=10"),
        ({"candidates": []}, "empty list"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        BaqeSampler(**arguments)
    with pytest.raises(ConfigError, match="n_samples=0"):
        SamplerOptions(n_samples=0)
