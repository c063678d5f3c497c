"""What every sampler of this package must do. A sampler's tests inherit `SamplerConformance` and define `sampler`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState

MIXED: dict[str, BaseDistribution] = {
    "bits": CategoricalDistribution([2, 4, 8]),
    "layout": CategoricalDistribution(["nchw", "nhwc"]),
    "rate": FloatDistribution(1e-4, 1.0, log=True),
    "share": FloatDistribution(0.0, 1.0, step=0.25),
    "tile": IntDistribution(1, 64, log=True),
    "unroll": IntDistribution(0, 12, step=4),
    "x": FloatDistribution(-2.0, 2.0),
}
DISCRETE: dict[str, BaseDistribution] = {f"bits{i}": CategoricalDistribution([2, 4, 8]) for i in range(12)} | {
    f"tile{i}": IntDistribution(0, 3) for i in range(6)
}
REFERENCE = [0.0, 2.2]  # of `discrete`: worst accuracy, worst latency


def mixed(params: Mapping[str, Any]) -> float:
    layout = 0.5 if params["layout"] == "nhwc" else 0.0
    return params["x"] ** 2 + params["rate"] + params["tile"] / 64 + layout + params["share"] + 1 / params["bits"]


def discrete(params: Mapping[str, Any]) -> tuple[float, float]:
    """Accuracy (maximise) and latency (minimise) of a made-up network."""
    bits = np.array([params[f"bits{i}"] for i in range(12)])
    tiles = np.array([params[f"tile{i}"] for i in range(6)])
    accuracy = 1 - float(np.mean(2.0 ** -(bits / 2) * np.linspace(0.5, 2.0, 12)))
    latency = float(np.mean(bits) / 8 + 0.2 * np.mean(np.abs(tiles - np.arange(6) % 4)))
    return accuracy, latency


def suggest(trial: Trial, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    return {name: trial._suggest(name, distribution) for name, distribution in space.items()}


def point(trial: FrozenTrial) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(trial.params.items()))


def minimised(study: optuna.Study) -> torch.Tensor:
    signs = [1 if direction == optuna.study.StudyDirection.MINIMIZE else -1 for direction in study.directions]
    complete = study.get_trials(states=[TrialState.COMPLETE])
    return torch.tensor([trial.values for trial in complete], dtype=torch.float64) * torch.tensor(signs)


class SamplerConformance:
    """Inherit, and define the fixture `sampler`: keyword arguments -> a sampler, quick, with at most 5 initial points.

    The keyword arguments that are used here: `seed`, `search_space`.
    """

    repeats_points = False  # whether the sampler may propose a point twice in a space with enough points

    @pytest.fixture(autouse=True)
    def _quiet(self) -> Iterator[None]:
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        yield
        optuna.logging.set_verbosity(level)

    @pytest.fixture
    def sampler(self) -> Callable[..., BaseSampler]:
        raise NotImplementedError

    @pytest.mark.filterwarnings("ignore:all .* points that the search could draw were tried")  # small spaces
    @pytest.mark.parametrize("known", [True, False])
    @pytest.mark.parametrize("names", [[name] for name in MIXED] + [list(MIXED)], ids=lambda names: "+".join(names))
    def test_values_lie_in_their_distributions(
        self, sampler: Callable[..., BaseSampler], names: list[str], known: bool
    ) -> None:
        space = {name: MIXED[name] for name in names}
        study = optuna.create_study(sampler=sampler(seed=0, search_space=space if known else None))
        for number in range(7):
            trial = study.ask(space)
            for name, distribution in space.items():
                value = trial.params[name]
                assert distribution._contains(distribution.to_internal_repr(value))
                if isinstance(distribution, CategoricalDistribution):
                    assert value in distribution.choices
                else:
                    assert type(value) is (int if isinstance(distribution, IntDistribution) else float)
            study.tell(trial, float(number % 3))

    @pytest.mark.parametrize(
        "directions", [["maximize"], ["maximize", "minimize"], ["minimize", "maximize", "minimize"]]
    )
    def test_any_directions(self, sampler: Callable[..., BaseSampler], directions: list[str]) -> None:
        study = optuna.create_study(directions=directions, sampler=sampler(seed=0))

        def objective(trial: Trial) -> tuple[float, ...]:
            params = suggest(trial, MIXED)
            return (mixed(params), params["x"], params["rate"])[: len(directions)]

        study.optimize(objective, n_trials=8)
        assert len(study.trials) == 8

    def test_conditional_parameters(self, sampler: Callable[..., BaseSampler]) -> None:
        study = optuna.create_study(sampler=sampler(seed=0))

        def objective(trial: Trial) -> float:
            if trial.suggest_categorical("kind", ["a", "b"]) == "a":
                return trial.suggest_float("only_a", 0, 1) + trial.suggest_int("both", 0, 9)
            return trial.suggest_float("only_b", 1, 2) + trial.suggest_int("both", 0, 9)

        study.optimize(objective, n_trials=12)
        assert all(("only_a" in trial.params) == (trial.params["kind"] == "a") for trial in study.trials)

    def test_same_seed_same_trials_whatever_the_global_generators(self, sampler: Callable[..., BaseSampler]) -> None:
        runs = []
        for run in range(2):
            np.random.seed(run)  # noqa: NPY002
            torch.manual_seed(run)
            before = torch.get_rng_state()
            study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler(seed=5))
            study.optimize(lambda trial: discrete(suggest(trial, DISCRETE)), n_trials=9)
            assert torch.equal(torch.get_rng_state(), before)
            runs.append([point(trial) for trial in study.trials])
        assert runs[0] == runs[1]
        other = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler(seed=6))
        other.optimize(lambda trial: discrete(suggest(trial, DISCRETE)), n_trials=9)
        assert [point(trial) for trial in other.trials] != runs[0]

    @pytest.mark.parametrize("known", [True, False])
    def test_resumes_from_storage_with_the_same_proposals(
        self, sampler: Callable[..., BaseSampler], tmp_path: Path, known: bool
    ) -> None:
        few = {name: DISCRETE[name] for name in ("bits0", "bits1", "bits2", "tile0", "tile1")}
        rest = {name: 8 if name.startswith("bits") else 1 for name in DISCRETE}

        def run(path: Path, pieces: list[int]) -> list[Any]:
            for n_trials in pieces:
                study = optuna.create_study(
                    storage=f"sqlite:///{path}",
                    study_name="s",
                    load_if_exists=True,
                    directions=["maximize", "minimize"],
                    sampler=sampler(seed=0, search_space=few if known else None),
                )
                study.optimize(lambda trial: discrete(rest | suggest(trial, few)), n_trials=n_trials)
            return [(point(trial), trial.values) for trial in study.trials]

        assert run(tmp_path / "pieces.db", [2, 4, 3]) == run(tmp_path / "whole.db", [9])

    def test_points_of_failed_running_and_pruned_trials_are_not_proposed_again(
        self, sampler: Callable[..., BaseSampler]
    ) -> None:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler(seed=0, search_space=DISCRETE))
        for number in range(14):
            trial = study.ask(DISCRETE)
            if number % 4 == 1:
                study.tell(trial, state=TrialState.FAIL)
            elif number % 4 == 2:
                study.tell(trial, state=TrialState.PRUNED)
            elif number % 4 == 3:
                study.tell(trial, discrete(trial.params))
            # Every fourth trial stays running, as one of a worker that died.
        points = [point(trial) for trial in study.trials]
        assert self.repeats_points or len(set(points)) == len(points)

    @pytest.mark.parametrize("how", ["all fail", "constant", "infinite", "all running"])
    def test_hopeless_studies_go_on(self, sampler: Callable[..., BaseSampler], how: str) -> None:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler(seed=0, search_space=DISCRETE))
        for _ in range(9):
            trial = study.ask(DISCRETE)
            if how == "all fail":
                study.tell(trial, state=TrialState.FAIL)
            elif how != "all running":
                study.tell(trial, [1.0, 1.0] if how == "constant" else [float("-inf"), 1.0])
        points = [point(trial) for trial in study.trials]
        assert self.repeats_points or len(set(points)) == len(points)

    def test_parallel_trials_differ(self, sampler: Callable[..., BaseSampler]) -> None:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler(seed=0, search_space=DISCRETE))
        study.optimize(lambda trial: discrete(suggest(trial, DISCRETE)), n_trials=12, n_jobs=4)
        points = [point(trial) for trial in study.trials]
        assert len(points) == 12
        assert self.repeats_points or len(set(points)) == len(points)

    def test_enqueued_and_added_trials_are_honoured(self, sampler: Callable[..., BaseSampler]) -> None:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler(seed=0, search_space=DISCRETE))
        fixed = {name: 8 if name.startswith("bits") else 1 for name in DISCRETE}
        study.enqueue_trial(fixed)
        study.enqueue_trial({"bits0": 2})
        added = fixed | {"bits1": 4}
        study.add_trial(optuna.create_trial(params=added, distributions=DISCRETE, values=list(discrete(added))))
        study.optimize(lambda trial: discrete(suggest(trial, DISCRETE)), n_trials=9)
        assert study.trials[0].params == fixed
        assert study.trials[1].params["bits0"] == 2

    def test_parameters_of_one_value(self, sampler: Callable[..., BaseSampler]) -> None:
        space: dict[str, BaseDistribution] = {
            "one": CategoricalDistribution([8]),
            "two": IntDistribution(3, 3),
            "x": FloatDistribution(0.0, 1.0),
        }
        study = optuna.create_study(sampler=sampler(seed=0, search_space=space))
        study.optimize(lambda trial: suggest(trial, space)["x"], n_trials=8)
        assert all(trial.params["one"] == 8 and trial.params["two"] == 3 for trial in study.trials)
