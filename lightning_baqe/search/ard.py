"""Gaussian processes with a length scale per column: exact, one output each, with gradients in closed form.

The model of BoTorch's `SingleTaskGP`, with the same priors and bounds; the fit costs milliseconds instead of a second,
as nothing is built of modules and every gradient is a matrix product.

| symbol | meaning                                                              | shape |
| ------ | -------------------------------------------------------------------- | ----- |
| x      | observations in the unit cube                                        | n x d |
| y      | one output, standardised                                             | n     |
| l      | length scales, prior LogNormal(sqrt(2) + log(d) / 2, sqrt(3))        | d     |
| s      | noise variance, prior LogNormal(-4, 1)                               |       |
| c      | constant mean, without a prior                                       |       |
| R      | squared distances of x / l                                           | n x n |
| K      | k(R) + s I; k = exp(-R / 2), or Matern 5/2                           | n x n |
| W      | a a^T - K^-1 with a = K^-1 (y - c)                                   | n x n |

Hvarfner, Hellsten, Nardi, "Vanilla Bayesian Optimization Performs Great in High Dimensions", ICML 2024 (the priors).
Rasmussen, Williams, "Gaussian Processes for Machine Learning", 2006, eq. 5.9 (the gradient).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from torch import Tensor

Kernel = Literal["matern", "rbf"]
Array = npt.NDArray[np.float64]

_MIN_LENGTH, _MIN_NOISE = 2.5e-2, 1e-4
# BoTorch has no upper bounds. No optimum lies near these, but steps of the line search can overflow beyond them.
_MAX_LENGTH, _MAX_NOISE, _MAX_CONSTANT = 1e5, 1e2, 1e2
_NOISE_LOC, _NOISE_SCALE = -4.0, 1.0
_LENGTH_SCALE = math.sqrt(3)


def _length_loc(d: int) -> float:
    return math.sqrt(2) + math.log(d) / 2


def _kernel(r2: Array, kernel: Kernel) -> tuple[Array, Array]:
    """k(R) and its derivative by R."""
    if kernel == "rbf":
        k = np.exp(-r2 / 2)
        return k, -k / 2
    root = np.sqrt(5 * r2)
    decay = np.exp(-root)
    return (1 + root + 5 * r2 / 3) * decay, -5 / 6 * (1 + root) * decay


def negative_log_posterior(theta: Array, x: Array, y: Array, kernel: Kernel) -> tuple[float, Array]:
    """Negative logarithm of the likelihood times the priors per observation, up to a constant, and its gradient.

    Args:
        theta: log l, log s, c: shape `d + 2`.
        x: `n x d`.
        y: `n`.
        kernel: "rbf" or "matern".
    """
    n, d = x.shape
    log_length, log_noise, constant = theta[:d], theta[d], theta[d + 1]
    z = x / np.exp(log_length)
    square = (z**2).sum(1)
    r2 = np.maximum(square[:, None] + square[None] - 2 * z @ z.T, 0.0)
    k, slope = _kernel(r2, kernel)
    noise = math.exp(log_noise)
    factor = cho_factor(k + noise * np.eye(n), lower=True)
    a = cho_solve(factor, y - constant)
    likelihood = -0.5 * (y - constant) @ a - np.log(np.diag(factor[0])).sum() - 0.5 * n * math.log(2 * math.pi)
    w = np.outer(a, a) - cho_solve(factor, np.eye(n))
    # dR/dlog l = -2 (z_i - z_j)^2 of each column; summed over pairs with the weights m.
    m = w * slope
    by_length = -2 * (m.sum(1) @ z**2 - (z * (m @ z)).sum(0))
    away = (log_length - _length_loc(d)) / _LENGTH_SCALE
    noise_away = (log_noise - _NOISE_LOC) / _NOISE_SCALE
    prior = -(log_length + away**2 / 2).sum() - log_noise - noise_away**2 / 2
    gradient = np.concatenate(
        [
            by_length - 1 - away / _LENGTH_SCALE,
            [0.5 * noise * np.trace(w) - 1 - noise_away / _NOISE_SCALE, a.sum()],
        ]
    )
    return float(-(likelihood + prior) / n), -gradient / n


@dataclass(frozen=True)
class ExactGP:
    """A fitted process of one output.

    Attributes:
        length: `d`.
        noise: variance.
        constant: mean.
        kernel: "rbf" or "matern".
    """

    length: Tensor
    noise: float
    constant: float
    kernel: Kernel
    _z: Tensor
    _cholesky: Tensor
    _weights: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, kernel: Kernel, max_iterations: int) -> ExactGP:
        """Maximum a posteriori by L-BFGS-B, from the modes of the priors; x and y in float64."""
        xs, ys = x.detach().numpy(), y.detach().numpy()
        d = xs.shape[1]
        mode = max(_length_loc(d) - _LENGTH_SCALE**2, math.log(_MIN_LENGTH))
        start = np.concatenate([np.full(d, mode), [_NOISE_LOC - _NOISE_SCALE**2, 0.0]])
        found = minimize(
            negative_log_posterior,
            start,
            args=(xs, ys, kernel),
            jac=True,
            method="L-BFGS-B",
            bounds=[
                *[(math.log(_MIN_LENGTH), math.log(_MAX_LENGTH))] * d,
                (math.log(_MIN_NOISE), math.log(_MAX_NOISE)),
                (-_MAX_CONSTANT, _MAX_CONSTANT),
            ],
            options={"maxiter": max_iterations},
        ).x
        return cls.given(x, y, torch.from_numpy(np.exp(found[:d])), math.exp(found[d]), float(found[d + 1]), kernel)

    @classmethod
    def given(cls, x: Tensor, y: Tensor, length: Tensor, noise: float, constant: float, kernel: Kernel) -> ExactGP:
        """The process with known hyperparameters."""
        z = x / length
        covariance = _torch_kernel(z, z, kernel) + noise * torch.eye(len(x), dtype=torch.float64)
        cholesky = torch.linalg.cholesky(covariance)
        weights = torch.cholesky_solve((y - constant)[:, None], cholesky)[:, 0]
        return cls(length, noise, constant, kernel, z, cholesky, weights)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the noise-free output at `q x d` points, each of shape `q`; differentiable."""
        cross = _torch_kernel(self._z, x / self.length, self.kernel)
        white = torch.linalg.solve_triangular(self._cholesky, cross, upper=False)
        return self.constant + self._weights @ cross, (1 - white.square().sum(0)).clamp_min(0)


def _torch_kernel(a: Tensor, b: Tensor, kernel: Kernel) -> Tensor:
    r2 = (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp_min(0)
    if kernel == "rbf":
        return torch.exp(-r2 / 2)
    root = (5 * r2).clamp_min(1e-24).sqrt()  # the root of 0 has no gradient
    return (1 + root + 5 * r2 / 3) * torch.exp(-root)
