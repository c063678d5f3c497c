"""Integer programs against brute force, and what is said where budgets cannot be kept."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
import torchvision

import lightning_baqe as baqe
from lightning_baqe.allocation.choices import Allocation
from lightning_baqe.benchmarks.bits.instances import big, every, instance, sum_of
from lightning_baqe.errors import BaqeError, ConfigError, InfeasibleError


def pairs_of(pairs: dict[tuple[str, str], dict[tuple[int, int], float]], bits: dict[str, int]) -> float:
    return math.fsum(values.get((bits[a], bits[b]), 0.0) for (a, b), values in pairs.items())


def smallest(problem: dict[str, Any]) -> float | None:
    """By brute force."""
    feasible = [
        sum_of(problem["sensitivity"], bits) + pairs_of(problem.get("pairs") or {}, bits)
        for bits in every(problem)
        if all(sum_of(problem["costs"][name], bits) <= limit + 1e-12 for name, limit in problem["budgets"].items())
    ]
    return min(feasible, default=None)


@pytest.mark.parametrize("seeds", [range(first, first + 50) for first in range(0, 300, 50)], ids=str)
def test_the_optimum_is_that_of_brute_force(seeds: range) -> None:
    infeasible = 0
    for seed in seeds:
        problem = instance(seed)
        wanted = smallest(problem)
        if wanted is None:
            infeasible += 1
            with pytest.raises(InfeasibleError):
                baqe.allocate_bits(**problem)
            continue
        found = baqe.allocate_bits(**problem)
        assert sum_of(problem["sensitivity"], found) == pytest.approx(wanted, rel=1e-9, abs=1e-12), seed
        assert (found.sensitivity, found.gap) == (pytest.approx(wanted, rel=1e-9, abs=1e-12), 0.0)
        assert dict(found) in every(problem)
        for name, limit in problem["budgets"].items():
            assert found.costs[name] == pytest.approx(sum_of(problem["costs"][name], found))
            assert found.costs[name] <= limit + 1e-12
    assert infeasible < len(seeds) / 2


@pytest.mark.parametrize("seed", range(40))
def test_pairs_of_layers(seed: int) -> None:
    problem, rng = instance(seed), np.random.default_rng(1000 + seed)
    options = problem["sensitivity"]
    problem["pairs"] = {
        (a, b) if rng.random() < 0.5 else (b, a): {
            both: float(rng.normal())
            for both in itertools.product(sorted({*options[a], *options[b]}), repeat=2)
            if rng.random() < 0.9
        }
        for a, b in itertools.combinations(options, 2)
        if rng.random() < 0.8
    }  # fmt: skip
    wanted = smallest(problem)
    if wanted is None:
        return
    found = baqe.allocate_bits(**problem)
    assert (found.sensitivity, found.gap) == (pytest.approx(wanted, abs=1e-8), 0.0)
    assert sum_of(options, found) + pairs_of(problem["pairs"], found) == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_a_large_network_with_three_budgets(seed: int) -> None:
    sensitivity, costs = big(torchvision.models.resnet101(), (2, 3, 4, 6, 8), seed)
    budgets = {}
    for name, values in costs.items():
        low, high = (sum(f(of.values()) for of in values.values()) for f in (min, max))
        budgets[name] = low + 0.4 * (high - low)
    start = time.process_time()
    found = baqe.allocate_bits(sensitivity, costs, budgets)
    assert found.gap == 0
    assert all(found.costs[name] <= limit for name, limit in budgets.items())
    assert time.process_time() - start < 20  # under a second where nothing else runs
    # No single layer can have more bits or others without breaking a budget or losing.
    for name, bits in found.items():
        for other in sensitivity[name]:
            change = {**found, name: other}
            fits = all(sum_of(costs[cost], change) <= limit for cost, limit in budgets.items())
            assert not fits or sensitivity[name][other] >= sensitivity[name][bits]


def test_costs_without_a_budget_are_told() -> None:
    sensitivity = {"a": {4: 1.0, 8: 0.5}, "b": {4: 3.0, 8: 0.25}}
    costs = {"size_bytes": {n: {4: 10, 8: 20} for n in "ab"}, "bops": {n: {4: 1, 8: 4} for n in "ab"}}
    found = baqe.allocate_bits(sensitivity, costs, {"size_bytes": 30})
    assert (found, found.sensitivity, found.costs) == ({"a": 4, "b": 8}, 1.25, {"size_bytes": 30.0, "bops": 5.0})
    assert isinstance(found, Allocation)
    assert baqe.allocate_bits(sensitivity, costs, {}) == {"a": 8, "b": 8}
    assert baqe.allocate_bits(sensitivity, costs, {"size_bytes": 30}, fixed={"b": 4}) == {"a": 8, "b": 4}
    assert baqe.allocate_bits(sensitivity, costs, {"size_bytes": 30}, tied=[("a", "b")]) == {"a": 4, "b": 4}


def test_budgets_that_cannot_be_kept() -> None:
    sensitivity = {"a": {4: 1.0, 8: 0.5}, "b": {4: 3.0, 8: 0.25}}
    size = {n: {4: 10.0, 8: 20.0} for n in "ab"}
    speed = {n: {4: 7.0, 8: 2.0} for n in "ab"}  # packed bits may be slower
    with pytest.raises(InfeasibleError, match=r"size_bytes=19 is too small: the smallest .* is 20"):
        baqe.allocate_bits(sensitivity, {"size_bytes": size}, {"size_bytes": 19})
    message = (
        r"size_bytes=25, latency_us=6 cannot be kept together; .* size_bytes at least 40 or latency_us at least 14"
    )
    with pytest.raises(InfeasibleError, match=message):
        baqe.allocate_bits(sensitivity, {"size_bytes": size, "latency_us": speed}, {"size_bytes": 25, "latency_us": 6})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sensitivity": {}}, "has no layers"),
        ({"sensitivity": {"a": {4: math.nan}, "b": {4: 1.0}}}, "'a' at 4 bits is nan: a finite number"),
        ({"costs": {"size_bytes": {"a": {4: 1, 8: 2}}}}, r"costs\['size_bytes'\] has no layer 'b'"),
        ({"costs": {"size_bytes": {"a": {4: 1}, "b": {4: 1, 8: 2}}}}, "'a' has no value for 8 bits; it has"),
        ({"budgets": {"size_byte": 1}}, "budgets names 'size_byte', .*did you mean 'size_bytes'"),
        ({"budgets": {"size_bytes": math.inf}}, "a finite number is wanted, or leave it out"),
        ({"tied": [("a", "c")]}, "tied names layer 'c'"),
        ({"fixed": {"a": 3}}, r"layer 'a' has no bits to choose from: .*fixed are \{'a': 3\}"),
        ({"fixed": {"a": 4, "b": 8}, "tied": [("a", "b")]}, "the tied layers a, b have no bits to choose from"),
        ({"pairs": {("a", "a"): {}}}, "pairs has 'a' with itself"),
        ({"pairs": {("a", "c"): {}}}, "pairs names layer 'c'"),
        ({"pairs": {("a", "b"): {(4, 4): math.inf}}}, "pairs of 'a' and 'b' at 4 and 4 bits is inf"),
        ({"time_limit_s": 0}, "seconds above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_right(changes: dict[str, Any], message: str) -> None:
    values = {n: {4: 1.0, 8: 2.0} for n in "ab"}
    problem = {"sensitivity": values, "costs": {"size_bytes": values}, "budgets": {"size_bytes": 3}}
    with pytest.raises(ConfigError, match=message):
        baqe.allocate_bits(**problem | changes)


def test_too_little_time() -> None:
    sensitivity, costs = big(torchvision.models.resnet50(), (2, 3, 4, 5, 6, 7, 8), 0)
    rng = np.random.default_rng(0)
    pairs = {
        pair: {(p, q): rng.normal() for p in range(2, 9) for q in range(2, 9)}
        for pair in itertools.combinations(list(sensitivity)[:30], 2)
    }
    with pytest.raises(BaqeError, match=r"no allocation in time_limit_s=0\.001"):
        baqe.allocate_bits(sensitivity, costs, {"size_bytes": 1e7}, pairs=pairs, time_limit_s=1e-3)


def test_the_gap_holds() -> None:
    """A time limit in the middle: the true optimum is within the gap."""
    rng = np.random.default_rng(1)
    names = [f"layer{i}" for i in range(12)]
    sensitivity = {n: {b: float(rng.normal()) for b in (2, 4, 8)} for n in names}
    pairs = {pair: {(p, q): float(rng.normal()) for p in (2, 4, 8) for q in (2, 4, 8)}
             for pair in itertools.combinations(names, 2)}  # fmt: skip
    costs = {"size_bytes": {n: {b: float(b) for b in (2, 4, 8)} for n in names}}
    best = baqe.allocate_bits(sensitivity, costs, {"size_bytes": 52}, pairs=pairs, time_limit_s=300.0)
    assert best.gap == 0
    for seconds in (0.02, 0.1, 0.5):
        try:
            found = baqe.allocate_bits(sensitivity, costs, {"size_bytes": 52}, pairs=pairs, time_limit_s=seconds)
        except BaqeError:
            continue  # none was found at all
        assert found.sensitivity - found.gap - 1e-9 <= best.sensitivity <= found.sensitivity + 1e-9


def test_equal_layers_just_above_a_large_budget() -> None:
    """Many allocations miss the budget by less than a solver tells: the answer is exact, and comes at once."""
    values = {f"layer{i}": {4: 1.0 + i / 100, 8: 0.0} for i in range(20)}
    costs = {"bops": {name: {4: 1e11, 8: 2e11} for name in values}}
    start = time.process_time()
    found = baqe.allocate_bits(values, costs, {"bops": 3e12 - 100})
    assert time.process_time() - start < 30
    assert found.costs["bops"] == 2.9e12
    assert sum(bits == 8 for bits in found.values()) == 9
