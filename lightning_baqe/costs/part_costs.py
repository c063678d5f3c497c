"""Costs of a machine that was measured a few times, from what other machines take.

A network's latency is the sum of what its parts cost. What parts cost differs from machine to machine, but not at
random: where one part is dear, others like it are. So the costs of known machines, each divided by its mean latency,
give a Gaussian for an unknown one; a few of its measurements make that a narrower Gaussian (Bayesian linear regression
with a prior that is learned from other tasks).

| symbol | meaning | shape |
| --- | --- | --- |
| X | how often each network has each part | ``(networks, parts)`` |
| w | cost of each part, over the machine's mean latency | ``(parts,)`` |
| s | a machine's latency where ``X w`` is 1 | a number |
| y | latencies of a machine, s X w and noise | ``(networks,)`` |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from lightning_baqe.errors import ConfigError, MeasurementError

Array = np.ndarray
LEAST_NOISE = 1e-4
RIDGE = 0.1  # of a known machine's costs, which parts that come together do not tell apart
OWN = 0.01  # share of a part's variance that no other machine explains
USUAL_NOISE, NOISE_SPREAD = 0.05, 1.0  # of measurements over their mean: median and log deviation, before any is seen


@dataclass(frozen=True)
class PartCosts:
    """A Gaussian of what parts cost on a machine.

    Attributes:
        mean, covariance: of w, ``(parts,)`` and ``(parts, parts)``.
        scale: s; 1 for a machine that was never measured, whose latencies are then relative ones.
        noise: standard deviation of measurements that sums of parts do not explain, over s.
    """

    mean: Array
    covariance: Array
    scale: float = 1.0
    noise: float = USUAL_NOISE

    @classmethod
    def of_machines(cls, counts: Array, latencies: Mapping[str, Array]) -> PartCosts:
        """Of an unknown machine, as known ones let us expect it.

        Args:
            counts: X of the networks that were measured.
            latencies: of two or more machines by name, each ``(networks,)``.

        Raises:
            ConfigError: a single machine, which says nothing of how machines differ.
            MeasurementError: latencies of another number, or that are none.
        """
        if len(latencies) < 2:
            raise ConfigError(f"{len(latencies)} machines are known, but two or more are wanted")
        costs = []
        for name, latency in latencies.items():
            _check(counts, latency, name)
            system = counts.T @ counts + RIDGE * np.eye(counts.shape[1])
            costs.append(np.linalg.solve(system, counts.T @ (latency / latency.mean())))
        covariance = np.cov(np.array(costs).T)
        own = OWN * np.trace(covariance) / len(covariance)
        return cls(np.mean(costs, axis=0), covariance + own * np.eye(len(covariance)))

    def given(self, counts: Array, latency: Array) -> PartCosts:
        """Of the machine that these measurements are of.

        Scale and noise are the most likely ones (type II maximum likelihood, with a log-normal prior of the noise).

        Args:
            counts: X of what was measured, ``(n, parts)``.
            latency: y, ``(n,)``.

        Raises:
            MeasurementError: latencies of another number, or that are none.
        """
        _check(counts, latency, "the machine")
        expected, spread = counts @ self.mean, counts @ self.covariance @ counts.T

        def unlikely(at: Array) -> float:
            scale, noise = np.exp(at[0]), _noise(at[1])
            root = np.linalg.cholesky(spread + noise**2 * np.eye(len(latency)))
            apart = np.linalg.solve(root, latency / scale - expected)
            rare = (at[1] - math.log(USUAL_NOISE)) / NOISE_SPREAD
            return float(apart @ apart / 2 + np.log(np.diag(root)).sum() + len(latency) * at[0] + rare**2 / 2)

        if not expected.sum() > 0:
            raise MeasurementError("the networks that were measured have no parts that cost anything: measure others")
        start = [math.log(latency.sum() / expected.sum()), math.log(USUAL_NOISE)]
        best = minimize(unlikely, start, method="Nelder-Mead").x
        scale, noise = np.exp(best[0]), _noise(best[1])
        gain = np.linalg.solve(spread + noise**2 * np.eye(len(latency)), counts @ self.covariance).T
        mean = self.mean + gain @ (latency / scale - expected)
        covariance = self.covariance - gain @ counts @ self.covariance
        return replace(self, mean=mean, covariance=covariance, scale=float(scale), noise=float(noise))

    def predict(self, counts: Array) -> tuple[Array, Array]:
        """Latencies of networks, and their standard deviations, noise included; ``(networks,)`` each."""
        variance = np.einsum("np,pq,nq->n", counts, self.covariance, counts) + self.noise**2
        return self.scale * (counts @ self.mean), self.scale * np.sqrt(variance)

    def most_telling(self, counts: Array, n: int) -> list[int]:
        """Places of the networks to measure: each the one that is least certain when those before it are known.

        Args:
            counts: X of what could be measured.
            n: how many.

        Raises:
            ConfigError: more than there are.
        """
        if n > len(counts):
            raise ConfigError(f"{n} measurements of {len(counts)} networks: give more networks, or ask for fewer")
        covariance, found = self.covariance, list[int]()
        for _ in range(n):
            variance = np.einsum("np,pq,nq->n", counts, covariance, counts)
            variance[found] = -1.0
            best = int(variance.argmax())
            known = covariance @ counts[best]
            covariance = covariance - np.outer(known, known) / (variance[best] + self.noise**2)
            found.append(best)
        return found


def _noise(logarithm: float) -> float:
    """Never nothing, also where latencies are sums of parts to the last digit."""
    return math.hypot(math.exp(logarithm), LEAST_NOISE)


def _check(counts: Array, latency: Array, name: str) -> None:
    if len(latency) != len(counts) or len(latency) == 0:
        raise MeasurementError(f"{name} has {len(latency)} latencies of {len(counts)} networks; one for each is wanted")
    if not (np.isfinite(latency).all() and (latency > 0).all()):
        raise MeasurementError(f"{name} has latencies that are not finite or not above 0: measure it again")
