"""Plain ARD Gaussian processes with BoTorch's own acquisition, qLogNEHVI: what a user of BoTorch would write.

Daulton et al., "Parallel Bayesian Optimization of Multiple Noisy Objectives with Expected Hypervolume Improvement",
NeurIPS 2021; Ament et al., "Unexpected Improvements to Expected Improvement for Bayesian Optimization", NeurIPS 2023.

| symbol | meaning                                                        | shape |
| ------ | -------------------------------------------------------------- | ----- |
| Y      | observed objectives, standardised, turned to be maximised      | n x m |
| C      | constraints, scaled, feasible at most 0                        | n x c |
| r      | reference point in the units of Y                              | m     |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from optuna.distributions import BaseDistribution
from optuna.study import Study
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.baselines import PoolBaseline
from lightning_baqe.search.pareto import as_reference_point, default_reference_point, pareto_mask
from lightning_baqe.search.pool import breed, spanning_rows, unseen
from lightning_baqe.search.space import Key, Rows, SearchSpace
from lightning_baqe.search.study_sampler import History, signs
from lightning_baqe.search.surrogate import standardise


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
        search_space: Mapping[str, BaseDistribution] | None = None,
        candidates: Sequence[Mapping[str, Any]] | None = None,
        n_initial: int = 10,
        reference_point: Sequence[float] | None = None,
        options: NoisyImprovementOptions | None = None,
    ) -> None:
        super().__init__(seed, search_space, candidates, n_initial)
        self.reference_point = None if reference_point is None else tuple(float(v) for v in reference_point)
        self.options = options or NoisyImprovementOptions()

    def _model_point(self, study: Study, number: int, space: SearchSpace, history: History) -> Key | None:
        values, mean, scale = standardise(history.values)
        constraints = history.constraints / standardise(history.constraints)[2]
        if self.reference_point is None:
            reference = default_reference_point(values)
        else:
            given = as_reference_point(self.reference_point, len(study.directions)) * signs(study)
            reference = (given - mean) / scale
        raw = self._raw(number, space, history)
        if not len(raw):
            return None
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
            # A point beside the observed ones makes a matrix singular; a little jitter is GPyTorch's own cure.
            warnings.simplefilter("ignore", NumericalWarning)
            torch.default_generator.manual_seed(self._derived(6, number))
            x = space.encode(history.rows)
            model = _fitted(x, torch.cat([-values, constraints], dim=1), self.options.max_iterations)
            acquisition = _acquisition(
                model, x, -reference, constraints.shape[1], self.options.n_samples, self._derived(7, number)
            )
            row = _maximise(acquisition, space, raw, history.seen, self.options)
        return cast("Key", tuple(row.tolist()))

    def _raw(self, number: int, space: SearchSpace, history: History) -> Rows:
        """Starting points that no trial holds, `k x d`: half spread over the space, half near the front."""
        rng, half = self._rng(8, number), max(1, self.options.raw_samples // 2)
        good = history.feasible if bool(history.feasible.any()) else torch.ones_like(history.feasible)
        front = history.rows[good.numpy()][pareto_mask(history.values[good]).numpy()]
        near = breed(space, front, half, rng)
        rows = spanning_rows(space, half, rng)
        return unseen(torch.cat([torch.from_numpy(rows), torch.from_numpy(near)]).numpy(), history.seen)


def _fitted(x: Tensor, y: Tensor, max_iterations: int) -> ModelListGP:
    with warnings.catch_warnings():
        # Constraints are scaled and not centred, so that zero stays the border; a constant output has no scale.
        warnings.simplefilter("ignore", InputDataWarning)
        models = [SingleTaskGP(x, y[:, [output]], outcome_transform=None) for output in range(y.shape[1])]
    model = ModelListGP(*models)
    likelihood = SumMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": max_iterations}})
    return model


def _acquisition(
    model: ModelListGP, x: Tensor, reference: Tensor, n_constraints: int, n_samples: int, seed: int
) -> AcquisitionFunction:
    n_objectives = len(reference)
    limits = [_output(n_objectives + index) for index in range(n_constraints)] or None
    sampler = SobolQMCNormalSampler(sample_shape=torch.Size([n_samples]), seed=seed)
    if n_objectives == 1:
        objective = GenericMCObjective(_first)
        return qLogNoisyExpectedImprovement(
            model, x, sampler=sampler, objective=objective, constraints=limits, prune_baseline=True
        )
    return qLogNoisyExpectedHypervolumeImprovement(
        model,
        reference,
        x,
        sampler=sampler,
        objective=IdentityMCMultiOutputObjective(outcomes=list(range(n_objectives))),
        constraints=limits,
        prune_baseline=True,
    )


def _first(samples: Tensor, X: Tensor | None = None) -> Tensor:
    return samples[..., 0]


def _output(index: int) -> Callable[[Tensor], Tensor]:
    return lambda samples: samples[..., index]


def _maximise(
    acquisition: AcquisitionFunction, space: SearchSpace, raw: Rows, seen: set[Key], options: NoisyImprovementOptions
) -> Tensor:
    """Internal values, shape `d`."""

    def values_of(rows: Rows) -> Rows:
        with torch.no_grad():
            return torch.cat([acquisition(part[:, None]) for part in space.encode(rows).split(256)]).numpy()

    values = values_of(raw)
    starts = np.argsort(-values, kind="stable")[: options.restarts]
    if any(dimension.levels is None for dimension in space.dimensions):
        return torch.from_numpy(raw[starts[0]])
    found = [climb(values_of, space, raw[start], values[start], seen, options.tolerance) for start in starts]
    return torch.from_numpy(max(found, key=lambda climbed: climbed[1])[0])


def climb(
    values_of: Callable[[Rows], Rows], space: SearchSpace, row: Rows, value: float, seen: set[Key], tolerance: float
) -> tuple[Rows, float]:
    """Go uphill to a row none of whose neighbours is better by more than the tolerance.

    A neighbour differs in one parameter. Where several are better, the best one, the two best ones together, the three
    best ones, ... are tried, and the best of these is taken: never less than steepest ascent, which in a network's
    space takes a hundred steps instead of ten.

    Args:
        values_of: of rows, `n x d` -> `n`.
        space: whose parameters can all be listed.
        row: to begin with, `d`.
        value: of it.
        seen: rows that are never returned, the first one apart.
        tolerance: at least 0.

    Returns:
        The row and its value.
    """
    while True:
        near = np.array(
            [
                np.concatenate([row[:index], [level], row[index + 1 :]])
                for index, dimension in enumerate(space.dimensions)
                for level in cast("Rows", dimension.levels)
                if level != row[index]
            ]
        )
        near = unseen(near, seen)
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
