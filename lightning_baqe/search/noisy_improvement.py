"""Plain ARD Gaussian processes with BoTorch's own acquisition, qLogNEHVI: what a user of BoTorch would write.

Daulton et al., "Parallel Bayesian Optimization of Multiple Noisy Objectives with Expected Hypervolume Improvement",
NeurIPS 2021; Ament et al., "Unexpected Improvements to Expected Improvement for Bayesian Optimization", NeurIPS 2023.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, cast

import numpy as np
import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
from botorch.acquisition.objective import GenericMCObjective
from botorch.exceptions.warnings import InputDataWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelListGP, SingleTaskGP
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.mlls import SumMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning
from optuna.study import Study
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.baselines import PoolBaseline
from lightning_baqe.search.pool import breed, spanning_rows, unseen
from lightning_baqe.search.sampler import standard_units
from lightning_baqe.search.space import Distributions, Key, Rows, SearchSpace
from lightning_baqe.search.study_sampler import History


@dataclass(frozen=True)
class NoisyImprovementOptions:
    """How the acquisition is computed and maximised.

    Attributes:
        n_samples: quasi-random samples; BoTorch's default.
        raw_samples: starting points that are scored; half of them are bred from the front.
        restarts: best starting points, from each of which a local search runs where every parameter can be listed.
        max_iterations: of the fit, L-BFGS-B.
        tolerance: gain of the improvement's logarithm below which the local search ends.
    """

    n_samples: int = 128
    raw_samples: int = 512
    restarts: int = 2
    max_iterations: int = 200
    tolerance: float = 5e-3

    def __post_init__(self) -> None:
        if min(self.n_samples, self.raw_samples, self.restarts, self.max_iterations) < 1 or self.tolerance < 0:
            raise ConfigError(f"{self}; wanted all at least 1, the tolerance at least 0")


class NoisyImprovementSampler(PoolBaseline):
    """`SingleTaskGP` an objective, qLogNEHVI (one objective: qLogNEI), local search over the listed values.

    Parameters that cannot be listed take the value of the best starting point.

    Args:
        seed, search_space, candidates, n_initial: see `PoolBaseline`.
        reference_point: in the study's units, orientation and order; None derives one from the front at each trial.
        options: the rest.
    """

    def __init__(
        self,
        seed: int = 0,
        search_space: Distributions | None = None,
        candidates: Sequence[Mapping[str, Any]] | None = None,
        n_initial: int = 10,
        reference_point: Sequence[float] | None = None,
        options: NoisyImprovementOptions | None = None,
    ) -> None:
        super().__init__(seed, search_space, candidates, n_initial)
        self.reference_point = None if reference_point is None else tuple(float(v) for v in reference_point)
        self.options = options or NoisyImprovementOptions()

    def _model_point(self, study: Study, number: int, space: SearchSpace, history: History) -> Key | None:
        values, constraints, reference, *_ = standard_units(study, history, self.reference_point)
        # Starting points that no trial holds: half near the front, half spread over the space.
        rng, half = self._rng(8, number), max(1, self.options.raw_samples // 2)
        near = breed(space, history.best_rows, half, rng)
        raw = unseen(np.concatenate([spanning_rows(space, half, rng), near]), history.seen)
        if not len(raw):
            return None
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
            # A point beside the observed ones makes a matrix singular; a little jitter is GPyTorch's own cure.
            warnings.simplefilter("ignore", NumericalWarning)
            # Constraints are scaled and not centred, so that zero stays the border; a constant output has no scale.
            warnings.simplefilter("ignore", InputDataWarning)
            torch.default_generator.manual_seed(self._derived(6, number))
            x = space.encode(history.rows)
            model = _fitted(x, torch.cat([-values, constraints], dim=1), self.options.max_iterations)
            sampler = SobolQMCNormalSampler(torch.Size([self.options.n_samples]), seed=self._derived(7, number))
            acquisition = _acquisition(model, x, -reference, constraints.shape[1], sampler)
            return tuple(_maximise(acquisition, space, raw, history.seen, self.options).tolist())


def _fitted(x: Tensor, y: Tensor, max_iterations: int) -> ModelListGP:
    model = ModelListGP(*[SingleTaskGP(x, y[:, [output]], outcome_transform=None) for output in range(y.shape[1])])
    likelihood = SumMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": max_iterations}})
    return model


def _acquisition(
    model: ModelListGP, x: Tensor, reference: Tensor, n_constraints: int, sampler: SobolQMCNormalSampler
) -> AcquisitionFunction:
    """BoTorch's, maximised: of the model's outputs the last `n_constraints` are feasible at most 0."""
    n_objectives = len(reference)
    rest: dict[str, Any] = {
        "sampler": sampler,
        "constraints": [itemgetter((..., n_objectives + index)) for index in range(n_constraints)] or None,
        "prune_baseline": True,
    }
    if n_objectives == 1:
        first = GenericMCObjective(lambda samples, X: samples[..., 0])
        return qLogNoisyExpectedImprovement(model, x, objective=first, **rest)
    every = IdentityMCMultiOutputObjective(outcomes=list(range(n_objectives)))
    return qLogNoisyExpectedHypervolumeImprovement(model, reference, x, objective=every, **rest)


def _maximise(
    acquisition: AcquisitionFunction, space: SearchSpace, raw: Rows, seen: set[Key], options: NoisyImprovementOptions
) -> Rows:
    """Internal values, shape `d`."""

    def values_of(rows: Rows) -> Rows:
        with torch.no_grad():
            return torch.cat([acquisition(part[:, None]) for part in space.encode(rows).split(256)]).numpy()

    values = values_of(raw)
    starts = np.argsort(-values, kind="stable")[: options.restarts]
    if any(dimension.levels is None for dimension in space.dimensions):
        return cast("Rows", raw[starts[0]])
    found = [climb(values_of, space, raw[start], values[start], seen, options.tolerance) for start in starts]
    return max(found, key=lambda climbed: climbed[1])[0]


def climb(
    values_of: Callable[[Rows], Rows], space: SearchSpace, row: Rows, value: float, seen: set[Key], tolerance: float
) -> tuple[Rows, float]:
    """Go uphill to a row none of whose neighbours is better by more than the tolerance.

    A neighbour differs in one parameter. Where several are better, the best one, the two best ones together, the three
    best ones, ... are tried, and the best of these is taken: never less than steepest ascent, which in a network's
    space takes a hundred steps instead of ten.

    Args:
        values_of: rows `n x d` -> `n`.
        space: whose parameters can all be listed.
        row, value: to begin with; `d`.
        seen: rows that are never returned, the first one apart.
        tolerance: at least 0.
    """
    while True:
        levels = [(index, level) for index, d in enumerate(space.dimensions) for level in cast("Rows", d.levels)]
        near = np.repeat(row[None], len(levels), axis=0)
        near[range(len(levels)), [index for index, _ in levels]] = [level for _, level in levels]
        near = unseen(near[(near != row).any(1)], seen)
        if not len(near):
            return row, value
        gains = values_of(near) - value
        together, steps = row, []
        for better in near[np.argsort(-gains, kind="stable")][: int((gains > 0).sum())]:
            changed = better != row
            if not (together != row)[changed].any():  # the best value of this parameter
                together = np.where(changed, better, together)
                steps.append(together)
        steps = [step for step in steps if tuple(step.tolist()) not in seen]
        if not steps:
            return row, value
        climbed = values_of(np.array(steps))
        best = int(climbed.argmax())
        if climbed[best] <= value + tolerance:
            return row, value
        row, value = steps[best], float(climbed[best])
