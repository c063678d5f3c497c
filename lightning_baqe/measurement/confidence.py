"""How well samples tell a median, whatever their distribution.

Latencies are skewed and have outliers, so that no normal distribution is assumed: the interval lies between two order
statistics, whose ranks are quantiles of Binomial(n, 1/2) (J.-Y. Le Boudec, Performance Evaluation of Computer and
Communication Systems, 2010, theorem 2.1; W. J. Conover, Practical Nonparametric Statistics, 1999, section 3.2). It
holds for independent samples; those of a machine whose clock drifts are not, which is why a reference is timed beside
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.stats import binom

LEVEL = 0.95


def median_interval(samples: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """A confidence interval of the median.

    With x_(1) <= ... <= x_(n) and j the largest rank such that P(Binomial(n, 1/2) < j) <= (1 - level) / 2, the median
    lies within [x_(j), x_(n + 1 - j)] with a probability of at least ``level``.

    Args:
        samples: in any order.
        level: of confidence, 0..1.

    Returns:
        ``(low, high)``; infinite where there are too few samples for the level (fewer than 6 at 95 %).
    """
    # SciPy's quantile_test chooses the same ranks, in seven times the time, and has NaN where samples are too few.
    tail = (1.0 - level) / 2 * (1 + 1e-12)  # probabilities that equal it are no larger, whatever their rounding
    rank = int(binom.ppf(tail, len(samples), 0.5)) if samples else 0
    if binom.cdf(rank - 1, len(samples), 0.5) > tail:
        rank -= 1
    if rank < 1:
        return -math.inf, math.inf
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[-rank]


def relative_half_width(samples: Sequence[float], median: float) -> float:
    """The larger distance from the median to an end of its 95 % interval, over the median."""
    low, high = median_interval(samples)
    return max(high - median, median - low) / median
