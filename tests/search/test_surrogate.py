"""The surrogates: exact formulas, interpolation, determinism."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search import ArdGP, ArdOptions, DeepKernelGP, DeepKernelOptions, Surrogate

SMALL = DeepKernelOptions(widths=(32, 16, 8), steps=150, learning_rate=3e-3)
MODELS = [
    pytest.param(lambda x, y: DeepKernelGP(x, y, SMALL), id="deep"),
    pytest.param(ArdGP, id="rbf"),
    pytest.param(lambda x, y: ArdGP(x, y, ArdOptions(kernel="matern")), id="matern"),
]


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first = x[:, 0] + torch.sin(3 * x[:, 1])
    return x, torch.stack([first, 1e3 * (5 - first + 0.1 * x[:, 2]), 1e7 * x[:, 2]], dim=1)


@pytest.mark.parametrize("build", MODELS)
def test_predicts_and_interpolates_in_the_units_of_the_data(build: type[Surrogate]) -> None:
    (x, y), (new_x, new_y) = data(40), data(100, seed=1)
    model = build(x, y)
    seen, new = model.posterior(x), model.posterior(new_x)
    assert new.mean.shape == (100, 3)
    assert new.covariance.shape == (100, 3, 3)
    assert bool((((seen.mean - y) / y.std(0)).abs() < 0.2).all())
    assert bool(((new.mean - new_y).square().mean(0) < 0.1 * new_y.var(0)).all())
    far = model.posterior(x + 5.0)  # outside of the data everything is less certain
    assert bool(
        (far.covariance.diagonal(dim1=1, dim2=2).mean(0) > seen.covariance.diagonal(dim1=1, dim2=2).mean(0)).all()
    )


@pytest.mark.parametrize("build", MODELS)
def test_same_seed_same_model_and_global_generator_untouched(build: type[Surrogate]) -> None:
    x, y = data(15)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build(x, y).posterior(x + 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = build(x, y).posterior(x + 0.1)
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.covariance, second.covariance)


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("kind", ["constant", "duplicates", "two", "single objective"])
def test_difficult_data(build: type[Surrogate], kind: str) -> None:
    x, y = data(8)
    if kind == "constant":
        y = torch.cat([torch.full((8, 1), 0.1), y[:, 1:]], dim=1)
    elif kind == "duplicates":
        x = x[:1].expand(8, 3)
    elif kind == "two":
        x, y = x[:2], y[:2]
    else:
        y = y[:, :1]
    posterior = build(x, y).posterior(x)
    assert bool(posterior.mean.isfinite().all())
    assert bool((torch.linalg.eigvalsh(posterior.covariance) > -1e-6 * posterior.covariance.abs().amax()).all())
    if kind == "constant":
        torch.testing.assert_close(posterior.mean[:, 0], torch.full((8,), 0.1).double(), atol=1e-2, rtol=0.0)


def test_deep_kernel_seed_matters_and_fitting_lowers_the_loss() -> None:
    x, y = data(20)
    model = DeepKernelGP(x, y, SMALL, seed=0)
    assert len(model.losses) == SMALL.steps
    assert model.losses[-1] < model.losses[0] - 0.2
    other = DeepKernelGP(x, y, SMALL, seed=1)
    assert not torch.equal(model.posterior(x).mean, other.posterior(x).mean)


def test_deep_kernel_posterior_equals_eq_10_written_out() -> None:
    (x, y), (new, _) = data(10), data(4, seed=2)
    model = DeepKernelGP(x, y, dataclasses.replace(SMALL, steps=5))
    mean, scale = y.mean(0), y.std(0)
    with torch.no_grad():
        z, z_new = model._embed(x), model._embed(new)
        length = model._kx.lengthscale

        def kx(a: Tensor, b: Tensor) -> Tensor:
            return torch.exp(-0.5 * ((a[:, None] - b[None]) / length).square().sum(-1))

        kf = model._kf.covar_factor @ model._kf.covar_factor.T + model._kf.var.diag()
        noise = torch.nn.functional.softplus(model._raw_noise) + SMALL.min_noise
        sigma = torch.kron(kf, kx(z, z)) + torch.kron(noise.diag(), torch.eye(10, dtype=torch.float64))
        target = ((y - mean) / scale).T.reshape(-1)
        posterior = model.posterior(new)
        for q in range(4):
            cross = torch.kron(kf, kx(z, z_new[q : q + 1]))  # mn x m
            expected = cross.T @ torch.linalg.solve(sigma, target)
            torch.testing.assert_close(posterior.mean[q], expected * scale + mean)
            covariance = kf - cross.T @ torch.linalg.solve(sigma, cross)
            torch.testing.assert_close(posterior.covariance[q], covariance * torch.outer(scale, scale))


def test_deep_kernel_correlates_objectives() -> None:
    x, y = data(30)
    covariance = DeepKernelGP(x, y, SMALL).posterior(torch.rand(5, 3) + 1).covariance
    assert bool((covariance[:, 0, 1] < 0).all())  # the second objective falls as the first one rises


def test_deep_kernel_of_the_paper_is_fast_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    x, new = torch.rand(40, 120, generator=generator), torch.rand(500, 120, generator=generator)
    y = torch.stack([x[:, :40].mean(1), x[:, 40:].mean(1), x.mean(1)], dim=1)
    DeepKernelGP(x, y, DeepKernelOptions(steps=1))  # first use loads torch's optimisers
    start = time.process_time()
    DeepKernelGP(x, y).posterior(new)
    assert time.process_time() - start < 5  # under 1 s on an idle core


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: DeepKernelOptions(steps=0), "steps=0"),
        (lambda: DeepKernelOptions(min_noise=0.0), "min_noise=0.0"),
        (lambda: ArdOptions(kernel="linear"), "kernel='linear'"),  # type: ignore[arg-type]
        (lambda: ArdGP(torch.ones(1, 2), torch.ones(1, 1)), "n >= 2"),
        (lambda: DeepKernelGP(torch.ones(2, 2), torch.tensor([[1.0], [torch.nan]])), "not finite"),
    ],
)
def test_errors(call: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        call()  # type: ignore[operator]
