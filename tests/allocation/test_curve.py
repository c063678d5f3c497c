"""The whole curve against brute force and against the integer program."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import torchvision

import lightning_baqe as baqe
from lightning_baqe.benchmarks.bits.instances import big, every, instance, sum_of
from lightning_baqe.errors import ConfigError
from lightning_baqe.search import pareto_mask


@pytest.mark.parametrize("seeds", [range(100), range(100, 200)], ids=str)
def test_all_efficient_allocations(seeds: range) -> None:
    for seed in seeds:
        problem = instance(seed)
        values = problem["costs"]["cost0"]
        both = [(sum_of(values, b), sum_of(problem["sensitivity"], b)) for b in every(problem)]
        rounded = torch.tensor([(round(cost, 9), round(value, 14)) for cost, value in both], dtype=torch.float64)
        wanted = sorted({tuple(point.tolist()) for point in rounded[pareto_mask(rounded)]})
        front = baqe.allocate_front(problem["sensitivity"], problem["costs"], "cost0", problem["tied"])
        assert len(front) == len(wanted), seed
        for (cost, bits), (cost_wanted, sensitivity_wanted) in zip(front, wanted, strict=True):
            assert dict(bits) in every(problem)
            assert (cost, bits.sensitivity) == (
                pytest.approx(cost_wanted),
                pytest.approx(sensitivity_wanted, abs=1e-12),
            )
            assert (cost, bits.costs["cost0"]) == (pytest.approx(sum_of(values, bits)), cost)


@pytest.mark.parametrize("cost", ["size_bytes", "latency_us"])
def test_a_large_network(cost: str) -> None:
    sensitivity, costs = big(torchvision.models.resnet50(), tuple(range(2, 9)), 0)
    start = time.process_time()
    front = baqe.allocate_front(sensitivity, costs, cost)
    assert time.process_time() - start < 60  # half a second where nothing else runs
    assert len(front) > 5000
    assert (np.diff(front.costs) > 0).all()
    assert (np.diff(front.sensitivities) < 0).all()
    assert set(front[0][1].values()) == {2}
    assert set(front[-1][1].values()) == {8}
    for place in (1, len(front) // 3, len(front) // 2, len(front) - 2):
        limit, bits = front[place]
        solved = baqe.allocate_bits(sensitivity, costs, {cost: limit})
        assert solved.sensitivity == pytest.approx(bits.sensitivity, rel=1e-9)
        assert front.within(limit) == bits
        assert front.within((limit + front[place + 1][0]) / 2) == bits
        assert bits.sensitivity == pytest.approx(front.sensitivities[place], rel=1e-9)


def test_it_is_a_sequence() -> None:
    sensitivity = {n: {4: 1.0, 8: 0.5} for n in "ab"}
    costs = {"size_bytes": {"a": {4: 1, 8: 2}, "b": {4: 10, 8: 20}}}
    front = baqe.allocate_front(sensitivity, costs)
    assert list(front) == front[:] == [(11.0, {"a": 4, "b": 4}), (12.0, {"a": 8, "b": 4}), (22.0, {"a": 8, "b": 8})]
    assert front[-1] == front[2]
    assert front[::2] == [front[0], front[2]]
    with pytest.raises(IndexError):
        front[3]
    with pytest.raises(IndexError, match="smallest size_bytes is 11"):
        front.within(10)
    assert list(baqe.allocate_front(sensitivity, costs, tied=["ab"])) == [front[0], front[2]]
    assert list(baqe.allocate_front(sensitivity, costs, fixed={"b": 8})) == [(21.0, {"a": 4, "b": 8}), front[2]]
    with pytest.raises(ConfigError, match="cost='size', but costs has size_bytes"):
        baqe.allocate_front(sensitivity, costs, "size")


def test_rounding_makes_no_points() -> None:
    """0.1 + 0.2 is not 0.3 in binary; that is no difference to pay for."""
    sensitivity = {n: {2: 1.0, 4: 0.7, 8: 0.1} for n in "abcdef"}
    costs = {"latency_us": {n: {2: 0.1, 4: 0.2, 8: 0.3} for n in "abcdef"}}
    front = baqe.allocate_front(sensitivity, costs, "latency_us")
    assert [round(cost, 9) for cost, _ in front] == [round(0.6 + 0.1 * i, 9) for i in range(13)]
