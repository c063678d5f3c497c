"""Transductive experimental design: the first points to try, before anything is known. BAQE III-C, Algorithm 1.

| symbol | meaning                                              | shape |
| ------ | ---------------------------------------------------- | ----- |
| V      | candidates, a sample that stands for the whole space | n x d |
| X      | the candidates chosen so far                         | k x d |
| K      | kernel matrix of V, deflated after each choice       | n x n |
| mu     | regularisation of the regression in eq. 4            |       |
| sigma  | length scale of the kernel                           |       |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_baqe.errors import ConfigError

Kernel = Callable[[Tensor, Tensor], Tensor]

_TIE = 1e-10  # relative: scores this close are equal, so that rounding on another processor changes no choice


def median_distance(points: Tensor) -> float:
    """Median of the positive pairwise distances of `n x d` points; 1.0 where all points are equal."""
    distances = torch.pdist(points.to(torch.float64))
    distances = distances[distances > 0]
    return float(distances.median()) if distances.numel() else 1.0


def rbf(x: Tensor, y: Tensor, sigma: float | None = None) -> Tensor:
    """exp(-||x - y||^2 / (2 sigma^2)) for each pair.

    Args:
        x: `n x d`.
        y: `k x d`.
        sigma: length scale in the units of x; None takes the median distance between the points of x.

    Returns:
        `n x k`, float64.

    Raises:
        ConfigError: sigma is not positive.
    """
    x, y = x.to(torch.float64), y.to(torch.float64)
    scale = median_distance(x) if sigma is None else sigma
    if not scale > 0:
        raise ConfigError(f"sigma={sigma}; wanted a positive length scale, or None for the median distance")
    return torch.exp(-torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * scale**2))


def ted(candidates: Tensor, m: int, mu: float = 0.1, kernel: Kernel = rbf) -> Tensor:
    """Choose the m candidates from which the values of all others can be predicted best. BAQE eq. 7, Algorithm 1.

    Greedy: each step takes the x with the largest ||K_Vx||^2 / (K_xx + mu) and deflates
    K <- K - K_Vx K_xV / (K_xx + mu). Each such score is what x adds to Tr(K_VX (K_XX + mu I)^-1 K_XV), so the steps
    maximise eq. 7 one choice at a time. The first choices do not depend on m.

    Args:
        candidates: `n x d`, encoded, for example in the unit cube.
        m: how many to choose, at most n.
        mu: regularisation, positive; the larger, the less the choices avoid each other.
        kernel: (`n x d`, `k x d`) -> `n x k`, positive semi-definite. `functools.partial(rbf, sigma=...)` fixes the
            length scale.

    Returns:
        Distinct indices in the order of choice, int64, shape `m`; among equal scores the lowest index.

    Raises:
        ConfigError: shapes do not fit, m > n, or mu is not positive.
    """
    if candidates.ndim != 2:
        raise ConfigError(f"candidates has shape {tuple(candidates.shape)}; wanted (n, d): one row per candidate")
    n = candidates.shape[0]
    if not 0 <= m <= n:
        raise ConfigError(f"m={m} with {n} candidates; wanted 0 <= m <= {n}: lower m or give more candidates")
    if not mu > 0:
        raise ConfigError(f"mu={mu}; wanted a positive number, for example 0.1")
    # A copy: the deflation works in place and must not write into what a user's kernel returned.
    k = torch.as_tensor(kernel(candidates, candidates)).detach().to(dtype=torch.float64, copy=True)
    if k.shape != (n, n) or not k.isfinite().all():
        raise ConfigError(f"kernel gave shape {tuple(k.shape)}; wanted finite values of shape ({n}, {n})")
    free = torch.ones(n, dtype=torch.bool, device=k.device)
    chosen: list[int] = []
    for _ in range(m):
        gain = k.square().sum(0) / (k.diagonal() + mu)
        gain = torch.where(free, gain, -torch.inf)
        best = gain.max()
        index = int(torch.nonzero(gain >= best - _TIE * best.abs())[0, 0])
        chosen.append(index)
        free[index] = False
        k -= torch.outer(k[:, index], k[index, :]) / (k[index, index] + mu)
    return torch.tensor(chosen, dtype=torch.int64)
