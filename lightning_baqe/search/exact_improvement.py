"""The expected hypervolume improvement of independent outputs in closed form, and its logarithm.

BAQE eq. 14 with one Gaussian process an objective needs no samples: within a cell of what the front does not dominate,
the improvement is a product over the objectives, and so is its mean where they are independent. The logarithm has a
slope where the improvement itself underflows, so that candidates far behind the front are still told apart.

Emmerich et al., "Hypervolume-based Expected Improvement: Monotonicity Properties and Exact Computation", CEC 2011;
Ament et al., "Unexpected Improvements to Expected Improvement for Bayesian Optimization", NeurIPS 2023.

| symbol     | meaning                                                          | shape |
| ---------- | ---------------------------------------------------------------- | ----- |
| mean, sd   | of each candidate's outputs: objectives, then constraints        | n x p |
| [l, u]     | cells, from `nondominated_cells`                                 | c x m |
| psi(a)     | E[(a - y)+] = sd h((a - mean) / sd), h(z) = phi(z) + z Phi(z)    | n     |

E[improvement] = sum_cells prod_k (psi(u_k) - psi(l_k)), times the probability that every constraint is at most 0.
"""

from __future__ import annotations

import torch
from botorch.acquisition.analytic import _log_ei_helper
from botorch.utils.safe_math import log1mexp
from torch import Tensor

from lightning_baqe.errors import ConfigError

_SMALLEST = 1e-10  # standard deviations below this are rounding, in standardised units


def log_expected_improvement(mean: Tensor, variance: Tensor, cells: tuple[Tensor, Tensor]) -> Tensor:
    """Logarithm of the expected hypervolume improvement of each candidate, of independent outputs. Exact.

    Args:
        mean: `n x p`; the first m of the p outputs are objectives, minimised, the others constraints.
        variance: `n x p`.
        cells: lower and upper corners, each `c x m`, from `nondominated_cells`.

    Returns:
        Shape `n`, float64; it has gradients where mean and variance have them.

    Raises:
        ConfigError: shapes do not fit.
    """
    lower, upper = cells
    n_objectives = lower.shape[1]
    if mean.shape != variance.shape or mean.ndim != 2 or mean.shape[1] < n_objectives:
        raise ConfigError(
            f"mean {tuple(mean.shape)}, variance {tuple(variance.shape)}, cells {tuple(lower.shape)}; "
            "wanted (n, p), (n, p), (c, m) with p >= m"
        )
    sd = variance.clamp_min(_SMALLEST**2).sqrt()
    logs = mean.new_zeros(())
    for k in range(n_objectives):
        at_upper = _log_psi(upper[:, k], mean[:, k, None], sd[:, k, None])
        # The cells that are open below have no second term; where is not enough, as gradients of -inf are NaN.
        closed = torch.isfinite(lower[:, k])
        at_lower = _log_psi(lower[:, k].masked_fill(~closed, 0.0), mean[:, k, None], sd[:, k, None])
        # psi rises, so the difference of the logarithms is negative; rounding can make it 0.
        share = log1mexp((at_lower - at_upper).clamp_max(-1e-14))
        logs = logs + at_upper + torch.where(closed, share, torch.zeros_like(share))
    result = torch.logsumexp(logs, dim=-1)
    border = -mean[:, n_objectives:] / sd[:, n_objectives:]
    return result + torch.special.log_ndtr(border).sum(-1)


def _log_psi(a: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    return _log_ei_helper((a - mean) / sd) + sd.log()
