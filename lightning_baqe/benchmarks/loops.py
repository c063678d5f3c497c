"""Two loops over the same function: ours, and BoTorch's own as its tutorials write it.

Both get the same initial points and the same number of evaluations, and minimise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import optuna
import torch
from botorch.acquisition.multi_objective.logei import qLogExpectedHypervolumeImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.transforms.outcome import Standardize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.test_functions.multi_objective import DTLZ2, ZDT1, ZDT2, ZDT3, Penicillin, VehicleSafety
from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
from botorch.utils.transforms import normalize, unnormalize
from gpytorch.mlls import SumMarginalLogLikelihood
from optuna.distributions import BaseDistribution, FloatDistribution
from torch import Tensor
from torch.quasirandom import SobolEngine

from lightning_baqe.search import BaqeSampler

# The sides and numbers of objectives are those of BoTorch's own examples, where the function leaves them open.
FUNCTIONS: dict[str, Callable[[], Any]] = {
    "DTLZ2": lambda: DTLZ2(dim=6, num_objectives=2, negate=True),
    "ZDT1": lambda: ZDT1(dim=6, num_objectives=2, negate=True),
    "ZDT2": lambda: ZDT2(dim=6, num_objectives=2, negate=True),
    "ZDT3": lambda: ZDT3(dim=6, num_objectives=2, negate=True),
    "VehicleSafety": lambda: VehicleSafety(negate=True),
    "Penicillin": lambda: Penicillin(negate=True),
}


def function_of(name: str) -> Any:
    """A test function of BoTorch in float64; it is to be maximised, as BoTorch does."""
    return FUNCTIONS[name]().to(torch.float64)


def reference_of(function: Any) -> list[float]:
    """The published reference point, minimised."""
    return [-float(value) for value in function.ref_point]


def initial_points(dimensions: int, n: int, seed: int) -> Tensor:
    """Scrambled Sobol points of the unit cube, `n x d`."""
    return SobolEngine(dimensions, scramble=True, seed=seed).draw(n).to(torch.float64)


def evaluate(function: Any, x: Tensor) -> Tensor:
    """Objectives of points of the unit cube `n x d`, to be maximised; `n x m`."""
    values: Tensor = function(unnormalize(x, function.bounds))
    return values.to(torch.float64)


def run_botorch(function: Any, start: Tensor, n_more: int, seed: int) -> tuple[Tensor, list[float]]:
    """BoTorch's loop: `qLogExpectedHypervolumeImprovement`, sequential, with the settings of its tutorial.

    A `SingleTaskGP` an objective with its default priors, 128 quasi-random samples, `optimize_acqf` from 10 of 512
    starting points; all 10 at a time, which gives the same point as the tutorial's 5 and is quicker.
    """
    x, y = start, evaluate(function, start)
    reference: Tensor = function.ref_point.to(torch.float64)
    unit = torch.stack([torch.zeros(function.dim), torch.ones(function.dim)]).to(torch.float64)
    seconds = []
    for number in range(n_more):
        started = time.process_time()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * seed + number)
            models = [SingleTaskGP(x, y[:, [i]], outcome_transform=Standardize(m=1)) for i in range(y.shape[1])]
            model = ModelListGP(*models)
            fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
            acquisition = qLogExpectedHypervolumeImprovement(
                model=model,
                ref_point=reference,
                partitioning=FastNondominatedPartitioning(ref_point=reference, Y=y),  # type: ignore[arg-type]
                sampler=SobolQMCNormalSampler(sample_shape=torch.Size([128]), seed=number),
            )
            settings: dict[str, Any] = {"num_restarts": 10, "raw_samples": 512, "options": {"maxiter": 200}}
            point, _ = optimize_acqf(acquisition, bounds=unit, q=1, sequential=True, **settings)
        seconds.append(time.process_time() - started)
        x = torch.cat([x, point.detach()])
        y = torch.cat([y, evaluate(function, point.detach())])
    return -y, seconds


def run_beyond(function: Any, start: Tensor, n_more: int, seed: int) -> tuple[Tensor, list[float]]:
    """`BaqeSampler` in mode "beyond" after the same initial points, instead of TED's."""
    names = [f"x{index}" for index in range(function.dim)]
    low, high = function.bounds.tolist()
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(a, b) for name, a, b in zip(names, low, high, strict=True)
    }
    study = optuna.create_study(
        directions=["minimize"] * function.num_objectives,
        sampler=BaqeSampler(seed, "beyond", space, n_initial=0, reference_point=reference_of(function)),
    )
    for point, values in zip(unnormalize(start, function.bounds), -evaluate(function, start), strict=True):
        params = {name: min(max(float(v), a), b) for name, v, a, b in zip(names, point, low, high, strict=True)}
        study.add_trial(optuna.create_trial(params=params, distributions=space, values=values.tolist()))
    seconds = []
    for _ in range(n_more):
        started = time.process_time()
        trial = study.ask(space)
        seconds.append(time.process_time() - started)
        point = torch.tensor([[trial.params[name] for name in names]], dtype=torch.float64)
        study.tell(trial, (-evaluate(function, normalize(point, function.bounds)))[0].tolist())
    return torch.tensor([trial.values for trial in study.trials], dtype=torch.float64), seconds


METHODS = {"botorch": run_botorch, "beyond": run_beyond}


def run(method: str, name: str, seed: int, evaluations: int) -> dict[str, Any]:
    """One run of a method of `METHODS`, from 2 (d + 1) Sobol points on.

    Returns:
        `{"values": n x m, minimised, in the order of evaluation, "propose_s": processor seconds of each proposal,
        without the initial points}`.
    """
    function = function_of(name)
    start = initial_points(function.dim, 2 * (function.dim + 1), seed)
    values, seconds = METHODS[method](function, start, evaluations, seed)
    return {"values": values.tolist(), "propose_s": seconds}
