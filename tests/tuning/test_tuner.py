"""Tuning: candidates are measured once, checked, and the winner is confirmed."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fake_device import FakeDevice, Refusing
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import INT8, WIDE, Maker

import lightning_baqe as baqe
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import BuildError, ConfigError, MeasurementError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import can_run, get_target
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.specs import kernel_key
from lightning_baqe.kernels.x86.conv_knobs import default_knobs
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.depthwise import DepthwiseSpec
from lightning_baqe.measurement.device import Kernel, KernelTurn
from lightning_baqe.measurement.local import Local
from lightning_baqe.tuning import tuner
from lightning_baqe.tuning.bench import kernel_space
from lightning_baqe.tuning.strategies import KernelSpace, Ranked, SimulatedAnnealing, Strategy, Tried


@pytest.fixture(scope="module")
def graph() -> IntegerGraph:
    maker = Maker(16, 10)
    a = maker.conv(out=32, padding=1, limits=INT8, weight_bits=3, name="a")
    b = maker.conv(out=32, kernel=1, limits=WIDE, name="b")
    maker.conv(maker.requantize(maker.add(a, b, WIDE), (0, 255)), out=10, kernel=10, limits=None, name="c")
    return maker.graph()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float"])
def test_depthwise_kernels(tmp_path: Path, dtype: str) -> None:
    """They are tuned and checked as the others are."""
    maker = Maker(24, 9)
    source = "x"
    if dtype == "int8":
        source = maker.requantize(source, INT8)
    if dtype == "float":
        maker.float_conv(maker.dequantize(source), 24, padding=1, groups=24, relu=True)
    else:
        maker.conv(source, out=24, padding=1, stride=2, groups=24)
        maker.conv(out=24, padding=1, groups=24, limits=None)
    result = tuner.tune(maker.graph(), candidates=4, device=Local(tmp_path / "records.db"))
    assert result.measured == 4 * len(result.kernels) > 0
    assert all(isinstance(kernel.spec, DepthwiseSpec) for kernel in result.kernels)
    assert [(kernel.failed, kernel.inexact) for kernel in result.kernels] == [(0, 0)] * len(result.kernels)


@pytest.mark.parametrize("strategy", [Ranked(), SimulatedAnnealing(initial=4)], ids=["ranked", "sa_xgb"])
def test_tuning(graph: IntegerGraph, tmp_path: Path, strategy: Strategy) -> None:
    device = Local(tmp_path / "records.db")
    records = device.records
    told: list[tuner.Step] = []
    first = tuner.tune(graph, candidates=3, device=device, strategy=strategy, progress=told.append)
    assert first.complete
    assert sorted(layer for kernel in first.kernels for layer in kernel.layers) == ["a", "b", "c"]
    assert [step.done for step in told] == list(range(1, 10))
    assert {step.total for step in told} == {9}
    assert {step.layer for step in told[:3]} == {"a", "b", "c"}  # the defaults
    assert all(step.gmacs and step.share and step.share > 0 for step in told)
    assert first.measured == 9
    for kernel in first.kernels:
        assert kernel.measured == kernel.known >= 1
        assert (kernel.failed, kernel.inexact) == (0, 0)
        assert kernel.default_us is not None
        assert kernel.best_us is not None
        assert 0 < kernel.best_us <= kernel.default_us
        assert kernel.speedup >= 1
        assert kernel.gmacs == pytest.approx(kernel.spec.macs / kernel.best_us / 1e3)
        assert kernel.peak_gmacs == records.peak(get_target(), kernel.spec.dot, kernel.spec.chain)
        known = records.kernels(kernel.spec, get_target())
        assert all(record.exact for record in known)
        assert records.best_knobs(kernel.spec, get_target()) == kernel.knobs
    assert baqe.build(graph, records=records).schedules["a"] == next(
        kernel.knobs for kernel in first.kernels if kernel.layers == ("a",)
    )

    refusing = Refusing(tmp_path / "records.db")
    second = tuner.tune(graph, candidates=3, device=refusing, strategy=strategy)
    assert second.measured == 0
    assert second.best_us == first.best_us
    assert [kernel.share for kernel in second.kernels] == [kernel.share for kernel in first.kernels]


def test_heavy_kernels_get_more_candidates() -> None:
    assert tuner.allotment([1.0, 1.0, 1.0], 9) == [3, 3, 3]
    assert tuner.allotment([1e9, 1.0], 16) == [12, 4]  # 8 evenly, 8 by work
    assert tuner.allotment([5.0, 3.0, 2.0], 3) == [1, 1, 1]
    assert tuner.allotment([], 0) == []


@given(work=st.lists(st.floats(1.0, 1e12), min_size=1, max_size=20), each=st.integers(1, 20))
def test_an_allotment_is_complete_and_ordered(work: list[float], each: int) -> None:
    counts = tuner.allotment(sorted(work), each * len(work))
    assert sum(counts) == each * len(work)
    assert all(b >= a - 1 for a, b in pairwise(counts))  # equals get as many, up to the last one
    assert min(counts) >= max(1, (each - 1) // 2)


@pytest.mark.parametrize("path", ["avx2", "portable"])
def test_kernels_of_other_paths_are_exact(graph: IntegerGraph, path: str, tmp_path: Path) -> None:
    if not can_run(path):
        pytest.skip(f"this CPU does not run {path} code")
    result = tuner.tune(graph, BuildOptions(get_target(path)), candidates=2, device=Local(tmp_path / "records.db"))
    assert all(kernel.failed == 0 and kernel.best_us for kernel in result.kernels)


def test_float_kernels_are_compared_closely(tmp_path: Path) -> None:
    import torch
    from torch import nn

    network = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 36, 5)).eval()
    x = torch.randn(1, 3, 6, 6)
    bits = baqe.BitConfig.uniform(network, weight=32, activation=32)
    graph = baqe.lower(baqe.quantize(network, bits, example_input=x))
    result = tuner.tune(graph, candidates=2, device=Local(tmp_path / "records.db"))
    assert [kernel.failed for kernel in result.kernels] == [0, 0]


def test_a_budget_ends_it(graph: IntegerGraph, tmp_path: Path) -> None:
    result = tuner.tune(graph, candidates=3, budget_s=0.0, device=Local(tmp_path / "records.db"))
    assert not result.complete
    assert all(kernel.measured == 0 and kernel.best_us is None for kernel in result.kernels)
    assert result.best_us == 0


class _Fake(FakeDevice):
    """Latencies by kernel: the first of a kernel is lucky, the next ones are true. It dies after so many."""

    true_us: dict[str, float]
    lucky_us: dict[str, float]
    dies_after: int | None = None

    def measure_kernel(self, kernel: Kernel) -> KernelTurn:
        if len(self.kernels) == self.dies_after:
            raise KeyboardInterrupt
        turn = super().measure_kernel(kernel)
        return dataclasses.replace(turn, exact=turn.samples_us[0] != 13.0)

    def kernel_us(self, kernel: Kernel) -> float:
        figure = self.lucky_us.pop(_key(kernel), self.true_us[_key(kernel)])
        if figure < 0:
            raise MeasurementError("crashed")
        return figure


def _key(kernel: Kernel) -> str:
    assert kernel.spec is not None
    return kernel_key(kernel.spec, kernel.knobs)


@pytest.fixture
def one() -> tuple[IntegerGraph, ConvSpec]:
    maker = Maker(16, 12)
    maker.conv(out=64, padding=1, limits=None)
    graph = maker.graph()
    spec = make_plan(graph, BuildOptions(get_target())).calls[1].spec
    assert isinstance(spec, ConvSpec)
    return graph, spec


def _fake(spec: ConvSpec, folder: Path, true: list[float], lucky: dict[int, float]) -> tuple[list[str], _Fake]:
    """Keys of the candidates in the order in which they are proposed, and the device."""
    batches = [Ranked().propose(kernel_space(spec), [], 1)]
    tried = [Tried(batches[0][0], true[0])]
    batches.append(Ranked().propose(kernel_space(spec), tried, len(true) - 1))
    keys = [kernel_key(spec, knobs) for batch in batches for knobs in batch]
    fake = _Fake(folder / "records.db")
    fake.true_us = dict(zip(keys, true, strict=True))
    fake.lucky_us = {keys[i]: value for i, value in lucky.items()}
    return keys, fake


def test_a_lucky_figure_does_not_win(one: tuple[IntegerGraph, ConvSpec], tmp_path: Path) -> None:
    graph, spec = one
    _, fake = _fake(spec, tmp_path, [10.0, 12.0, 11.0, 14.0], lucky={1: 5.0, 2: 6.0})
    (kernel,) = tuner.tune(graph, candidates=4, device=fake).kernels
    assert kernel.best_us == kernel.default_us == 10.0
    assert kernel.knobs == default_knobs(spec)


def test_a_true_winner_wins(one: tuple[IntegerGraph, ConvSpec], tmp_path: Path) -> None:
    graph, spec = one
    keys, fake = _fake(spec, tmp_path, [10.0, 8.0, 9.0, 14.0], lucky={2: 1.0})
    (kernel,) = tuner.tune(graph, candidates=4, device=fake).kernels
    assert (kernel.default_us, kernel.best_us) == (10.0, 8.0)
    assert kernel_key(spec, kernel.knobs or {}) == keys[1]


def test_failures_are_kept_with_their_reason(one: tuple[IntegerGraph, ConvSpec], tmp_path: Path) -> None:
    graph, spec = one
    _, fake = _fake(spec, tmp_path, [10.0, -1.0, 13.0, 11.0], lucky={})
    (kernel,) = tuner.tune(graph, candidates=4, device=fake).kernels
    assert (kernel.measured, kernel.failed, kernel.best_us) == (4, 2, 10.0)
    reasons = {record.error for record in fake.records.kernels(spec, get_target())}
    assert reasons == {None, "crashed", "its result differs from the reference"}


def test_what_a_killed_run_did_not_confirm_is_confirmed_by_the_next(
    one: tuple[IntegerGraph, ConvSpec], tmp_path: Path
) -> None:
    graph, spec = one
    _, fake = _fake(spec, tmp_path, [10.0, 12.0, 11.0, 14.0], lucky={1: 5.0})
    fake.dies_after = 4
    with pytest.raises(KeyboardInterrupt):
        tuner.tune(graph, candidates=4, device=fake)
    assert [record.latency_us for record in fake.records.kernels(spec, get_target())] == [5.0, 10.0, 11.0, 14.0]
    fake.dies_after = None
    (kernel,) = tuner.tune(graph, candidates=4, device=fake).kernels
    assert kernel.best_us == 10.0
    assert kernel.measured == 0
    asked = len(fake.kernels)
    assert asked > 4
    tuner.tune(graph, candidates=4, device=fake)
    assert len(fake.kernels) == asked


def test_a_winner_that_fails_when_it_is_confirmed_loses(one: tuple[IntegerGraph, ConvSpec], tmp_path: Path) -> None:
    graph, spec = one
    _, fake = _fake(spec, tmp_path, [10.0, -1.0, 8.0, 13.0], lucky={1: 5.0, 3: 6.0})
    (kernel,) = tuner.tune(graph, candidates=4, device=fake).kernels
    assert (kernel.best_us, kernel.inexact) == (8.0, 1)


class _Two(Ranked):
    """Proposes out of two tiles alone."""

    def propose(self, space: KernelSpace, *arguments: Any) -> list[dict[str, Any]]:
        values = {knob: [value] for knob, value in space.default.items()} | {"tile": ["1x1x1", "2x1x1"]}
        return super().propose(dataclasses.replace(space, values=values), *arguments)


def test_a_space_that_ends(one: tuple[IntegerGraph, ConvSpec], tmp_path: Path) -> None:
    told: list[tuner.Step] = []
    device = FakeDevice(tmp_path / "records.db")
    result = tuner.tune(one[0], candidates=9, device=device, strategy=_Two(), progress=told.append)
    assert result.complete
    assert result.measured == 3  # and the default, which is another
    assert (told[-1].done, told[-1].total) == (3, 3)


def test_wrong_arguments(graph: IntegerGraph, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="candidates"):
        tuner.tune(graph, candidates=0)
    with pytest.raises(BuildError, match="made up does not run"):
        tuner.tune(graph, device=FakeDevice(tmp_path / "records.db", runs=False))
