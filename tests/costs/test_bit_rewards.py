"""What a device rewards: from records alone, with made-up figures in them."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lightning_baqe as baqe
from lightning_baqe.costs.bit_rewards import (
    GAIN,
    PAPER_CHOICES,
    KernelReward,
    Rewards,
    default_bit_choices,
    fastest_codes,
    rewards_of,
    searched_kernels,
)
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, get_target
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.x86.conv_knobs import check_knobs, knob_space
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.depthwise import DepthwiseSpec, check_depthwise_knobs
from lightning_baqe.measurement.database import KernelRecord, Records

Graphs = dict[int, IntegerGraph]


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 12, 12)
    bits = {b: baqe.BitConfig.uniform(model, b, b) for b in (4, 6, 8)}
    return {b: baqe.lower(baqe.calibrate(baqe.quantize(model, config, x), [x])) for b, config in bits.items()}


def _spec(graphs: Graphs, bits: int, layer: str, target: CpuTarget) -> ConvSpec:
    plan = make_plan(graphs[bits], BuildOptions(target))
    return next(c.spec for c in plan.calls if c.layer == layer and isinstance(c.spec, ConvSpec))


def _add(records: Records, spec: ConvSpec, target: CpuTarget, latency_us: float, **knobs: str) -> None:
    records.add_kernel(spec, target, KernelRecord(check_knobs(spec, knobs), latency_us, [latency_us], True))


def test_one_program_has_one_latency(graphs: Graphs, tmp_path: Path) -> None:
    """With VNNI the code of 4 bit weights, widened on load, is that of 8 bit: a record of one is one of the other."""
    target, records = get_target("vnni512"), Records(tmp_path / "records.db")
    for layer in ("2", "4"):
        _add(records, _spec(graphs, 8, layer, target), target, 10.0)
    rewards = rewards_of(graphs, BuildOptions(target), records)
    assert sorted(layer for kernel in rewards.kernels for layer in kernel.layers) == ["2", "4"]  # those searched
    assert rewards.speedup(4) == rewards.speedup(6) == 1.0
    assert all(kernel.same == (4, 6, 8) for kernel in rewards.kernels)
    assert default_bit_choices(rewards, "beyond") == (4, 8)
    assert default_bit_choices(rewards, "beyond", size_counts=False) == (8,)
    assert "4 bit buys no latency" in rewards.line


def test_packed_nibbles_that_are_faster_count(graphs: Graphs, tmp_path: Path) -> None:
    target, records = get_target("vnni512"), Records(tmp_path / "records.db")
    for layer in ("2", "4"):
        _add(records, _spec(graphs, 8, layer, target), target, 10.0)
        _add(records, _spec(graphs, 4, layer, target), target, 5.0, weights="packed")
    rewards = rewards_of(graphs, BuildOptions(target), records)
    assert rewards.speedup(4) == 2.0
    assert rewards.speedup(6) == 1.0


def test_chains_of_fewer_bits(graphs: Graphs, tmp_path: Path) -> None:
    target, records = get_target("avx2"), Records(tmp_path / "records.db")
    times = {8: 12.0, 6: 10.0, 4: 6.0}
    for bits, layer in itertools.product(times, ("2", "4")):
        _add(records, _spec(graphs, bits, layer, target), target, times[bits])
    rewards = rewards_of(graphs, BuildOptions(target), records)
    for kernel in rewards.kernels:  # code of whole bytes depends on the arithmetic, not on what the weights would fit
        specs = {
            bits: dataclasses.replace(_spec(graphs, bits, kernel.layers[0], target), weight_bits=8) for bits in times
        }
        assert specs[4] != specs[8]
        assert kernel.latency_us == {b: min(t for c, t in times.items() if specs[c] == specs[b]) for b in times}
        assert kernel.same == tuple(bits for bits in sorted(times) if specs[bits] == specs[8])
    assert rewards.speedup(4) == pytest.approx(2.0)
    assert rewards.summary()["widths"]["8"] == {"speedup": 1.0, "storage": 1.0}
    assert 0.5 < rewards.storage[4] < rewards.storage[6] < 1


def test_wrong_and_failed_records_do_not_count(graphs: Graphs, tmp_path: Path) -> None:
    target, records = get_target("vnni512"), Records(tmp_path / "records.db")
    spec = _spec(graphs, 8, "2", target)
    tiles = knob_space(spec)["tile"]
    _add(records, spec, target, 9.0, tile=tiles[0])
    wrong = KernelRecord(check_knobs(spec, {"tile": tiles[1]}), 1.0, [1.0], False, "differs")
    records.add_kernel(spec, target, wrong)
    rewards = rewards_of(graphs, BuildOptions(target), records)
    found = next(kernel for kernel in rewards.kernels if "2" in kernel.layers)
    assert found.latency_us == {4: 9.0, 6: 9.0, 8: 9.0}


def test_nothing_is_known(graphs: Graphs, tmp_path: Path) -> None:
    rewards = rewards_of(graphs, BuildOptions(get_target("vnni512")), Records(tmp_path / "records.db"))
    assert rewards.speedup(4) is None
    assert rewards.line == ""
    with pytest.raises(ConfigError, match=r"no kernel is measured at \[4, 6, 8\]"):
        default_bit_choices(rewards, "beyond")
    assert default_bit_choices(rewards, "paper") == default_bit_choices(None, "paper") == PAPER_CHOICES
    with pytest.raises(ConfigError, match="got no rewards"):
        default_bit_choices(None, "beyond")
    with pytest.raises(ConfigError, match="add 8"):
        rewards_of({4: graphs[4]}, BuildOptions(get_target("vnni512")), Records(tmp_path / "records.db"))


def _made_up(speedups: dict[int, float]) -> Rewards:
    times = {bits: 1.0 / speedup for bits, speedup in speedups.items()}
    kernel = KernelReward(("a", "b"), None, times)  # type: ignore[arg-type]
    return Rewards("made up", tuple(sorted(speedups)), (kernel,), {bits: bits / 8 for bits in speedups})


def test_a_kernel_counts_as_much_as_it_takes() -> None:
    long = KernelReward(("a",), None, {8: 90.0, 4: 45.0})  # type: ignore[arg-type]
    short = KernelReward(("b", "c"), None, {8: 5.0, 4: 5.0})  # type: ignore[arg-type]
    unknown = KernelReward(("d",), None, {8: 1000.0})  # type: ignore[arg-type]
    rewards = Rewards("made up", (4, 8), (long, short, unknown), {4: 0.5, 8: 1.0})
    assert rewards.speedup(4) == pytest.approx((90 + 2 * 5) / (45 + 2 * 5))


@pytest.mark.parametrize(
    ("speedups", "with_size", "without"),
    [
        ({8: 1.0, 7: 1.0, 6: 1.0, 5: 1.0, 4: 1.0}, (4, 8), (8,)),
        ({8: 1.0, 7: 1.2, 6: 1.3, 5: 1.5, 4: 1.6}, (4, 5, 6, 7, 8), (4, 5, 6, 7, 8)),
        ({8: 1.0, 7: 1.02, 6: 1.3, 5: 1.31, 4: 1.6}, (4, 6, 8), (4, 6, 8)),
        ({8: 1.0, 6: 1.4, 4: 0.8}, (4, 6, 8), (6, 8)),
        ({8: 1.0}, (8,), (8,)),
    ],
)
def test_default_choices(speedups: dict[int, float], with_size: tuple[int, ...], without: tuple[int, ...]) -> None:
    rewards = _made_up(speedups)
    assert default_bit_choices(rewards, "beyond") == with_size
    assert default_bit_choices(rewards, "beyond", size_counts=False) == without


@given(st.dictionaries(st.integers(2, 7), st.floats(0.2, 5.0), max_size=6))
def test_what_is_dropped_is_dominated(speedups: dict[int, float]) -> None:
    speedups[8] = 1.0
    kept = default_bit_choices(_made_up(speedups), "beyond")
    assert {8, min(speedups)} <= set(kept) <= set(speedups)
    for dropped in set(speedups) - set(kept):  # a wider one is as fast, up to the gain, and a narrower one is smaller
        assert any(wider > dropped and speedups[wider] * GAIN > speedups[dropped] for wider in kept)
        assert any(narrower < dropped for narrower in kept)


def test_the_figure_with_most_samples_counts(graphs: Graphs, tmp_path: Path) -> None:
    """A code that several bit-widths share was measured as often; what was taken in turns outweighs a lucky sample."""
    target, records = get_target("vnni512"), Records(tmp_path / "records.db")
    specs = {bits: _spec(graphs, bits, "2", target) for bits in (4, 8)}
    assert specs[4] != specs[8]
    for bits, samples in ((4, [7.0]), (8, [9.0, 10.0])):
        knobs = check_knobs(specs[bits], {})
        records.add_kernel(specs[bits], target, KernelRecord(knobs, min(samples), samples, True))
    found = fastest_codes(specs, target, records)
    assert {(one.latency_us, one.samples) for one in found.values()} == {(9.0, 2)}
    assert found[4].code == found[8].code
    assert {bits: one.spec for bits, one in found.items()} == specs


def test_depthwise_kernels_are_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 12, 12)
    bits = {b: baqe.BitConfig.uniform(model, b, b) for b in (4, 8)}
    found = {b: baqe.lower(baqe.calibrate(baqe.quantize(model, config, x), [x])) for b, config in bits.items()}
    target, records = get_target("vnni512"), Records(tmp_path / "records.db")
    kernels = searched_kernels(found, BuildOptions(target))
    depthwise = next(specs for layers, specs in kernels if "2" in layers)
    assert all(isinstance(spec, DepthwiseSpec) for spec in depthwise.values())
    for spec in set(depthwise.values()):
        knobs = check_depthwise_knobs(spec, {})  # type: ignore[arg-type]
        records.add_kernel(spec, target, KernelRecord(knobs, 3.0, [3.0], True))
    reward = next(kernel for kernel in rewards_of(found, BuildOptions(target), records).kernels if "2" in kernel.layers)
    assert reward.latency_us == {4: 3.0, 8: 3.0}
    assert 8 in reward.same
