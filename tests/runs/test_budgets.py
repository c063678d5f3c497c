"""Budgets and the networks that keep them."""

from __future__ import annotations

import pytest
from rich.console import Console

from lightning_baqe.costs.layer_costs import BOPS, LATENCY, MEAN_BITS, SIZE, LayerCosts
from lightning_baqe.errors import ConfigError, InfeasibleError
from lightning_baqe.runs.budgets import Budget, Budgets, budget_table, solve, unrewarded
from lightning_baqe.runs.summary import Baseline, Trial

SENSITIVITY = {"stem": {8: 0.5}, "a": {4: 3.0, 8: 1.0}, "b": {4: 2.0, 8: 0.5}}
COSTS = LayerCosts(
    {
        SIZE: {"stem": {8: 10.0}, "a": {4: 100.0, 8: 200.0}, "b": {4: 50.0, 8: 100.0}},
        BOPS: {"stem": {8: 640.0}, "a": {4: 160.0, 8: 640.0}, "b": {4: 160.0, 8: 640.0}},
        LATENCY: {"stem": {8: 5.0}, "a": {4: 10.0, 8: 11.0}, "b": {4: 10.0, 8: 20.0}},
        MEAN_BITS: {"stem": {8: 0.8}, "a": {4: 2.4, 8: 4.8}, "b": {4: 1.2, 8: 2.4}},
    },
    {SIZE: 40.0, BOPS: 0.0, LATENCY: 4.0, MEAN_BITS: 0.0},
)


def test_levels_lie_between_the_smallest_and_the_largest() -> None:
    budgets = Budgets().of(COSTS)
    names = [f"{level}-{cost}" for cost in ("size", "bops", "latency") for level in ("high", "medium", "low")]
    assert [budget.name for budget in budgets] == names
    assert budgets[0].limits == {SIZE: 200 + 0.75 * 150}
    assert budgets[8].limits == {LATENCY: 29 + 0.25 * 11}
    own = Budgets(size_bytes=300, mean_bits=6.0)
    assert own.of(COSTS) == [Budget("own", {SIZE: 300, MEAN_BITS: 6.0})]
    assert [b.limits for b in Budgets(levels={"most": 1.0}).of(COSTS)] == [{SIZE: 350}, {BOPS: 1920}, {LATENCY: 40}]


def test_limits_are_those_of_whole_networks() -> None:
    row = solve(Budget("own", {SIZE: 300}), SENSITIVITY, COSTS)
    assert row.allocation == {"stem": 8, "a": 8, "b": 4}
    assert row.predicted == {SIZE: 300, BOPS: 1440, LATENCY: 30, MEAN_BITS: pytest.approx(6.8)}
    for cost in COSTS.tables:
        assert COSTS.total(cost, row.allocation) == pytest.approx(row.predicted[cost])
    assert row.allocation.sensitivity == 0.5 + 1.0 + 2.0
    assert solve(Budget("own", {SIZE: 299.5}), SENSITIVITY, COSTS).allocation == {"stem": 8, "a": 4, "b": 8}
    with pytest.raises(InfeasibleError, match=r"size_bytes=199 is too small: the smallest .* is 200"):
        solve(Budget("own", {SIZE: 199}), SENSITIVITY, COSTS)
    with pytest.raises(ConfigError, match="budget 'size' is none of size_bytes, bops, latency_us, mean_bits"):
        solve(Budget("own", {"size": 1}), SENSITIVITY, COSTS)


def test_pairs_count() -> None:
    pairs = {("a", "b"): {(8, 4): 5.0}}
    assert solve(Budget("own", {SIZE: 300}), SENSITIVITY, COSTS, pairs).allocation == {"stem": 8, "a": 4, "b": 8}


def test_what_the_device_does_not_reward_is_told() -> None:
    assert unrewarded(COSTS, (4, 8)) is None  # 29 of 40 us
    flat = {layer: dict.fromkeys(of, 20.0) for layer, of in COSTS.tables[LATENCY].items()}
    flat["a"][4] = 19.0
    costs = LayerCosts({**COSTS.tables, LATENCY: flat}, COSTS.rest)
    line = unrewarded(costs, (4, 8, 32))
    assert line is not None
    assert "4 bit 63.0 us, 8 bit 64.0 us" in line
    slower = LayerCosts({**COSTS.tables, LATENCY: {**flat, "a": {4: 90.0, 8: 20.0}}}, COSTS.rest)
    assert unrewarded(slower, (4, 8, 32)) is not None


def test_limits_or_levels_are_wanted() -> None:
    with pytest.raises(ConfigError, match="neither limits nor levels"):
        Budgets(levels={})
    assert Budgets(latency_us=5.0, levels={}).own == {LATENCY: 5.0}


def test_the_table_says_what_became_of_each_budget() -> None:
    row = solve(Budget("high-size", {SIZE: 310}), SENSITIVITY, COSTS)

    def measured(kind: type, bits: dict[str, int], **more: object) -> object:
        pairs = {layer: (b, b) for layer, b in bits.items()}
        return kind(bits=pairs, accuracy=0.9, test_accuracy=0.88, size_bytes=301, **more)

    entries = {
        "uniform_8": measured(Baseline, {"stem": 8, "a": 8, "b": 8}, name="uniform_8", latency_us=41.0),
        "high-size": measured(Trial, row.allocation, number=0, latency_us=20.5),
        "uniform_2": measured(Baseline, {"stem": 8, "a": 2, "b": 2}, name="uniform_2", latency_us=10.0),
    }
    console = Console(width=160, record=True)
    console.print(budget_table([row], entries, COSTS, "accuracy"))  # type: ignore[arg-type]
    text = [line.replace("│", " ").split() for line in console.export_text().splitlines() if "│" in line]
    lines = {name: cells for name, *cells in text}
    limits, measured_ones = ["0.3", "kB", "0.3", "kB", "97%"], ["0.3", "0.000", "20.5", "2.00", "90.00", "88.00"]
    assert lines["high-size"] == [*limits, "6.80", *measured_ones]
    assert lines["uniform_8"] == ["8.00", "0.3", "0.000", "41.0", "1.00", "90.00", "88.00"]
    assert lines["uniform_2"] == ["0.3", "10.0", "4.10", "90.00", "88.00"]  # no costs are known at 2 bit
