"""The closed form against samples, against BoTorch, and where samples see nothing."""

from __future__ import annotations

import pytest
import torch
from botorch.acquisition.multi_objective.analytic import ExpectedHypervolumeImprovement
from botorch.models.deterministic import GenericDeterministicModel
from botorch.posteriors import GPyTorchPosterior
from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
from gpytorch.distributions import MultitaskMultivariateNormal
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search import expected_hypervolume_improvement, nondominated_cells
from lightning_baqe.search.acquisition import log_expected_improvement


def case(m: int, seed: int = 0, constraints: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means, variances, front, reference point."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.rand(6, m + constraints, generator=generator, dtype=torch.float64)
    variance = torch.rand(6, m + constraints, generator=generator, dtype=torch.float64) * 0.3 + 0.01
    return mean, variance, torch.rand(8, m, generator=generator, dtype=torch.float64), torch.ones(m).double() * 1.1


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("constraints", [0, 2])
def test_agrees_with_samples(m: int, constraints: int) -> None:
    mean, variance, front, reference = case(m, constraints=constraints)
    exact = log_expected_improvement(mean, variance, nondominated_cells(front, reference)).exp()
    sampled = expected_hypervolume_improvement(
        mean, torch.diag_embed(variance), front, reference, n_constraints=constraints, n_samples=2**15
    )
    assert torch.allclose(exact, sampled, rtol=0.03, atol=1e-4)


class _Independent(GenericDeterministicModel):
    """A posterior that is given."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__(lambda x: x, num_outputs=mean.shape[1])
        self._given = mean, variance

    def posterior(self, X: Tensor, **_: object) -> GPyTorchPosterior:  # type: ignore[override]
        mean, variance = self._given
        return GPyTorchPosterior(MultitaskMultivariateNormal(mean[:, None], torch.diag_embed(variance)))


@pytest.mark.parametrize("m", [2, 3])
def test_agrees_with_botorch(m: int) -> None:
    mean, variance, front, reference = case(m, seed=1)
    theirs = ExpectedHypervolumeImprovement(
        model=_Independent(-mean, variance),
        ref_point=(-reference).tolist(),
        partitioning=FastNondominatedPartitioning(ref_point=-reference, Y=-front),
    )(torch.zeros(6, 1, 2, dtype=torch.float64))
    ours = log_expected_improvement(mean, variance, nondominated_cells(front, reference)).exp()
    assert torch.allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("distance", [1.0, 30.0, 1e4])
def test_has_a_slope_far_behind_the_front(distance: float) -> None:
    front, reference = torch.zeros(1, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    mean = torch.full((1, 2), distance, dtype=torch.float64, requires_grad=True)
    value = log_expected_improvement(mean, torch.full((1, 2), 0.01).double(), nondominated_cells(front, reference))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert mean.grad is not None
    assert bool((mean.grad < 0).all())


def test_without_doubt_it_is_the_improvement_itself() -> None:
    front, reference = torch.tensor([[0.5, 0.5]]).double(), torch.ones(2, dtype=torch.float64)
    mean, variance = torch.tensor([[0.25, 0.25], [0.75, 0.75]]).double(), torch.zeros(2, 2, dtype=torch.float64)
    value = log_expected_improvement(mean, variance, nondominated_cells(front, reference)).exp()
    assert value.tolist() == pytest.approx([0.75**2 - 0.25, 0.0], abs=1e-8)


def test_shapes_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"wanted \(n, p\)"):
        log_expected_improvement(torch.zeros(2, 1), torch.zeros(2, 2), (torch.zeros(1, 2), torch.ones(1, 2)))
