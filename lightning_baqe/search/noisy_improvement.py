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

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
from botorch.acquisition.objective import GenericMCObjective
from botorch.exceptions.warnings import InputDataWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelListGP, SingleTaskGP
from botorch.optim import optimize_acqf_discrete_local_search
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.mlls import SumMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning
from optuna.distributions import BaseDistribution
from optuna.study import Study
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.baselines import PoolBaseline
from lightning_baqe.search.history import History, signs
from lightning_baqe.search.pareto import as_reference_point, default_reference_point, pareto_mask
from lightning_baqe.search.pool import breed, spanning_rows, unseen
from lightning_baqe.search.space import Key, Rows, SearchSpace
from lightning_baqe.search.surrogate import standardise


@dataclass(frozen=True)
class NoisyImprovementOptions:
    """How the acquisition is computed and maximised.

    Attributes:
        n_samples: quasi-random samples; BoTorch's default.
        raw_samples: starting points that are scored; half of them are bred from the front.
        restarts: best starting points, from each of which a local search runs where every parameter can be listed.
        max_iterations: of the fit, L-BFGS-B.
    """

    n_samples: int = 128
    raw_samples: int = 512
    restarts: int = 2
    max_iterations: int = 200

    def __post_init__(self) -> None:
        if min(self.n_samples, self.raw_samples, self.restarts, self.max_iterations) < 1:
            raise ConfigError(f"{self}; wanted all at least 1")


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
            row = _maximise(acquisition, space, raw, history.seen, self.options.restarts)
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


class _OnRows(AcquisitionFunction):
    """An acquisition of encoded points as one of internal values, so that a step of the search changes a parameter."""

    def __init__(self, acquisition: AcquisitionFunction, space: SearchSpace) -> None:
        super().__init__(model=acquisition.model)
        self._acquisition, self._space = acquisition, space

    def forward(self, X: Tensor) -> Tensor:
        """`b x 1 x d` internal values -> shape `b`."""
        encoded = self._space.encode(X[:, 0].detach().numpy())
        with torch.no_grad():
            return torch.cat([self._acquisition(part[:, None]) for part in encoded.split(256)])


def _maximise(acquisition: AcquisitionFunction, space: SearchSpace, raw: Rows, seen: set[Key], restarts: int) -> Tensor:
    """Internal values, shape `d`."""
    on_rows = _OnRows(acquisition, space)
    rows = torch.from_numpy(raw)
    start = rows[on_rows(rows[:, None]).argsort(descending=True, stable=True)[:restarts]]
    choices = [dimension.levels for dimension in space.dimensions]
    if any(levels is None for levels in choices):
        return start[0]
    best, _ = optimize_acqf_discrete_local_search(
        on_rows,
        discrete_choices=[torch.from_numpy(levels) for levels in choices],
        q=1,
        num_restarts=len(start),
        batch_initial_conditions=start[:, None],
        X_avoid=torch.tensor(sorted(seen), dtype=torch.float64),
        return_acq_values=False,
    )
    return best[0]
