"""Search over bit-widths and schedules: initial design, surrogate, acquisition, Pareto metrics, Optuna sampler.

Pure tensors, BoTorch and Optuna; nothing here knows what a network is.

Mode "paper" follows BAQE (sections III-B to III-E). Where the paper contradicts itself or leaves something open:

- TED's kernel (III-C) is given as ||x - y||^2 / (2 sigma^2), a squared distance. It has a zero diagonal and is not
  positive semi-definite, so eq. 7 with it means nothing; we take exp(-that), with sigma the median distance.
- The text maximises Tr(C_w), then minimises Tr(C_V), and eq. 7 maximises its complement in the kernel form. We
  maximise eq. 7, which is what lowers the error of the predictions.
- Algorithm 1, line 8 subtracts a trace, a number, from the matrix K. The deflation that makes greedy steps on eq. 7
  right is the outer product K_Vx (K_xx + mu)^-1 K_xV; we subtract that.
- Algorithm 1, line 7 takes the chosen x out of V. We never choose it twice, but keep its row in the trace, as eq. 7
  sums over all of V.
- Eq. 9 writes K^T where eq. 10 writes K^f: we take K^f (B B^T + diag(v), of a given rank). The paper puts
  perceptrons under "K^f and K^x" and gives the shape of one, phi; ours feeds K^x.
- Eq. 11 has no 1/2 in the exponent. GPyTorch's RBF has; the matrix Sigma in it is learned, so the family is the
  same. Sigma is diagonal. The factor sigma^2 is part of K^f.
- The paper gives neither optimiser nor steps for the surrogate: Adam, 50 steps (`DeepKernelOptions`).
- Eq. 12 sums over the points of a grid: we compute the volume exactly. Eq. 14 sums over all p+: we average over
  quasi-random samples of the joint posterior, the improvement of each being exact.
- The reference point is "manually selected" and (0, 0, 0) in section IV: ours is the caller's, fixed before the
  first trial; without one, the nadir of the current front plus a tenth of its range.
- The 500 representative points are not described: the caller gives them, or `spanning_pool` draws them.
- Objectives are maximised in the paper's pictures; here everything is minimised inside, and a study's directions are
  honoured at the border.
- Eq. 16 (`adrs`) averages over the found points, as printed; elsewhere the average often runs over the front.
- The ablation of tables V and VI says nothing of the first points without TED: `initial="random"` takes as many
  random ones of the same pool.

Mode "beyond" keeps the initial design and the acquisition. It breeds new candidates from the front for each trial,
and uses one GP with ARD per objective. With `Knowledge`, what needs no trial is not modelled: exact objectives, sums
that trials correct, parameters whose best value follows from others'. `ParetoPruner` gives up trials whose cheap
estimates tell that they cannot reach the front; the sampler learns from what they would probably have reached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_baqe.lazy import on_first_use

if TYPE_CHECKING:
    from lightning_baqe.search.acquisition import (
        best_candidate,
        expected_hypervolume_improvement,
        hypervolume_improvement,
        joint_samples,
        nondominated_cells,
    )
    from lightning_baqe.search.annealing import AnnealingOptions, AnnealingSampler
    from lightning_baqe.search.baselines import OptunaSampler, PoolSearch, gaussian_process, nsga2, random_search, tpe
    from lightning_baqe.search.initial_design import median_distance, rbf, ted
    from lightning_baqe.search.knowledge import Knowledge, Sum
    from lightning_baqe.search.noisy_improvement import NoisyImprovementOptions, NoisyImprovementSampler
    from lightning_baqe.search.pareto import adrs, default_reference_point, hypervolume, pareto_mask
    from lightning_baqe.search.pool import spanning_pool
    from lightning_baqe.search.pruning import ParetoPruner
    from lightning_baqe.search.sampler import BaqeSampler, SamplerOptions
    from lightning_baqe.search.space import SearchSpace, encode
    from lightning_baqe.search.surrogate import ArdGP, ArdOptions, DeepKernelGP, DeepKernelOptions, Posterior, Surrogate

_HOMES = {
    "acquisition": (
        "best_candidate",
        "expected_hypervolume_improvement",
        "hypervolume_improvement",
        "joint_samples",
        "nondominated_cells",
    ),
    "annealing": ("AnnealingOptions", "AnnealingSampler"),
    "baselines": ("OptunaSampler", "PoolSearch", "gaussian_process", "nsga2", "random_search", "tpe"),
    "initial_design": ("median_distance", "rbf", "ted"),
    "knowledge": ("Knowledge", "Sum"),
    "noisy_improvement": ("NoisyImprovementOptions", "NoisyImprovementSampler"),
    "pareto": ("adrs", "default_reference_point", "hypervolume", "pareto_mask"),
    "pool": ("spanning_pool",),
    "pruning": ("ParetoPruner",),
    "sampler": ("BaqeSampler", "SamplerOptions"),
    "space": ("SearchSpace", "encode"),
    "surrogate": ("ArdGP", "ArdOptions", "DeepKernelGP", "DeepKernelOptions", "Posterior", "Surrogate"),
}

__getattr__, __dir__ = on_first_use(__name__, _HOMES)

__all__ = [
    "AnnealingOptions",
    "AnnealingSampler",
    "ArdGP",
    "ArdOptions",
    "BaqeSampler",
    "DeepKernelGP",
    "DeepKernelOptions",
    "Knowledge",
    "NoisyImprovementOptions",
    "NoisyImprovementSampler",
    "OptunaSampler",
    "ParetoPruner",
    "PoolSearch",
    "Posterior",
    "SamplerOptions",
    "SearchSpace",
    "Sum",
    "Surrogate",
    "adrs",
    "best_candidate",
    "default_reference_point",
    "encode",
    "expected_hypervolume_improvement",
    "gaussian_process",
    "hypervolume",
    "hypervolume_improvement",
    "joint_samples",
    "median_distance",
    "nondominated_cells",
    "nsga2",
    "pareto_mask",
    "random_search",
    "rbf",
    "spanning_pool",
    "ted",
    "tpe",
]
