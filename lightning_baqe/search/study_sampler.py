"""What the samplers of this package share: the study is their only memory, and no generator outlives a proposal."""

from __future__ import annotations

import abc
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.history import PHASE_KEY, POINT_KEY
from lightning_baqe.search.space import Key, SearchSpace
from lightning_baqe.search.study_lock import lock_of


class StudySampler(BaseSampler, abc.ABC):
    """A sampler without a state of its own: all randomness comes from (seed, trial number).

    The same study gives the same proposal, in this process or in the next. A proposal is kept in the trial's system
    attributes before it is suggested, so that trials that run side by side differ.

    Args:
        seed: of everything, at least 0.
        search_space: name -> distribution. Without it the first trial is random, and from then on the parameters that
            all complete trials share are searched; others (conditional ones) are drawn at random.

    Raises:
        ConfigError: the seed is not a whole number of at least 0.
    """

    def __init__(self, seed: int = 0, search_space: Mapping[str, BaseDistribution] | None = None) -> None:
        if not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed={seed!r}; wanted a whole number of at least 0")
        self.seed = seed
        self.search_space = None if search_space is None else dict(search_space)

    def phase(self, study: Study, trial: FrozenTrial | Trial) -> str:
        """Which phase proposed a trial; "given" where it was enqueued, added by hand or proposed by another sampler."""
        attributes = study._storage.get_trial_system_attrs(trial._trial_id)
        return str(attributes.get(PHASE_KEY, "given"))

    def reseed_rng(self) -> None:
        """Nothing to do: trials of parallel workers differ by their numbers, and the sampler holds no generator."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The given space, or the parameters that all complete trials share; without those of a single value."""
        space = self.search_space
        if space is None:
            space = intersection_search_space(study.get_trials(deepcopy=False))
        return {name: space[name] for name in sorted(space) if not space[name].single()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one parameter at random, from (seed, trial number, name)."""
        sampler = RandomSampler(seed=self._derived_by_name(1, trial.number, param_name))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose a point: see the class."""
        if not search_space:
            self._record(study, trial, PHASE_KEY, "random")
            return {}
        space = SearchSpace(search_space)
        with lock_of(study):  # so that each sees the proposals of all others
            row, phase = self._propose(study, trial, space)
            self._record(study, trial, PHASE_KEY, phase)
            self._record(study, trial, POINT_KEY, dict(zip(space.names, row, strict=True)))
        return space.external(row)

    @abc.abstractmethod
    def _propose(self, study: Study, trial: FrozenTrial, space: SearchSpace) -> tuple[Key, str]:
        """The point of a trial, and the phase that it comes from."""

    @staticmethod
    def _record(study: Study, trial: FrozenTrial, key: str, value: Any) -> None:
        # Optuna has no public setter for samplers; its own samplers do the same.
        study._storage.set_trial_system_attr(trial._trial_id, key, value)

    def _rng(self, *path: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *path])

    def _derived(self, *path: int) -> int:
        """A seed for libraries that want one number, below 2**32."""
        return int(np.random.SeedSequence([self.seed, *path]).generate_state(1)[0])

    def _derived_by_name(self, *path: int | str) -> int:
        """As `_derived`, of numbers and texts."""
        return self._derived(*(zlib.crc32(part.encode()) if isinstance(part, str) else part for part in path))
