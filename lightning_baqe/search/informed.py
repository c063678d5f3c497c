"""A surrogate that starts from what is known and learns the rest from trials. Not in the paper.

| symbol | meaning                                                                              | shape |
| ------ | ------------------------------------------------------------------------------------ | ----- |
| E      | estimates of the outputs, in the units of Y                                          | n x p |
| N      | how often something happens that adds about the same to an output each time          | n x p |
| Y      | observed outputs                                                                     | n x p |
| a, b   | offset and factor that correct an output's estimates: y = a + b e + c n + rest       | p     |
| c      | what happens once adds                                                               | p     |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.knowledge import Kind
from lightning_baqe.search.surrogate import ArdGP, ArdOptions, Posterior

_FACTOR_PRIOR = 1.0  # observations that the prior of an estimate's factor counts for, in standardised units
_STEP_PRIOR = 0.1  # likewise of what one count adds, with the spread that the observed counts have
_LEAST_SPREAD = 1e-3  # of what is left, in the same units: figures are measured, and never exact


class InformedGP:
    """Outputs as corrected estimates plus a Gaussian process over what is left. Fitted on construction.

    An exact output is its estimate. Of any other, offset, factor and step come from a ridge regression: the factor's
    prior is 1 for an estimate, and for a score that of the observed spread over the scores'. What is left is one ARD GP
    over the output's own columns, or noise where it has none. An output without estimates is a GP alone.

    Args:
        x: `n x d` encoded observations, n >= 2.
        y: `n x p` standardised outputs.
        estimates: `n x p` in the units of y; NaN where nothing is known.
        kinds: of the estimates, one an output; None without.
        columns: of x, that what is left of each output depends on.
        counts: `n x p`, at least 0 where more is more of the output.
        steps: what one count is taken to add before, in the units of y, one an output.
        options: of the GPs.

    Raises:
        ConfigError: shapes do not fit.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        estimates: Tensor,
        kinds: Sequence[Kind | None],
        columns: Sequence[Sequence[int]],
        counts: Tensor,
        steps: Sequence[float],
        options: ArdOptions | None = None,
    ) -> None:
        if (
            not estimates.shape == counts.shape == y.shape
            or not len(kinds) == len(columns) == len(steps) == y.shape[1]
            or len(x) != len(y)
        ):
            raise ConfigError(
                f"x {tuple(x.shape)}, y {tuple(y.shape)}, estimates {tuple(estimates.shape)}, "
                f"counts {tuple(counts.shape)}, {len(kinds)} kinds, {len(columns)} columns, {len(steps)} steps; "
                "wanted (n, d), three of (n, p), and three of p"
            )
        # Of each output: its line, if it has estimates, the columns and the model of what is left, and its spread.
        self._outputs: list[tuple[tuple[float, float, float] | None, list[int], ArdGP | None, float]] = []
        for output, kind in enumerate(kinds):
            line: tuple[float, float, float] | None = None
            chosen, left = list(columns[output]), y[:, output]
            use = torch.ones(len(y), dtype=torch.bool) if kind is None else ~estimates[:, output].isnan()
            if kind is not None:
                e, n = estimates[use, output], counts[use, output]
                a, b, c = line = _line(e, n, left[use], kind, steps[output])
                left = left[use] - (a + b * e + c * n)
            spread = max(float(left.square().sum() / max(len(left) - 2, 1)) ** 0.5 if len(left) else 1.0, _LEAST_SPREAD)
            fits = kind != "exact" and chosen and len(left) >= 2
            model = ArdGP(x[use][:, chosen], left[:, None], options) if fits else None
            self._outputs.append((line, chosen, model, 0.0 if kind == "exact" else spread))

    @torch.no_grad()
    def posterior(self, x: Tensor, estimates: Tensor, counts: Tensor) -> Posterior:
        """Predict at `q x d` points with `q x p` estimates and counts; means in the units of y, outputs independent.

        Where an estimate is NaN, the output is as far as is known a standard normal number.
        """
        mean = torch.zeros(len(x), len(self._outputs), dtype=torch.float64)
        variance = torch.zeros_like(mean)
        for output, (line, columns, model, spread) in enumerate(self._outputs):
            if line is not None:
                a, b, c = line
                mean[:, output] = a + b * estimates[:, output] + c * counts[:, output]
            variance[:, output] = spread**2
            if model is not None:
                left = model.posterior(x[:, columns])
                mean[:, output] += left.mean[:, 0]
                variance[:, output] = left.covariance[:, 0, 0]
            unknown = mean[:, output].isnan()  # no estimate here: all that is known is how the output spreads
            mean[unknown, output], variance[unknown, output] = 0.0, 1.0
        return Posterior(mean, torch.diag_embed(variance))


def _line(e: Tensor, n: Tensor, y: Tensor, kind: Kind, step: float) -> tuple[float, float, float]:
    """Offset, factor and step, by ridge regression towards the kind's prior and the given step."""
    if kind == "exact" or len(e) == 0:
        return 0.0, 1.0, 0.0
    centre, middle, target = e.mean(), n.mean(), y.mean()
    e, n, y = e - centre, n - middle, y - target
    spread = float(e.square().mean().sqrt())
    prior = 1.0 if kind == "estimate" or spread == 0 else 0.5 * float(y.square().mean().sqrt()) / spread
    weight = _FACTOR_PRIOR * (1.0 if kind == "estimate" else spread**2)
    rare = _STEP_PRIOR * float(n.square().mean())
    ee, en, nn = float(e.square().sum()) + weight, float((e * n).sum()), float(n.square().sum()) + rare
    ey, ny = float((e * y).sum()) + weight * prior, float((n * y).sum()) + rare * step
    # More of what costs never costs less: of two factors, the one that came out negative is none.
    determinant = ee * nn - en**2
    c = max((ee * ny - en * ey) / determinant, 0.0) if determinant > 1e-12 * max(ee * nn, 1e-12) else step
    b = max((ey - en * c) / max(ee, 1e-12), 0.0)
    if b == 0.0 and nn > 0:
        c = max(ny / nn, 0.0)
    return float(target - b * centre - c * middle), b, c
