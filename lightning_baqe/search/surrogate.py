"""Models that predict the objectives of points that were not tried. BAQE III-D, eqs. 8-11.

| symbol | meaning                                                     | shape   |
| ------ | ----------------------------------------------------------- | ------- |
| X      | encoded observations                                        | n x d   |
| Y      | their outputs, standardised inside                          | n x m   |
| phi    | multilayer perceptron, the embedding                        | d -> e  |
| Kx     | kernel of the embedded observations                         | n x n   |
| Kf     | covariance between outputs, B B^T + diag(v), B of given rank| m x m   |
| D      | noise variance of each output                               | m       |
| Sigma  | Kf (x) Kx + D (x) I, output-major: index = output * n + row | mn x mn |
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from gpytorch.kernels import IndexKernel, RBFKernel
from torch import Tensor, nn

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.ard import ExactGP
from lightning_baqe.search.initial_design import median_distance


class Posterior(NamedTuple):
    """What a surrogate says about each of n points: `mean` is `n x m`, `covariance` is `n x m x m`."""

    mean: Tensor
    covariance: Tensor


class Surrogate(abc.ABC):
    """A fitted model."""

    @abc.abstractmethod
    def posterior(self, x: Tensor) -> Posterior:
        """Predict the noise-free outputs at `n x d` points, in the units of the data, float64."""


@dataclass(frozen=True)
class DeepKernelOptions:
    """How the deep-kernel model is built and fitted.

    Attributes:
        widths: outputs of the perceptron's linear layers; ReLU between them.
        rank: of B in Kf.
        steps: of Adam on the marginal likelihood.
        learning_rate: of the perceptron's weights.
        kernel_learning_rate: of the length scales, Kf and the noise.
        min_noise: lower bound of the noise variance, in standardised units.
    """

    widths: tuple[int, ...] = (1000, 500, 50, 48)
    rank: int = 1
    steps: int = 50
    learning_rate: float = 1e-3
    kernel_learning_rate: float = 5e-2
    min_noise: float = 1e-4

    def __post_init__(self) -> None:
        positive = min(self.learning_rate, self.kernel_learning_rate, self.min_noise) > 0
        if not self.widths or min(*self.widths, self.rank, self.steps) < 1 or not positive:
            raise ConfigError(f"{self}; wanted widths, rank and steps of at least 1, and all others positive")


@dataclass(frozen=True)
class ArdOptions:
    """How the plain model is built and fitted.

    Attributes:
        kernel: `"rbf"` or `"matern"` (5/2); one length scale per column, with BoTorch's prior that grows with d.
        max_iterations: of L-BFGS-B.
    """

    kernel: Literal["matern", "rbf"] = "rbf"
    max_iterations: int = 100

    def __post_init__(self) -> None:
        if self.kernel not in ("matern", "rbf") or self.max_iterations < 1:
            raise ConfigError(f"{self}; wanted 'matern' or 'rbf', at least 1")


def _check(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = x.to(torch.float64), y.to(torch.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0] or x.shape[0] < 2:
        raise ConfigError(f"x {tuple(x.shape)}, y {tuple(y.shape)}; wanted (n, d) and (n, m) with n >= 2 observations")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ConfigError("x or y holds values that are not finite; drop those observations first")
    return x, y


def standardise(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre and scale each output of `n x m` values; a constant output keeps scale 1. Returns y, mean, scale."""
    mean = y.mean(0)
    scale = ((y - mean).square().sum(0) / max(len(y) - 1, 1)).sqrt()
    # The rounding of a mean leaves a constant output with a tiny spread, which is none.
    scale = torch.where(scale > 1e-12 * y.abs().sum(0), scale, torch.ones_like(scale))
    return (y - mean) / scale, mean, scale


def _perceptron(n_inputs: int, widths: tuple[int, ...], generator: torch.Generator) -> nn.Sequential:
    """Linear layers with ReLU between, initialised as `nn.Linear` does but from the given generator."""
    layers: list[nn.Module] = []
    for index, width in enumerate(widths):
        linear = nn.utils.skip_init(nn.Linear, n_inputs, width)
        bound = 1 / math.sqrt(n_inputs)
        with torch.no_grad():
            linear.weight.uniform_(-bound, bound, generator=generator)
            linear.bias.uniform_(-bound, bound, generator=generator)
        layers += [nn.ReLU(), linear] if index else [linear]
        n_inputs = width
    return nn.Sequential(*layers)


class DeepKernelGP(Surrogate):
    """Multi-task Gaussian process with a deep kernel (DKL-GP), fitted on construction. BAQE eqs. 8-11.

    The perceptron, which feeds Kx, runs in float32, everything else in float64. On one machine the same data, options
    and seed give the same model; global random generators stay untouched.

    Args:
        x: `n x d` encoded observations, n >= 2; repeated rows are allowed.
        y: `n x m` outputs.
        options: sizes and fitting.
        seed: of the perceptron's and Kf's initial values.

    Attributes:
        losses: negative log marginal likelihood per value before each step.

    Raises:
        ConfigError: shapes do not fit or a value is not finite.
    """

    def __init__(self, x: Tensor, y: Tensor, options: DeepKernelOptions | None = None, seed: int = 0) -> None:
        options = options or DeepKernelOptions()
        x, y = _check(x, y)
        self._x = x
        self._y, self._mean, self._scale = standardise(y)
        n_outputs = y.shape[1]
        generator = torch.Generator().manual_seed(seed)
        self._phi = _perceptron(x.shape[1], options.widths, generator)
        with torch.random.fork_rng(devices=[]):  # IndexKernel draws initial values, which are replaced below
            self._kf = IndexKernel(num_tasks=n_outputs, rank=min(options.rank, n_outputs)).double()
        self._kx = RBFKernel(ard_num_dims=options.widths[-1]).double()
        self._raw_noise = nn.Parameter(torch.full((n_outputs,), -3.0, dtype=torch.float64))
        self._min_noise = options.min_noise
        with torch.no_grad():
            factor = torch.rand(self._kf.covar_factor.shape, generator=generator, dtype=torch.float64)
            self._kf.covar_factor.copy_(factor - 0.5)  # outputs start weakly correlated, with either sign
            self._kf.var = torch.ones(n_outputs, dtype=torch.float64)
            self._kx.lengthscale = median_distance(self._embed(x))
        self.losses = self._fit(options)
        with torch.no_grad():
            self._z = self._embed(x)
            self._task_covariance = self._kf.covar_matrix.to_dense()
            self._cholesky = self._factorise(self._z)
            self._weights = torch.cholesky_solve(self._y.T.reshape(-1, 1), self._cholesky).reshape(n_outputs, -1)

    def _embed(self, x: Tensor) -> Tensor:
        return self._phi(x.float()).double()

    def _factorise(self, z: Tensor) -> Tensor:
        """Cholesky factor of Sigma, BAQE eq. 10."""
        kx = self._kx(z).to_dense()
        noise = nn.functional.softplus(self._raw_noise) + self._min_noise
        sigma = torch.kron(self._kf.covar_matrix.to_dense(), kx) + noise.repeat_interleave(z.shape[0]).diag()
        return torch.linalg.cholesky(sigma)

    def _fit(self, options: DeepKernelOptions) -> tuple[float, ...]:
        kernel_parameters = [*self._kx.parameters(), *self._kf.parameters(), self._raw_noise]
        optimiser = torch.optim.Adam(
            [
                {"params": list(self._phi.parameters()), "lr": options.learning_rate},
                {"params": kernel_parameters, "lr": options.kernel_learning_rate},
            ]
        )
        target = self._y.T.reshape(-1, 1)
        losses = []
        with torch.enable_grad():
            for _ in range(options.steps):
                optimiser.zero_grad()
                cholesky = self._factorise(self._embed(self._x))
                white = torch.linalg.solve_triangular(cholesky, target, upper=False)
                loss = white.square().mean() / 2 + cholesky.diagonal().log().mean() + math.log(2 * math.pi) / 2
                loss.backward()
                optimiser.step()
                losses.append(float(loss.detach()))
        return tuple(losses)

    @torch.no_grad()
    def posterior(self, x: Tensor) -> Posterior:
        """BAQE eq. 10 for the mean, and the covariance that belongs to it; see `Surrogate`."""
        kf = self._task_covariance
        cross = self._kx(self._z, self._embed(x)).to_dense()  # n x q
        mean = cross.T @ self._weights.T @ kf
        stacked = torch.einsum("lk,nq->knlq", kf, cross).reshape(kf.shape[0] * cross.shape[0], -1)
        white = torch.linalg.solve_triangular(self._cholesky, stacked, upper=False)
        white = white.reshape(-1, kf.shape[0], x.shape[0])
        covariance = kf - torch.einsum("ilq,ikq->qlk", white, white)
        return Posterior(mean * self._scale + self._mean, covariance * torch.outer(self._scale, self._scale))


class ArdGP(Surrogate):
    """One Gaussian process per output with a length scale per column, fitted on construction. Not in the paper.

    The model and the priors of BoTorch's `SingleTaskGP`; hyperparameters by maximum a posteriori. See `ard`.

    Args:
        x: `n x d` encoded observations in the unit cube, n >= 2; repeated rows are allowed.
        y: `n x m` outputs.
        options: kernel and fitting.

    Raises:
        ConfigError: shapes do not fit or a value is not finite.
    """

    def __init__(self, x: Tensor, y: Tensor, options: ArdOptions | None = None) -> None:
        options = options or ArdOptions()
        x, y = _check(x, y)
        standardised, self._mean, self._scale = standardise(y)
        self._models = [
            ExactGP.fit(x, output.contiguous(), options.kernel, options.max_iterations) for output in standardised.T
        ]

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of the independent outputs, each `n x m`, with gradients where x has them."""
        found = [model.moments(x.to(torch.float64)) for model in self._models]
        mean = torch.stack([mean for mean, _ in found], dim=1)
        variance = torch.stack([variance for _, variance in found], dim=1)
        return mean * self._scale + self._mean, variance * self._scale.square()

    @torch.no_grad()
    def posterior(self, x: Tensor) -> Posterior:
        """Independent outputs: the covariance is diagonal; see `Surrogate`."""
        mean, variance = self.moments(x)
        return Posterior(mean, torch.diag_embed(variance))
