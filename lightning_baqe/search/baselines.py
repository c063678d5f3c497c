"""What BAQE is compared with, as Optuna samplers that keep the same rules: see `StudySampler`.

None of them proposes a point twice where the space has more, each follows the study's directions, and each knows the
constraints of `trial.set_constraint` (`random_search` apart, which learns nothing).

- `random_search`: uniform over the space. BAQE's first baseline.
- `AnnealingSampler` in `annealing`: simulated annealing over boosted trees, AutoTVM's strategy. BAQE's second baseline.
- `tpe`, `nsga2`, `gaussian_process`: Optuna's own.
- `NoisyImprovementSampler` in `noisy_improvement`: plain ARD Gaussian processes and BoTorch's qLogNEHVI.
- `BaqeSampler(initial="random")`: BAQE without TED.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.pool import spanning_rows, unseen
from lightning_baqe.search.space import Distributions, Key, SearchSpace
from lightning_baqe.search.study_sampler import History, StudySampler, repeated_point

_ATTEMPTS = 20  # draws of a point that was not tried yet, before the space is searched for one
_DRAWS = 500


def fresh_point(space: SearchSpace, history: History, rng: np.random.Generator) -> Key:
    """A random point that no trial holds; any one, with a warning, where there is none left.

    Warns:
        UserWarning: all points were tried.
    """
    rows = unseen(space.from_unit(rng.random((_ATTEMPTS, len(space.names)))), history.seen)
    if not len(rows):  # nearly used up: list what there is
        rows = unseen(spanning_rows(space, max(_DRAWS, 2 * len(history.seen)), rng), history.seen)
    return tuple(rows[0].tolist()) if len(rows) else repeated_point(space, history, rng)


class OptunaSampler(StudySampler):
    """A sampler of Optuna under the rules of `StudySampler`.

    For each trial the sampler is made anew, from (seed, trial number), and so knows no more than the study does. Where
    it proposes a point that was tried, it is asked again with another seed; after 20 times a random point is taken.

    Args:
        make: called with ``seed=``; returns a sampler.
        seed: of everything, at least 0.
        search_space: see `StudySampler`.
    """

    def __init__(
        self, make: Callable[..., BaseSampler], seed: int = 0, search_space: Distributions | None = None
    ) -> None:
        super().__init__(seed, search_space)
        self._make = make

    def _propose(self, study: Study, trial: FrozenTrial, space: SearchSpace) -> tuple[Key, str]:
        history = History.read(study, space, exclude=trial.number)
        for attempt in range(_ATTEMPTS):
            key = self._ask(self._make(seed=self._derived(2, trial.number, attempt)), study, trial, space)
            if key not in history.seen:
                return key, "sampler"
        return fresh_point(space, history, self._rng(3, trial.number)), "random"

    @staticmethod
    def _ask(sampler: BaseSampler, study: Study, trial: FrozenTrial, space: SearchSpace) -> Key:
        distributions: dict[str, BaseDistribution] = {d.name: d.distribution for d in space.dimensions}
        known = sampler.infer_relative_search_space(study, trial)
        relative = {name: distribution for name, distribution in distributions.items() if name in known}
        # Samplers of Optuna may draw from the global generators of the libraries that they use.
        with torch.random.fork_rng(devices=[]):
            params = sampler.sample_relative(study, trial, relative)
            for name, distribution in distributions.items():
                if name not in params:
                    params[name] = sampler.sample_independent(study, trial, name, distribution)
        return space.internal(params)


def random_search(seed: int = 0, search_space: Distributions | None = None) -> OptunaSampler:
    """Uniform over the space, without repetition."""
    return OptunaSampler(RandomSampler, seed, search_space)


def tpe(seed: int = 0, search_space: Distributions | None = None, n_initial: int = 10) -> OptunaSampler:
    """Tree-structured Parzen estimators with Optuna's settings, after `n_initial` random trials."""
    return OptunaSampler(partial(TPESampler, n_startup_trials=n_initial), seed, search_space)


def nsga2(seed: int = 0, search_space: Distributions | None = None, population: int = 10) -> OptunaSampler:
    """NSGA-II with Optuna's operators. Its population of 50 would leave 40 trials random; 10 gives four generations."""
    return OptunaSampler(partial(NSGAIISampler, population_size=population), seed, search_space)


def gaussian_process(seed: int = 0, search_space: Distributions | None = None, n_initial: int = 10) -> OptunaSampler:
    """Optuna's `GPSampler`, after `n_initial` random trials: Matern GPs, log expected hypervolume improvement."""
    make = partial(GPSampler, n_startup_trials=n_initial, warn_independent_sampling=False)
    return OptunaSampler(make, seed, search_space)


class PoolBaseline(StudySampler, abc.ABC):
    """Random initial points, then proposals of a model.

    Args:
        seed, search_space: see `StudySampler`.
        candidates: parameter dicts from which the initial points are drawn; None draws them from the whole space.
        n_initial: complete trials before the first model, at least 2.

    Raises:
        ConfigError: n_initial is below 2; on a proposal, a candidate does not fit the space.
    """

    def __init__(
        self,
        seed: int = 0,
        search_space: Distributions | None = None,
        candidates: Sequence[Mapping[str, Any]] | None = None,
        n_initial: int = 10,
    ) -> None:
        super().__init__(seed, search_space)
        if n_initial < 2:
            raise ConfigError(f"n_initial={n_initial}; wanted at least 2 trials to learn from")
        self.candidates = candidates
        self.n_initial = n_initial

    def _propose(self, study: Study, trial: FrozenTrial, space: SearchSpace) -> tuple[Key, str]:
        history = History.read(study, space, exclude=trial.number)
        if len(history.rows) >= self.n_initial:
            key = self._model_point(study, trial.number, space, history)
            if key is not None:
                return key, "model"
        pool = [space.internal(point) for point in self.candidates or ()]
        order = (pool[index] for index in self._rng(4).permutation(len(pool)))
        key = next((key for key in order if key not in history.seen), None)
        return key or fresh_point(space, history, self._rng(5, trial.number)), "random"

    @abc.abstractmethod
    def _model_point(self, study: Study, number: int, space: SearchSpace, history: History) -> Key | None:
        """What a model of the history proposes: a point that no trial holds, or None where it finds none."""


class PoolSearch(PoolBaseline):
    """Random points of the pool, and nothing learned: what the pool alone brings."""

    def _model_point(self, study: Study, number: int, space: SearchSpace, history: History) -> Key | None:
        return None
