"""The ARD process against BoTorch's `SingleTaskGP`, whose model it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from gpytorch.mlls import ExactMarginalLogLikelihood
from scipy.optimize import check_grad
from torch import Tensor

from lightning_baqe.search.ard import ExactGP, Kernel, negative_log_posterior

KERNELS: list[Kernel] = ["rbf", "matern"]


def data(n: int = 25, d: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x[:, 0] + torch.sin(4 * x[:, 1])
    return x, (y - y.mean()) / y.std()


def theirs(x: Tensor, y: Tensor, kernel: Kernel) -> SingleTaskGP:
    covariance = get_covar_module_with_dim_scaled_prior(ard_num_dims=x.shape[1], use_rbf_kernel=kernel == "rbf")
    return SingleTaskGP(x, y[:, None], covar_module=covariance, outcome_transform=None)


def theta_of(model: SingleTaskGP) -> np.ndarray:
    length = model.covar_module.lengthscale.detach().ravel()
    noise = model.likelihood.noise.detach()
    return np.concatenate([length.log().numpy(), noise.log().numpy(), [float(model.mean_module.constant.detach())]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_is_the_gradient(kernel: Kernel) -> None:
    x, y = (part.numpy() for part in data())
    theta = np.random.default_rng(0).normal(-0.5, 0.4, x.shape[1] + 2)
    error = check_grad(
        lambda t: negative_log_posterior(t, x, y, kernel)[0],
        lambda t: negative_log_posterior(t, x, y, kernel)[1],
        theta,
    )
    assert error < 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_objective_differs_from_botorchs_by_a_constant(kernel: Kernel) -> None:
    x, y = data()
    model = theirs(x, y, kernel)
    model.train()
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    gaps = []
    for length, noise in ((0.3, 0.01), (1.5, 0.2)):
        model.covar_module.lengthscale = length
        model.likelihood.noise = noise
        value = float(likelihood(model(*model.train_inputs), model.train_targets).detach())
        gaps.append(value + negative_log_posterior(theta_of(model), x.numpy(), y.numpy(), kernel)[0])
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_fits_as_well_as_botorch_and_predicts_the_same(kernel: Kernel) -> None:
    (x, y), new = data(), torch.rand(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = theirs(x, y, kernel)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    theta = theta_of(model)
    ours = ExactGP.fit(x, y, kernel, 200)
    found = np.concatenate([ours.length.log().numpy(), [np.log(ours.noise), ours.constant]])
    args = (x.numpy(), y.numpy(), kernel)
    assert negative_log_posterior(found, *args)[0] <= negative_log_posterior(theta, *args)[0] + 1e-3
    given = ExactGP.given(x, y, torch.from_numpy(np.exp(theta[:4])), float(np.exp(theta[4])), float(theta[5]), kernel)
    posterior = model.posterior(new)
    mean, variance = given.moments(new)
    torch.testing.assert_close(mean, posterior.mean.detach()[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, posterior.variance.detach()[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_moments_have_gradients_also_at_observations(kernel: Kernel) -> None:
    x, y = data()
    points = x[:3].clone().requires_grad_()
    mean, variance = ExactGP.fit(x, y, kernel, 50).moments(points)
    (mean.sum() + variance.sum()).backward()
    assert points.grad is not None
    assert bool(points.grad.isfinite().all())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["constant", "one far value", "repeated", "steep"])
def test_extreme_data_can_be_fitted(kernel: Kernel, kind: str) -> None:
    x, y = data(20)
    if kind == "constant":
        y = torch.zeros_like(y)
    elif kind == "one far value":
        y = torch.zeros_like(y).index_fill(0, torch.tensor([3]), 4.4)
    elif kind == "repeated":
        x, y = x[:1].expand(20, -1), y * 1e-6
    else:
        y = torch.where(x[:, 0] > 0.5, 1.0, -1.0).double() * 3
    mean, variance = ExactGP.fit(x, y, kernel, 200).moments(torch.cat([x, x + 10]))
    assert bool(mean.isfinite().all())
    assert bool((variance.isfinite() & (variance >= 0)).all())
