"""The unified search space."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import lightning_baqe as baqe
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, get_target
from lightning_baqe.kernels.tunable import template_of
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.tuning.network_space import NetworkSpace

CHOICES = (4, 8, 32)


def graphs(ties: tuple[tuple[str, ...], ...] = ()) -> tuple[dict[int, baqe.IntegerGraph], baqe.BitConfig]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    found = {}
    for bits in CHOICES:
        config = baqe.BitConfig.uniform(model, bits, bits)
        found[bits] = baqe.lower(baqe.calibrate(baqe.quantize(model, config, x), [x]))
    return found, baqe.BitConfig.uniform(model, 8, 8, ties=ties)


@pytest.fixture(params=["amx", "vnni512", "avxvnni", "avx2", "portable"])
def target(request: pytest.FixtureRequest) -> CpuTarget:
    return get_target(request.param)


def test_every_candidate_is_a_point_whose_kernels_exist(target: CpuTarget) -> None:
    found, base = graphs()
    space = NetworkSpace.of(found, base, BuildOptions(target))
    points = space.candidates(40, np.random.default_rng(0))
    assert len({json.dumps(point, sort_keys=True) for point in points}) == 40
    for point in points:
        for name, distribution in space.distributions.items():
            assert distribution._contains(distribution.to_internal_repr(point[name]))
        bits, schedules = space.point(point)
        assert bits["0"] == bits["8"] == baqe.LayerBits(8, 8)
        for layer in ("2", "4"):
            plan = make_plan(found[bits[layer].activation], BuildOptions(target), {layer: schedules[layer]})
            call = next(call for call in plan.calls if call.layer == layer)
            assert isinstance(call.spec, ConvSpec)
            full = template_of(call.spec).check_knobs(call.spec, schedules[layer])
            assert call.knobs == full
            if full.get("unit") != "tiles":  # whose own block decides
                assert full["tile"] == schedules[layer]["tile"]


def test_the_pool_spans_the_space(target: CpuTarget) -> None:
    found, base = graphs()
    space = NetworkSpace.of(found, base, BuildOptions(target))
    points = space.candidates(300, np.random.default_rng(1))
    for bits in CHOICES:  # uniform networks are among them
        assert any(all(point[f"{layer}/bits"] == bits for layer in ("2", "4")) for point in points)
    default = [space.point(point)[1] for point in points]
    tuned = sum(all(s[k] == space.defaults[k][p.get(f"{k}/bits", 8)] for k in s)
                for s, p in zip(default, points, strict=True))  # fmt: skip
    assert tuned == 9  # all bit-widths of the two layers, each with its best known knobs


def test_the_pool_depends_on_the_generator_only(target: CpuTarget) -> None:
    found, base = graphs()
    first = NetworkSpace.of(found, base, BuildOptions(target))
    again = NetworkSpace.from_record(base, json.loads(json.dumps(first.record())))
    assert again == first
    assert again.candidates(30, np.random.default_rng(3)) == first.candidates(30, np.random.default_rng(3))


def test_tied_layers_follow_their_leader(target: CpuTarget) -> None:
    found, base = graphs(ties=(("2", "4"),))
    space = NetworkSpace.of(found, base, BuildOptions(target))
    assert "4/bits" not in space.distributions
    for point in space.candidates(20, np.random.default_rng(0)):
        bits, _ = space.point(point)
        assert bits["2"] == bits["4"]


def test_without_schedules_only_bits_are_searched(target: CpuTarget) -> None:
    found, base = graphs()
    space = NetworkSpace.of(found, base, BuildOptions(target), schedules=False)
    assert set(space.distributions) == {"2/bits", "4/bits"}
    _, schedules = space.point({"2/bits": 4, "4/bits": 32})
    assert schedules["2"] == space.defaults["2"][4]
    assert schedules["4"] == space.defaults["4"][32]
    with pytest.raises(ConfigError, match="the point lacks"):
        space.point({"2/bits": 4})


def test_only_supported_bits_are_searched(target: CpuTarget) -> None:
    found, base = graphs()
    space = NetworkSpace.of(found, base, BuildOptions(target), supported={"2": (8, 32), "4": (32,)})
    assert space.bit_choices == {"2": (8, 32), "4": (32,)}
    assert all(point["4/bits"] == 32 for point in space.candidates(10, np.random.default_rng(0)))
    found, base = graphs(ties=(("2", "4"),))
    tied = NetworkSpace.of(found, base, BuildOptions(target), supported={"2": (8, 32), "4": (4, 32)})
    assert tied.bit_choices == {"2": (32,)}
    with pytest.raises(ConfigError, match=r"\['2', '4'\] share their bits"):
        NetworkSpace.of(found, base, BuildOptions(target), supported={"2": (8,), "4": (4,)})
