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
        options: of the GPs.
        seed: likewise.
        counts: `n x p`, at least 0 where more is more of the output; None: nothing is counted.
        steps: what one count is taken to add before, in the units of y, one an output.

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
        options: ArdOptions | None = None,
        seed: int = 0,
        counts: Tensor | None = None,
        steps: Sequence[float] | None = None,
    ) -> None:
        counts = torch.zeros_like(y) if counts is None else counts
        steps = [0.0] * y.shape[1] if steps is None else steps
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
        self._kinds, self._columns = tuple(kinds), [list(chosen) for chosen in columns]
        self._line: list[tuple[float, float, float]] = []
        self._spread: list[float] = []
        self._models: list[ArdGP | None] = []
        for output, kind in enumerate(kinds):
            known = ~estimates[:, output].isnan()
            a, b, c = 0.0, 0.0, 0.0
            if kind is not None:
                a, b, c = _line(estimates[known, output], counts[known, output], y[known, output], kind, steps[output])
            left = y[:, output] - (a + b * estimates[:, output].nan_to_num(0.0) + c * counts[:, output])
            use = known if kind is not None else torch.ones_like(known)
            self._line.append((a, b, c))
            count = int(use.sum())
            spread = float(left[use].square().sum() / max(count - 2, 1)) ** 0.5 if count else 1.0
            self._spread.append(max(spread, _LEAST_SPREAD))
            fits = kind != "exact" and bool(self._columns[output]) and count >= 2
            self._models.append(
                ArdGP(x[use][:, self._columns[output]], left[use, None], options, seed) if fits else None
            )

    @torch.no_grad()
    def posterior(self, x: Tensor, estimates: Tensor, counts: Tensor | None = None) -> Posterior:
        """Predict at `q x d` points with `q x p` estimates and counts; means in the units of y, outputs independent.

        Where an estimate is NaN, the output is as far as is known a standard normal number.
        """
        mean = torch.zeros(len(x), len(self._kinds), dtype=torch.float64)
        variance = torch.zeros_like(mean)
        counts = torch.zeros_like(mean) if counts is None else counts
        for output, kind in enumerate(self._kinds):
            if kind is not None:
                a, b, c = self._line[output]
                mean[:, output] = a + b * estimates[:, output] + c * counts[:, output]
            model = self._models[output]
            if model is not None:
                left = model.posterior(x[:, self._columns[output]])
                mean[:, output] += left.mean[:, 0]
                variance[:, output] = left.covariance[:, 0, 0]
            elif kind != "exact":
                variance[:, output] = self._spread[output] ** 2
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
