"""A surrogate that starts from what is known and learns the rest from trials. Not in the paper.

| symbol | meaning                                                                              | shape |
| ------ | ------------------------------------------------------------------------------------ | ----- |
| E      | estimates of the outputs, in the units of Y                                          | n x p |
| Y      | observed outputs                                                                     | n x p |
| a, b   | offset and factor that correct an output's estimates: y = a + b e + rest             | p     |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.knowledge import Kind
from lightning_baqe.search.surrogate import ArdGP, ArdOptions, Posterior

_FACTOR_PRIOR = 1.0  # observations that the prior of an estimate's factor counts for, in standardised units
_LEAST_SPREAD = 1e-3  # of what is left, in the same units: figures are measured, and never exact


class InformedGP:
    """Outputs as corrected estimates plus a Gaussian process over what is left. Fitted on construction.

    An exact output is its estimate. Of any other, factor and offset come from a ridge regression: the factor's prior is
    1 for an estimate, and for a score that of the observed spread over the scores'. What is left is one ARD GP over the
    output's own columns, or noise where it has none. An output without estimates is a GP alone.

    Args:
        x: `n x d` encoded observations, n >= 2.
        y: `n x p` standardised outputs.
        estimates: `n x p` in the units of y; NaN where nothing is known.
        kinds: of the estimates, one an output; None without.
        columns: of x, that what is left of each output depends on.
        options: of the GPs.
        seed: likewise.

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
    ) -> None:
        if estimates.shape != y.shape or not len(kinds) == len(columns) == y.shape[1] or len(x) != len(y):
            raise ConfigError(
                f"x {tuple(x.shape)}, y {tuple(y.shape)}, estimates {tuple(estimates.shape)}, {len(kinds)} kinds, "
                f"{len(columns)} columns; wanted (n, d), (n, p), (n, p), p and p"
            )
        self._kinds, self._columns = tuple(kinds), [list(chosen) for chosen in columns]
        self._line: list[tuple[float, float]] = []
        self._spread: list[float] = []
        self._models: list[ArdGP | None] = []
        for output, kind in enumerate(kinds):
            known = ~estimates[:, output].isnan()
            a, b = (0.0, 0.0) if kind is None else _line(estimates[known, output], y[known, output], kind)
            left = y[:, output] - (a + b * estimates[:, output].nan_to_num(0.0) if kind is not None else 0.0)
            use = known if kind is not None else torch.ones_like(known)
            self._line.append((a, b))
            count = int(use.sum())
            spread = float(left[use].square().sum() / max(count - 2, 1)) ** 0.5 if count else 1.0
            self._spread.append(max(spread, _LEAST_SPREAD))
            fits = kind != "exact" and bool(self._columns[output]) and count >= 2
            self._models.append(
                ArdGP(x[use][:, self._columns[output]], left[use, None], options, seed) if fits else None
            )

    @torch.no_grad()
    def posterior(self, x: Tensor, estimates: Tensor) -> Posterior:
        """Predict at `q x d` points with `q x p` estimates; means in the units of y, outputs independent."""
        mean = torch.zeros(len(x), len(self._kinds), dtype=torch.float64)
        variance = torch.zeros_like(mean)
        for output, kind in enumerate(self._kinds):
            if kind is not None:
                a, b = self._line[output]
                mean[:, output] = a + b * estimates[:, output]
            if kind == "exact":
                continue
            model = self._models[output]
            if model is None:
                variance[:, output] = self._spread[output] ** 2
            else:
                left = model.posterior(x[:, self._columns[output]])
                mean[:, output] += left.mean[:, 0]
                variance[:, output] = left.covariance[:, 0, 0]
        return Posterior(mean, torch.diag_embed(variance))


def _line(e: Tensor, y: Tensor, kind: Kind) -> tuple[float, float]:
    """Offset and factor, by ridge regression towards the kind's prior."""
    if kind == "exact" or len(e) == 0:
        return 0.0, 1.0
    centre, target = e.mean(), y.mean()
    e, y = e - centre, y - target
    spread = float(e.square().mean().sqrt())
    prior = 1.0 if kind == "estimate" or spread == 0 else 0.5 * float(y.square().mean().sqrt()) / spread
    weight = _FACTOR_PRIOR * (1.0 if kind == "estimate" else spread**2)
    factor = float((e * y).sum() + weight * prior) / max(float(e.square().sum()) + weight, 1e-12)
    factor = max(factor, 0.0)  # more of what costs never costs less
    return float(target - factor * centre), factor
