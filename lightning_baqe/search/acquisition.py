"""Expected improvement of the Pareto hypervolume over a set of candidates. BAQE III-D, eqs. 12-15.

| symbol  | meaning                                                      | shape     |
| ------- | ------------------------------------------------------------ | --------- |
| mean    | posterior means, minimised objectives (then constraints)     | n x p     |
| cov     | joint posterior covariance of each candidate's outputs       | n x p x p |
| F       | front: non-dominated observations                            | f x m     |
| r       | reference point                                              | m         |
| [a, b]  | cells: disjoint boxes that fill what F does not dominate     | c x m     |
| z       | quasi-random standard normal numbers, the same for every candidate | s x p |

p = m objectives + the constraints, if any.

With one Gaussian process an objective eq. 14 needs no samples (:func:`log_expected_improvement`): within a cell of what
the front does not dominate, the improvement is a product over the objectives, and so is its mean where they are
independent. With psi(a) = E[(a - y)+] = sd h((a - mean) / sd) and h(z) = phi(z) + z Phi(z) of each output:

    E[improvement] = sum_cells prod_k (psi(u_k) - psi(l_k)), times the probability that every constraint is at most 0.

Its logarithm has a slope where the improvement itself underflows, so that candidates far behind the front are still
told apart. Emmerich et al., "Hypervolume-based Expected Improvement: Monotonicity Properties and Exact Computation",
CEC 2011; Ament et al., "Unexpected Improvements to Expected Improvement for Bayesian Optimization", NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from botorch.acquisition.analytic import _log_ei_helper
from botorch.generation.gen import gen_candidates_scipy
from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
from botorch.utils.safe_math import log1mexp
from botorch.utils.sampling import draw_sobol_normal_samples
from optuna.distributions import FloatDistribution
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.pareto import as_reference_point, pareto_mask
from lightning_baqe.search.space import Rows, SearchSpace

_SMALLEST = 1e-10  # standard deviations below this are rounding, in standardised units
_ELEMENTS_AT_ONCE = 4_000_000  # bounds the memory of one batch: samples x candidates x cells


def nondominated_cells(front: Tensor, reference_point: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
    """Cut the space that no observation dominates, up to the reference point, into disjoint boxes. Exact.

    Args:
        front: `f x m` observations, minimised; dominated ones and those beyond the reference point change nothing.
        reference_point: `m`.

    Returns:
        Lower corners (minus infinity on the open sides) and upper corners, each `c x m`.

    Raises:
        ConfigError: shapes do not fit or a value is NaN.
    """
    n_objectives = front.shape[-1]
    reference = as_reference_point(reference_point, n_objectives)
    front = torch.as_tensor(front, dtype=torch.float64)
    front = front[pareto_mask(front)]
    front = torch.unique(front[(front < reference).all(1)], dim=0)
    if n_objectives == 1 or front.shape[0] == 0:
        # One objective: below the best value. Nothing better than the reference point yet: all below that.
        upper = torch.cat([front, reference[None]]).amin(0, keepdim=True) if n_objectives == 1 else reference[None]
        return torch.full_like(upper, -torch.inf), upper
    cells = FastNondominatedPartitioning(ref_point=-reference, Y=-front).get_hypercell_bounds()  # BoTorch maximises
    return -cells[1], -cells[0]


def hypervolume_improvement(points: Tensor, cells: tuple[Tensor, Tensor]) -> Tensor:
    """What each point alone would add to the hypervolume: BAQE eq. 13.

    The volume that a point dominates within a cell is a box; the sum over the disjoint cells is exact.

    Args:
        points: `... x m`, minimised.
        cells: lower and upper corners, each `c x m`, from `nondominated_cells`.

    Returns:
        Shape `...`, at least 0.
    """
    lower, upper = cells
    volume = torch.ones((), dtype=points.dtype)
    for objective in range(points.shape[-1]):
        y = points[..., objective, None]
        side = (upper[:, objective] - torch.maximum(y, lower[:, objective])).clamp_min(0)
        volume = volume * side
    return volume.sum(-1)


def joint_samples(mean: Tensor, covariance: Tensor, n_samples: int, seed: int) -> Tensor:
    """Draw the outputs of each candidate jointly, by quasi-Monte-Carlo.

    All candidates share the same normal numbers, so that their differences are no noise. The square root of the
    covariance is the symmetric one, which exists for every positive semi-definite matrix.

    Args:
        mean: `n x p`.
        covariance: `n x p x p`.
        n_samples: s, best a power of two (Sobol sequence).
        seed: scrambles the sequence; global generators stay untouched.

    Returns:
        `s x n x p`.
    """
    normal = draw_sobol_normal_samples(mean.shape[1], n_samples, dtype=torch.float64, seed=seed)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()[:, None, :] @ vectors.transpose(1, 2)
    return mean + torch.einsum("npq,sq->snp", root, normal)


def expected_hypervolume_improvement(
    mean: Tensor,
    covariance: Tensor,
    front: Tensor,
    reference_point: Tensor | Sequence[float],
    *,
    n_constraints: int = 0,
    n_samples: int = 128,
    seed: int = 0,
) -> Tensor:
    """Expected improvement of the Pareto hypervolume (EPVI): BAQE eq. 14.

    The sum over all p+ in eq. 14 becomes a mean over samples of the joint posterior; the improvement of each sample
    is exact. With constraints, a sample counts only where all of them are at most 0. With one objective this is the
    expected improvement.

    Args:
        mean: `n x p` posterior means; the last `n_constraints` of the p outputs are constraints.
        covariance: `n x p x p`.
        front: `f x m` observations (feasible ones), f may be 0.
        reference_point: `m`.
        n_constraints: p - m.
        n_samples: samples of the posterior.
        seed: of the samples.

    Returns:
        Shape `n`, float64, at least 0.

    Raises:
        ConfigError: shapes do not fit.
    """
    n_objectives = mean.shape[1] - n_constraints
    if covariance.shape != (*mean.shape, mean.shape[1]) or front.shape[-1] != n_objectives:
        raise ConfigError(
            f"mean {tuple(mean.shape)}, covariance {tuple(covariance.shape)}, front {tuple(front.shape)}, "
            f"{n_constraints} constraints; wanted (n, p), (n, p, p), (f, p - constraints)"
        )
    cells = nondominated_cells(front, reference_point)
    step = max(1, _ELEMENTS_AT_ONCE // (n_samples * cells[0].shape[0]))
    result = []
    for part in zip(mean.double().split(step), covariance.double().split(step), strict=True):
        samples = joint_samples(*part, n_samples, seed)
        improvement = hypervolume_improvement(samples[..., :n_objectives], cells)
        feasible = (samples[..., n_objectives:] <= 0).all(-1)
        result.append((improvement * feasible).mean(0))
    return torch.cat(result)


def best_candidate(improvement: Tensor, covariance: Tensor) -> int:
    """The candidate to evaluate next: BAQE eq. 15.

    The largest expected improvement, the lowest index among equals. Where no candidate has any (every sample of each
    is dominated), they are all equal under eq. 15, and the candidate about which the posterior knows least is taken:
    the largest trace of the covariance.

    Args:
        improvement: `n`, from `expected_hypervolume_improvement`.
        covariance: `n x p x p`, outputs in comparable units.
    """
    if bool((improvement > 0).any()):
        return int(improvement.argmax())
    return int(covariance.diagonal(dim1=-2, dim2=-1).sum(-1).argmax())


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


def refine(space: SearchSpace, rows: Rows, log_score: Callable[[Tensor], Tensor], max_iterations: int = 200) -> Rows:
    """Move each candidate to a local optimum in its float parameters that have no step; the others stay.

    Bred candidates find the right region and lie on no optimum, as a child differs from its parents by whole redraws.
    L-BFGS-B within the unit cube, all candidates side by side.

    Args:
        space: where the candidates live.
        rows: `k x d` internal values.
        log_score: encoded points `k x D` -> shape `k`, to be maximised, with gradients.
        max_iterations: of L-BFGS-B.

    Returns:
        `k x d` internal values; `rows` itself where no parameter is continuous.
    """
    distributions = [dimension.distribution for dimension in space.dimensions]
    moved = [i for i, d in enumerate(distributions) if isinstance(d, FloatDistribution) and d.step is None]
    if not moved or not len(rows):
        return rows
    encoded = space.encode(rows)
    columns = torch.tensor(space.columns(moved))

    def score(part: Tensor) -> Tensor:
        # The columns that stay are no variables of the optimiser; candidates keep their own.
        return log_score(encoded.index_copy(1, columns, part[:, 0]))

    with torch.enable_grad():
        found, _ = gen_candidates_scipy(
            initial_conditions=encoded[:, None, columns],
            acquisition_function=cast(Any, score),  # any function of batches will do
            lower_bounds=0.0,
            upper_bounds=1.0,
            options={"maxiter": max_iterations},
            use_parallel_mode=False,
        )
    result = rows.copy()
    place = found.detach()[:, 0].clamp(0, 1).numpy()
    for position, index in enumerate(moved):
        result[:, index] = space.dimensions[index].from_unit(place[:, position])
    return result
