"""Pruning for several objectives: no trial that would have reached the front is given up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from lightning_baqe.errors import ConfigError
from lightning_baqe.search import BaqeSampler, ParetoPruner, pareto_mask
from lightning_baqe.search.pruning import is_hopeless, optimistic, probable
from lightning_baqe.search.space import SearchSpace
from lightning_baqe.search.study_sampler import History

SPACE = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def matrix(points: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor(points, dtype=torch.float64)


@given(POINTS, st.tuples(st.integers(0, 6), st.integers(0, 6)))
@settings(max_examples=100, deadline=None)
def test_exact_promises_are_hopeless_where_they_are_dominated(
    points: list[tuple[int, int]], new: tuple[int, int]
) -> None:
    values, promise = matrix(points), matrix([new])[0]
    found = is_hopeless(optimistic(promise, values, values, (0.0, 0.0)), values)
    joined = torch.cat([values, promise[None]])
    assert found == (not bool(pareto_mask(joined)[-1]))


@given(POINTS, st.tuples(st.integers(0, 6), st.integers(0, 6)), st.floats(0.2, 3.0), st.floats(-2.0, 2.0))
@settings(max_examples=100, deadline=None)
def test_where_worse_promises_end_worse_only_dominated_trials_are_hopeless(
    points: list[tuple[int, int]], new: tuple[int, int], power: float, shift: float
) -> None:
    def ended(promises: torch.Tensor) -> torch.Tensor:  # any rising function of the first, the second as promised
        return torch.stack([promises[:, 0] ** power + shift, promises[:, 1]], dim=1)

    promises, promise = matrix(points), matrix([new])
    bound = optimistic(promise[0], promises, ended(promises), (None, 0.0))
    if is_hopeless(bound, ended(promises)):
        assert is_hopeless(ended(promise)[0], ended(promises))
    assert bound[0] <= ended(promise)[0, 0]
    assert (int((promises[:, 0] <= new[0]).sum()) >= 3) == bool(torch.isfinite(bound[0]))


def test_probable_values_are_those_of_the_nearest_promises() -> None:
    promises = matrix([(0, 5), (10, 5), (11, 5), (12, 5), (50, 5)])
    finals = matrix([(9, 1), (1, 1), (2, 1), (3, 1), (9, 1)])
    found = probable(torch.tensor([11.0, 4.0], dtype=torch.float64), promises, finals, (None, 0.1))
    assert found.tolist() == [2.0, 4.0]


def values_of(trial: optuna.Trial, maximised: bool) -> tuple[float, float]:
    """A front of its own for each half of x: y adds to both objectives."""
    x, y = trial.params["x"], trial.params["y"]
    second = 1 - x**0.5 + y
    return x + y, -second if maximised else second


@pytest.mark.parametrize("maximised", [False, True])
def test_a_study_prunes_what_is_dominated_and_nothing_else(maximised: bool) -> None:
    pruner = ParetoPruner(margins=(None, 0.05), warmup=4)
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(directions=["minimize", "maximize" if maximised else "minimize"], sampler=sampler)
    pruned: list[tuple[float, float]] = []

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        for name in SPACE:
            trial.suggest_float(name, 0, 1)
        first, second = values_of(trial, maximised)
        pruner.report(trial, 0, (3 * first + 1, second))
        if pruner.should_prune(trial):
            pruned.append((first, second))
            raise optuna.TrialPruned
        return first, second

    study.optimize(objective, n_trials=60)
    finished = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert len(pruned) == sum(trial.state == TrialState.PRUNED for trial in study.trials) > 20
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials[:4])
    sign = torch.tensor([1.0, -1.0 if maximised else 1.0])
    values = torch.tensor([trial.values for trial in finished]) * sign
    for one in pruned:
        assert is_hopeless(torch.tensor(one) * sign, values)


def test_later_rungs_have_promises_of_their_own() -> None:
    pruner = ParetoPruner(margins=(None, 0.0), warmup=2)
    study = optuna.create_study(directions=["minimize"] * 2)
    for value in (1.0, 2.0, 3.0):
        trial = study.ask()
        pruner.report(trial, 0, (10 * value, value))
        pruner.report(trial, 10, (value, value))  # after 9, though "10" < "9"
        study.tell(trial, [value, value])
    trial = study.ask()
    pruner.report(trial, 0, (3.5, 3.5))  # it looks better than all three did
    assert not pruner.should_prune(trial)
    pruner.report(trial, 9, (3.5, 3.5))  # a rung that nobody has seen
    assert not pruner.should_prune(trial)
    pruner.report(trial, 10, (3.5, 3.5))  # all three, of which the best ended with (1, 1), looked better
    assert pruner.should_prune(trial)


def test_the_sampler_learns_from_pruned_trials_and_keeps_them_off_the_front() -> None:
    pruner = ParetoPruner(margins=(None, 0.0), warmup=3)
    sampler = BaqeSampler(seed=0, mode="beyond", search_space=SPACE, n_initial=6, pool_size=40)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    for _ in range(16):
        trial = study.ask(SPACE)
        first, second = values_of(trial, False)
        pruner.report(trial, 0, (first, second))
        if pruner.should_prune(trial):
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, [first, second])
    history = History.read(study, SearchSpace(SPACE), exclude=-1)
    states = [trial.state for trial in study.trials]
    assert history.finished.tolist() == [state == TrialState.COMPLETE for state in states]
    assert TrialState.PRUNED in states
    assert len(history.values) == 16
    assert (history.feasible == history.finished).all()
    np.testing.assert_allclose(history.values[history.finished][0], study.trials[0].values)


@pytest.mark.parametrize("feasible", [True, False])
def test_what_breaks_a_constraint_dominates_nothing(feasible: bool) -> None:
    pruner = ParetoPruner(margins=(0.0, 0.0), warmup=2)
    study = optuna.create_study(directions=["minimize"] * 2)
    for value in (1.0, 2.0):
        trial = study.ask()
        pruner.report(trial, 0, (value, value))
        trial.set_constraint("limit", -1.0 if feasible else 1.0)
        study.tell(trial, [value, value])
    trial = study.ask()
    pruner.report(trial, 0, (3.0, 3.0))
    assert pruner.should_prune(trial) == feasible


def test_pruned_trials_without_expectations_are_points_that_were_tried() -> None:
    study = optuna.create_study(directions=["minimize"] * 2)
    study.tell(study.ask(SPACE), state=TrialState.PRUNED)
    history = History.read(study, SearchSpace(SPACE), exclude=-1)
    assert (len(history.rows), len(history.seen)) == (0, 1)


@pytest.mark.parametrize(("margins", "warmup"), [((), 5), ((None, -0.1), 5), ((None, 1.0), 5), ((None, None), 1)])
def test_wrong_arguments_are_refused(margins: tuple[float | None, ...], warmup: int) -> None:
    with pytest.raises(ConfigError, match="wanted one margin an objective"):
        ParetoPruner(margins, warmup)


def test_wrong_promises_are_refused() -> None:
    pruner = ParetoPruner((None, None))
    trial = optuna.create_study(directions=["minimize"] * 2).ask()
    with pytest.raises(ConfigError, match="has promised nothing"):
        pruner.should_prune(trial)
    with pytest.raises(ConfigError, match="1 promised values"):
        pruner.report(trial, 0, (1.0,))
    with pytest.raises(ConfigError, match="finite"):
        pruner.report(trial, 0, (1.0, float("nan")))
    with pytest.raises(ConfigError, match="for 3 objectives"):
        pruner.report(optuna.create_study(directions=["minimize"] * 3).ask(), 0, (1.0, 2.0))
