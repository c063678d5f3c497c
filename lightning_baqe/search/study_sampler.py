"""What the samplers of this package share: the study is their only memory, and no generator outlives a proposal."""

from __future__ import annotations

import abc
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.pareto import pareto_mask
from lightning_baqe.search.space import Distributions, Key, Rows, SearchSpace
from lightning_baqe.search.study_lock import lock_of

POINT_KEY = "baqe:point"  # system attribute: the proposal, for trials that have not suggested it yet
PHASE_KEY = "baqe:phase"  # system attribute: which phase proposed the trial
EXPECTED_KEY = "baqe:expected"  # system attribute: the values that a pruned trial would probably have reached


def signs(study: Study) -> Tensor:
    """+1 for each objective of the study that is minimised, -1 for each that is maximised; shape `m`."""
    return torch.tensor(
        [-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in study.directions], dtype=torch.float64
    )


def _key(trial: FrozenTrial, space: SearchSpace) -> Key | None:
    """The trial's point: suggested, or fixed in advance, or proposed and not suggested yet; None where unknown."""
    for params in (trial.params, {**trial.params, **trial.system_attrs.get("fixed_params", {})}):
        if space.holds(params):
            return space.internal(params)
    proposed = trial.system_attrs.get(POINT_KEY)
    if proposed is None or set(space.names) - set(proposed):
        return None
    return tuple(float(proposed[name]) for name in space.names)


def proposed_point(trial: FrozenTrial, distributions: Distributions) -> dict[str, Any]:
    """The parameters that were proposed for a trial or given in advance, whether it has suggested them yet or not.

    Args:
        trial: of a study whose sampler is of this package; otherwise only what was given in advance is known.
        distributions: name -> distribution, of the whole space.
    """
    found: dict[str, Any] = dict(trial.system_attrs.get("fixed_params", {}))
    internal = trial.system_attrs.get(POINT_KEY)
    if internal is not None:
        for name, distribution in distributions.items():
            if name in internal:
                found[name] = distribution.to_external_repr(internal[name])
            elif isinstance(distribution, CategoricalDistribution) and distribution.single():
                found[name] = distribution.choices[0]  # such are not proposed
    return found


@dataclass(frozen=True)
class History:
    """The trials of a study that concern one search space.

    Attributes:
        rows: `n x d`, complete trials with finite values, and pruned ones of which is known what they would probably
            have reached, in the order of their numbers.
        values: `n x m`, turned so that every objective is minimised.
        constraints: `n x c`, feasible where at most 0.
        seen: points that must not be proposed again, whatever became of their trials.
        pending: `q x d`, points of running trials.
        finished: bool, shape `n`; false for pruned trials, whose values are no more than expected.
    """

    rows: Rows
    values: Tensor
    constraints: Tensor
    seen: set[Key]
    pending: Rows
    finished: Tensor

    @property
    def feasible(self) -> Tensor:
        """Which points may be on the front: bool, shape `n`."""
        return (self.constraints <= 0).all(1) & self.finished

    @property
    def best_rows(self) -> Rows:
        """The points of the front, of all points where none is feasible: `f x d`."""
        shown = self.feasible if bool(self.feasible.any()) else torch.ones_like(self.feasible)
        return self.rows[shown.numpy()][pareto_mask(self.values[shown]).numpy()]

    @classmethod
    def read(cls, study: Study, space: SearchSpace, exclude: int) -> History:
        """Of all trials with a point of the space, but the one whose number is to be excluded.

        Warns:
            UserWarning: some complete trials lack constraints that others have; their values are left out.
        """
        complete: list[tuple[Key, list[float], dict[str, float], bool]] = []
        seen: set[Key] = set()
        pending: list[Key] = []
        for trial in study.get_trials(deepcopy=False):
            key = None if trial.number == exclude else _key(trial, space)
            if key is None:
                continue
            seen.add(key)
            if trial.state == TrialState.RUNNING:
                pending.append(key)
            # An infinite value says only that the point is bad; no model can hold it.
            finished = trial.state == TrialState.COMPLETE
            reached = trial.values if finished else trial.system_attrs.get(EXPECTED_KEY)
            ended = finished or trial.state == TrialState.PRUNED
            if ended and reached is not None and np.isfinite(reached).all() and space.holds(trial.params):
                complete.append((key, reached, trial.constraints, finished))
        names = sorted({name for _, _, constraints, _ in complete for name in constraints})
        lacking = sum(finished for *_, constraints, finished in complete if set(constraints) != set(names))
        if lacking:  # of what a pruned trial never had nothing is missing
            warnings.warn(
                f"{lacking} complete trials lack a value for some of the constraints {names}; they are left out. "
                "Call trial.set_constraint(name, value) for each constraint in every trial that returns values.",
                UserWarning,
                stacklevel=2,
            )
        complete = [entry for entry in complete if set(entry[2]) == set(names)]
        n, d = len(complete), len(space.names)
        values = torch.tensor([values for _, values, *_ in complete], dtype=torch.float64)
        limits = [[constraints[name] for name in names] for *_, constraints, _ in complete]
        return cls(
            rows=np.array([key for key, *_ in complete], dtype=np.float64).reshape(n, d),
            values=values.reshape(n, len(study.directions)) * signs(study),
            constraints=torch.tensor(limits, dtype=torch.float64).reshape(n, len(names)),
            seen=seen,
            pending=np.array(pending, dtype=np.float64).reshape(-1, d),
            finished=torch.tensor([finished for *_, finished in complete], dtype=torch.bool),
        )


def repeated_point(space: SearchSpace, history: History, rng: np.random.Generator) -> Key:
    """Any random point, for a space of which no other is left.

    Warns:
        UserWarning: always.
    """
    warnings.warn(
        f"all {len(history.seen)} points that the search could draw were tried; one is repeated at random. "
        "Stop the study earlier or widen its search space.",
        UserWarning,
        stacklevel=3,
    )
    return tuple(space.from_unit(rng.random((1, len(space.names))))[0].tolist())


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

    _make: Callable[..., BaseSampler] = RandomSampler  # of single parameters, called with ``seed=``

    def __init__(self, seed: int = 0, search_space: Distributions | None = None) -> None:
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
        """Draw one parameter from (seed, trial number, name): at random, or as a wrapped sampler does it."""
        sampler = self._make(seed=self._derived(1, trial.number, zlib.crc32(param_name.encode())))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose a point: see the class."""
        if not search_space:
            study._storage.set_trial_system_attr(trial._trial_id, PHASE_KEY, "random")
            return {}
        space = SearchSpace(search_space)
        with lock_of(study):  # so that each sees the proposals of all others
            row, phase = self._propose(study, trial, space)
            # Optuna has no public setter for samplers; its own samplers do the same.
            point = dict(zip(space.names, row, strict=True))
            study._storage.set_trial_system_attr(trial._trial_id, PHASE_KEY, phase)
            study._storage.set_trial_system_attr(trial._trial_id, POINT_KEY, point)
        return space.external(row)

    @abc.abstractmethod
    def _propose(self, study: Study, trial: FrozenTrial, space: SearchSpace) -> tuple[Key, str]:
        """The point of a trial, and the phase that it comes from."""

    def _rng(self, *path: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *path])

    def _derived(self, *path: int) -> int:
        """A seed for libraries that want one number, below 2**32."""
        return int(np.random.SeedSequence([self.seed, *path]).generate_state(1)[0])
