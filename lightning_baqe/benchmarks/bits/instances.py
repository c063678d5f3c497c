"""Problems of bit allocation, small ones for brute force and large ones as networks have them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn


def instance(seed: int) -> dict[str, Any]:
    """A small random problem; every other one of whole numbers: sums are often equal, and budgets exactly met.
    Some sensitivities span twelve decades.
    """
    rng = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(rng.integers(2, 7))]
    options = {name: sorted(rng.choice([2, 3, 4, 6, 8, 32], rng.integers(1, 4), replace=False)) for name in names}
    tied = []
    if len(names) > 3 and seed % 3 == 0:
        tied = [tuple(names[i] for i in rng.choice(len(names), 2, replace=False)) for _ in range(2)]
        common = list(map(int, options[names[0]]))
        options.update({name: common for group in tied for name in group})

    def values() -> dict[str, dict[int, float]]:
        whole = seed % 2 == 0
        return {
            name: {int(b): float(rng.integers(-2, 6) if whole else rng.normal()) for b in options[name]}
            for name in names
        }

    def sensitivities() -> dict[str, dict[int, float]]:
        if seed % 5 != 4:
            return values()
        return {name: {int(b): float(10.0 ** rng.uniform(-12, 0)) for b in of} for name, of in options.items()}

    costs = {f"cost{i}": values() for i in range(rng.integers(1, 4))}
    sums = {name: [sum(f(of[layer].values()) for layer in names) for f in (min, max)] for name, of in costs.items()}
    budgets = {
        name: float(round(low + rng.uniform(0.1, 0.9) * (high - low), 0 if seed % 2 == 0 else 9))
        for name, (low, high) in sums.items()
    }
    return {"sensitivity": sensitivities(), "costs": costs, "budgets": budgets, "tied": tied}


def every(problem: Mapping[str, Any]) -> list[dict[str, int]]:
    """All allocations that obey the ties."""
    sensitivity = problem["sensitivity"]
    found = (dict(zip(sensitivity, bits, strict=True)) for bits in itertools.product(*sensitivity.values()))
    return [bits for bits in found if all(len({bits[name] for name in group}) == 1 for group in problem["tied"])]


def sum_of(values: Mapping[str, Mapping[int, float]], bits: Mapping[str, int]) -> float:
    """Over layers, rounded once."""
    return math.fsum(values[name][b] for name, b in bits.items())


def smallest(problem: Mapping[str, Any]) -> float | None:
    """The least sum of sensitivities within the budgets, by brute force; None: nothing keeps them."""
    feasible = [
        sum_of(problem["sensitivity"], bits)
        for bits in every(problem)
        if all(sum_of(problem["costs"][name], bits) <= limit + 1e-12 for name, limit in problem["budgets"].items())
    ]
    return min(feasible, default=None)


def layer_sizes(net: nn.Module) -> dict[str, int]:
    """Weights of each layer."""
    return {n: m.weight.numel() for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def big(net: nn.Module, bits: tuple[int, ...], seed: int) -> tuple[Any, dict[str, Any]]:
    """Sensitivities and three costs as a network of that size has them."""
    rng, sizes = np.random.default_rng(seed), layer_sizes(net)
    factors = {n: math.exp(rng.normal()) for n in sizes}
    sensitivity = {n: {b: factors[n] * s**0.5 * 4.0**-b for b in bits} for n, s in sizes.items()}
    pixels = {n: int(rng.choice([49, 196, 784, 3136])) for n in sizes}
    latency = {n: 50 * rng.random() for n in sizes}
    return sensitivity, {
        "size_bytes": {n: {b: s * b / 8 for b in bits} for n, s in sizes.items()},
        "bops": {n: {b: s * pixels[n] * b * b for b in bits} for n, s in sizes.items()},
        "latency_us": {n: {b: latency[n] * (b / 8) ** 0.7 * (1 + 0.1 * rng.random()) for b in bits} for n in sizes},
    }
