"""What a study knows, read into numbers: the only memory of the samplers.

| symbol | meaning                                                          | shape |
| ------ | ---------------------------------------------------------------- | ----- |
| rows   | points of complete trials, and of pruned ones with expectations  | n x d |
| Y      | their values, turned so that every objective is minimised        | n x m |
| C      | their constraints, feasible where at most 0                      | n x c |
| seen   | points of all trials in any state                                |       |
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from lightning_baqe.search.space import Key, Rows, SearchSpace

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


@dataclass(frozen=True)
class History:
    """The trials of a study that concern one search space.

    Attributes:
        rows: `n x d`, complete trials with finite values, and pruned ones of which is known what they would probably
            have reached, in the order of their numbers.
        values: `n x m`, minimised.
        constraints: `n x c`.
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

    @classmethod
    def read(cls, study: Study, space: SearchSpace, exclude: int) -> History:
        """Read a study.

        Args:
            study: any Optuna study.
            space: trials without a point of this space are left aside.
            exclude: number of the trial that asks.

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
            values = trial.values if finished else trial.system_attrs.get(EXPECTED_KEY)
            ended = finished or trial.state == TrialState.PRUNED
            if ended and values is not None and np.isfinite(values).all() and space.holds(trial.params):
                complete.append((key, values, trial.constraints, finished))
        names = sorted({name for _, _, constraints, _ in complete for name in constraints})
        # Of what a pruned trial never had nothing is missing.
        complete = [entry for entry in complete if entry[3] or set(entry[2]) == set(names)]
        lacking = [entry for entry in complete if set(entry[2]) != set(names)]
        if lacking:
            warnings.warn(
                f"{len(lacking)} complete trials lack a value for some of the constraints {names}; they are left out. "
                "Call trial.set_constraint(name, value) for each constraint in every trial that returns values.",
                UserWarning,
                stacklevel=2,
            )
            complete = [entry for entry in complete if set(entry[2]) == set(names)]
        n, m = len(complete), len(study.directions)
        return cls(
            rows=np.array([key for key, *_ in complete], dtype=np.float64).reshape(n, len(space.names)),
            values=torch.tensor([values for _, values, *_ in complete], dtype=torch.float64).reshape(n, m)
            * signs(study),
            constraints=torch.tensor(
                [[constraints[name] for name in names] for _, _, constraints, _ in complete], dtype=torch.float64
            ).reshape(n, len(names)),
            seen=seen,
            pending=np.array(pending, dtype=np.float64).reshape(len(pending), len(space.names)),
            finished=torch.tensor([finished for *_, finished in complete], dtype=torch.bool),
        )
