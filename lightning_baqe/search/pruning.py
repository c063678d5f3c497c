"""Pruning for several objectives: a trial whose estimates tell that it cannot reach the front is given up.

Optuna's pruners know one objective. Here a trial promises values at a rung: what it would have by cheap estimates, of
an untrained network, or after a part of the training. What promises are worth is learned from the trials that went on
to the end, without a model of it: the rule of successive halving, that what is worse early is worse at last, is used
only as far as finished trials bear it out.

| symbol | meaning                                                                  | shape |
| ------ | ------------------------------------------------------------------------ | ----- |
| p      | promise of the trial, minimised                                          | m     |
| P      | promises of the finished trials at the same rung, minimised              | n x m |
| F      | their values, minimised                                                  | n x m |

The optimistic value of an objective is the least F of the few finished trials whose promises come next below p: if what
is promised worse ends worse, the trial ends no better than any of them. Where there are too few, nothing is known and
the trial goes on. Promises with a margin need no such trials. A trial is hopeless where a finished one is at least as
good in every objective as its optimistic values, and better in one.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016;
Schmucker et al., "Multi-objective Asynchronous Successive Halving", 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from optuna import Trial
from optuna.trial import TrialState
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.study_sampler import EXPECTED_KEY, signs

_RUNGS_KEY = "baqe:rungs"  # system attribute: {rung: promise}
_BETTER = 3  # finished trials with promises next below, of which none ends worse than a trial may
_NEAREST = 3  # finished trials with the nearest promises, whose mean a pruned trial is expected to reach


class ParetoPruner:
    """Gives up trials that cannot reach the front any more.

        pruner = ParetoPruner(margins=(None, 0.05, 0.0))

        def objective(trial):
            ...
            for epoch in range(10):
                train()
                pruner.report(trial, epoch, (error(), latency_estimate, size))
                if pruner.should_prune(trial):
                    raise optuna.TrialPruned
            return error(), latency(), size

    What is known is in the study's trials, so that it may be interrupted, and shared by processes. A pruned trial keeps
    the values that it would probably have had: `BaqeSampler` learns from them, and keeps them off the front.

    Args:
        margins: for each objective how far a promise may be above the value, relative to it: 0 for exact ones; None:
            that is learned from the finished trials.
        warmup: finished trials with promises at the rung before any is pruned.

    Raises:
        ConfigError: a margin is below 0, the warm-up below 2.
    """

    def __init__(self, margins: Sequence[float | None], warmup: int = 5) -> None:
        if not margins or any(margin is not None and not 0 <= margin < 1 for margin in margins) or warmup < 2:
            raise ConfigError(
                f"margins={margins!r}, warmup={warmup}; wanted one margin an objective, each None or from 0 to below "
                "1, and a warm-up of at least 2"
            )
        self.margins, self.warmup = tuple(margins), warmup

    def report(self, trial: Trial, rung: int, promise: Sequence[float]) -> None:
        """Keep what a trial promises at a rung, in the study's units and orientation.

        Raises:
            ConfigError: as many values as objectives are wanted, all finite.
        """
        if not len(promise) == len(self.margins) == len(trial.study.directions):
            raise ConfigError(
                f"{len(promise)} promised values and {len(self.margins)} margins for "
                f"{len(trial.study.directions)} objectives; wanted one of each an objective"
            )
        if not bool(torch.tensor(list(promise)).isfinite().all()):
            raise ConfigError(f"a promise of {list(promise)}; wanted finite numbers: let such a trial fail")
        rungs = dict(_rungs(trial))
        rungs[str(rung)] = [float(value) for value in promise]
        trial.study._storage.set_trial_system_attr(trial._trial_id, _RUNGS_KEY, rungs)

    def should_prune(self, trial: Trial) -> bool:
        """Whether the trial's last promise is hopeless; if so, what it probably would have reached is kept.

        Raises:
            ConfigError: the trial has reported nothing.
        """
        rungs = _rungs(trial)
        if not rungs:
            raise ConfigError(f"trial {trial.number} has promised nothing: call report before should_prune")
        rung = max(rungs, key=int)
        complete = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        finished = [one for one in complete if rung in one.system_attrs.get(_RUNGS_KEY, {})]
        if len(finished) < self.warmup:
            return False
        turned = signs(trial.study)
        promise = torch.tensor(rungs[rung], dtype=torch.float64) * turned
        promises = torch.tensor([one.system_attrs[_RUNGS_KEY][rung] for one in finished], dtype=torch.float64) * turned
        finals = torch.tensor([one.values for one in finished], dtype=torch.float64) * turned
        feasible = [one.values for one in complete if all(value <= 0 for value in one.constraints.values())]
        others = torch.tensor(feasible, dtype=torch.float64).reshape(-1, len(turned)) * turned
        if not is_hopeless(optimistic(promise, promises, finals, self.margins), others):
            return False
        expected = (probable(promise, promises, finals, self.margins) * turned).tolist()
        trial.study._storage.set_trial_system_attr(trial._trial_id, EXPECTED_KEY, expected)
        return True


def _rungs(trial: Trial) -> dict[str, list[float]]:
    # Optuna has no public access for what is neither a sampler nor a pruner of one objective.
    attributes = trial.study._storage.get_trial_system_attrs(trial._trial_id)
    found: dict[str, list[float]] = attributes.get(_RUNGS_KEY, {})
    return found


def optimistic(promise: Tensor, promises: Tensor, finals: Tensor, margins: Sequence[float | None]) -> Tensor:
    """The least that each objective may turn out as, shape `m`; minus infinity where nothing is known."""
    found = torch.full_like(promise, -torch.inf)
    for k, margin in enumerate(margins):
        if margin is not None:
            found[k] = promise[k] - margin * promise[k].abs()
            continue
        below = torch.nonzero(promises[:, k] <= promise[k])[:, 0]
        if len(below) >= _BETTER:
            nearest = below[promises[below, k].argsort(descending=True, stable=True)[:_BETTER]]
            found[k] = finals[nearest, k].min()
    return found


def probable(promise: Tensor, promises: Tensor, finals: Tensor, margins: Sequence[float | None]) -> Tensor:
    """What each objective would probably turn out as, shape `m`: of trials that promised nearly the same."""
    found = promise.clone()
    for k, margin in enumerate(margins):
        if margin is None:
            nearest = (promises[:, k] - promise[k]).abs().argsort(stable=True)[:_NEAREST]
            found[k] = finals[nearest, k].mean()
    return found


def is_hopeless(values: Tensor, others: Tensor) -> bool:
    """Whether any of the others, `n x m`, dominates the values, shape `m`."""
    return bool(((others <= values).all(1) & (others < values).any(1)).any())
