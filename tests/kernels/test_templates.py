"""Conformance of all templates: compiled code equals the interpreter on every element, on every path of this CPU."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_graphs import INT8, TILE_PATHS, TILES, UINT8, WIDE, Maker, assert_exact, compiled, images, random_schedules

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import BuildError, ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, can_run, get_target
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.dyadic import Dyadic
from lightning_baqe.kernels.x86.conv_knobs import check_knobs, default_knobs, knob_space, tiles
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.depthwise import DepthwiseSpec, depthwise_knob_space

VECTOR_PATHS = ("vnni512", "avxvnni", "avx2", "portable")
PATHS = (TILES, *VECTOR_PATHS)


@pytest.fixture(params=(*VECTOR_PATHS, "native", *(pytest.param(path, marks=pytest.mark.slow) for path in TILE_PATHS)))
def target(request: pytest.FixtureRequest) -> CpuTarget:
    """Each path: compiled for all, run on those that this CPU has; and this CPU's own, with what more it has."""
    return get_target(request.param)


@pytest.mark.parametrize(
    ("channels", "size", "activation_bits"),
    [(3, 13, 8), (17, (7, 5), 8), (17, 7, 7), (24, 5, 4), (40, 1, 6), (40, (1, 13), 2), (3, (5, 7), 7)],
)
def test_convolutions_of_odd_shapes(
    channels: int, size: int | tuple[int, int], activation_bits: int, target: CpuTarget
) -> None:
    maker = Maker(channels, size, activation_bits, seed=channels)
    maker.conv(out=17, kernel=1, weight_bits=8)
    maker.conv(out=24, kernel=1, stride=2, weight_bits=4)
    maker.conv(out=40, kernel=3, padding=1, weight_bits=6, limits=INT8)
    maker.conv(out=5, kernel=3, stride=2, padding=1, weight_bits=3)
    maker.conv(out=33, kernel=7, padding=3, weight_bits=5, limits=WIDE)
    maker.conv(out=16, kernel=7, stride=2, padding=3, weight_bits=2)
    maker.conv(out=20, kernel=3, padding=2, dilation=2, weight_bits=7)
    maker.conv(out=16, kernel=(1, 3), stride=(1, 2), padding=(0, 2, 3, 1), dilation=(1, 2), weight_bits=4)
    maker.conv(out=48, kernel=(3, 1), padding=(1, 2, 0, 0), limits=None)
    graph = maker.graph()
    schedules = random_schedules(graph, target, seed=1) if channels != 24 else None
    assert_exact(compiled(graph, target, schedules), images(graph))


@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_every_pair_of_bits(weight_bits: int) -> None:
    target = get_target("avx2" if can_run("avx2") else "native")  # where bits decide on the arithmetic
    for activation_bits in range(2, 9):
        maker = Maker(20, 6, activation_bits, zero_point=1, seed=weight_bits)
        extreme = -(2 ** (weight_bits - 1)) if activation_bits % 2 else None
        maker.conv(out=32, padding=1, weight_bits=weight_bits, weight=extreme)
        graph = maker.graph()
        assert_exact(compiled(graph, target, {name: {"tile": "1x1x6"} for name in maker.bits}), images(graph))


@pytest.mark.parametrize("weights", ["bytes", "packed"])
@pytest.mark.parametrize("path", ["vnni512", "avxvnni", "avx2"])
def test_packed_weights(path: str, weights: str) -> None:
    maker = Maker(21, 7, seed=3)
    for bits in (2, 3, 4):
        first = maker.conv(out=40, padding=1, weight_bits=bits)
        maker.conv(first, out=19, kernel=3, dilation=2, padding=2, weight_bits=bits)
    maker.conv(out=16, padding=1, weight_bits=4, weight=-8)
    graph = maker.graph()
    for order, unroll in (("channels", 1), ("pixels", 4)):
        knobs = {"order": order, "unroll": unroll, "weights": weights}
        artifact = compiled(graph, get_target(path), {layer: knobs for layer in maker.bits})
        assert all(schedule["weights"] == weights for schedule in artifact.schedules.values())
        assert_exact(artifact, images(graph))


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_orders_of_the_sum_and_plain_arithmetic(weight_bits: int, target: CpuTarget) -> None:
    maker = Maker(96, (5, 7), seed=weight_bits)
    maker.conv(out=64, padding=1, weight_bits=weight_bits)
    last = maker.conv(out=24, kernel=(1, 3), stride=2, padding=(0, 0, 1, 1), dilation=(1, 2), weight_bits=weight_bits)
    maker.float_conv(maker.dequantize(last), 16, padding=1)
    graph = maker.graph()
    specs = {c.layer: c.spec for c in make_plan(graph, BuildOptions(target)).calls if isinstance(c.spec, ConvSpec)}
    spaces = {layer: knob_space(spec) for layer, spec in specs.items() if layer is not None}
    assert max(len(space["reduction"]) for space in spaces.values()) > 1
    assert any("off" in space["intrinsic"] for space in spaces.values()) == (target.path != "portable")
    for turn in range(3):
        knobs = {
            layer: {"reduction": space["reduction"][-1 - turn % len(space["reduction"])], "unroll": (1, 4, 2)[turn]}
            | {"weights": space["weights"][-1], "intrinsic": space["intrinsic"][-(turn % 2)]}
            for layer, space in spaces.items()
        }
        assert_exact(compiled(graph, target, knobs), images(graph))


def test_a_thousand_channels(target: CpuTarget) -> None:
    maker = Maker(1000, 7, seed=2)
    maker.conv(out=24, kernel=3, stride=2, padding=1, weight_bits=5)
    value = maker.conv(out=1000, kernel=1, weight_bits=4)
    value = maker.conv(value, out=1000, padding=1, groups=1000)
    maker.conv(value, out=1000, groups=8, kernel=1, limits=INT8)
    maker.linear(maker.flatten(value), 1000, weight_bits=6)
    graph = maker.graph()
    for seed in range(2):
        assert_exact(compiled(graph, target, random_schedules(graph, target, seed)), images(graph))


def test_grouped_convolutions(target: CpuTarget) -> None:
    maker = Maker(24, 7, seed=5)
    maker.conv(out=48, groups=24, stride=2, padding=(0, 1, 1, 0), limits=INT8)
    maker.conv(out=36, groups=3, kernel=1, weight_bits=4, limits=WIDE)
    maker.conv(out=24, groups=2, padding=2, dilation=2, limits=None)
    maker.conv(out=120, groups=6, padding=1)
    maker.conv(out=8, groups=4, kernel=(2, 3), stride=(1, 2), weight_bits=6)
    maker.conv(out=72, groups=8, kernel=1)
    wide = maker.conv(out=96, kernel=1)
    maker.conv(wide, out=96, groups=3, padding=1, weight=-128)
    maker.conv(wide, out=128, groups=32, padding=1, weight_bits=3)
    maker.float_conv(maker.dequantize(wide), 48, padding=1, groups=4, relu=True)
    maker.clip(wide, (0, 255))
    graph = maker.graph()
    for seed in range(2):
        assert_exact(compiled(graph, target, random_schedules(graph, target, seed)), images(graph))


@pytest.mark.parametrize("channels", [2, 3, 17, 40])
def test_depthwise_convolutions(channels: int, target: CpuTarget) -> None:
    maker = Maker(channels, (7, 11), seed=channels)
    for groups, limits in ((1, UINT8), (channels, INT8), (channels, WIDE), (channels, None)):
        maker.conv(out=channels, padding=1, groups=groups, limits=limits)
    value = maker.conv(out=channels, padding=1, groups=channels, weight=-128)
    maker.conv(value, out=channels, kernel=5, stride=2, padding=2, groups=channels)
    maker.conv(value, out=channels, kernel=(3, 2), stride=(2, 3), padding=(0, 1, 2, 0), groups=channels, weight_bits=3)
    maker.conv(value, out=channels, kernel=(2, 3), padding=(1, 2, 3, 0), dilation=(3, 2), groups=channels)
    maker.conv(value, out=channels, kernel=(1, 4), dilation=(1, 2), groups=channels)
    maker.conv(value, out=channels, kernel=7, padding=3, groups=channels)
    for limits in (INT8, WIDE):
        maker.conv(maker.requantize(value, limits), out=channels, groups=channels)
    real = maker.dequantize(value)
    maker.float_conv(real, channels, padding=1, groups=channels)
    maker.float_conv(real, channels, 5, padding=2, groups=channels, stride=(2, 1), dilation=(1, 2), relu=True)
    maker.clip(value, (0, 255))
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph))


@pytest.mark.parametrize(("stride", "dilation", "kernel"), [(1, 1, 3), (2, 1, 3), (1, 2, 3), (2, 3, 5), (3, 1, 2)])
def test_depthwise_knobs(stride: int, dilation: int, kernel: int, target: CpuTarget) -> None:
    """Every tile and order computes the same; rows of a tile share what lies under several of them."""
    maker = Maker(24, (15, 9), seed=stride)
    padding = (kernel - 1) * dilation
    name = maker.conv(out=24, kernel=kernel, padding=padding, stride=stride, dilation=dilation, groups=24)
    graph = maker.graph()
    spec = next(c.spec for c in make_plan(graph, BuildOptions(target)).calls if isinstance(c.spec, DepthwiseSpec))
    space = depthwise_knob_space(spec)
    assert len(space["tile"]) > 5
    for tile, order in zip(random.Random(1).sample(space["tile"], 4), space["order"] * 2, strict=True):
        assert_exact(compiled(graph, target, {name: {"tile": tile, "order": order}}), images(graph))


def test_depthwise_knobs_that_do_not_exist() -> None:
    maker = Maker(16, 5)
    name = maker.conv(out=16, groups=16)
    for knobs in ({"unroll": 1}, {"tile": "1x9"}, {"order": "rows"}):
        with pytest.raises(ConfigError, match="depthwise"):
            make_plan(maker.graph(), BuildOptions(get_target()), {name: knobs})
    default = make_plan(maker.graph(), BuildOptions(get_target())).schedules[name]
    assert make_plan(maker.graph(), BuildOptions(get_target()), {name: default}).schedules == {name: default}


@pytest.mark.parametrize("limits", [UINT8, INT8, WIDE])
def test_every_size_of_factor(limits: tuple[int, int], target: CpuTarget) -> None:
    """Factors from 2^-40 to 2^14, and the shifts that belong to them: 32 of them decide on another kernel."""
    maker = Maker(16, 4, seed=6)
    for exponent in (-40, -20, -10, -3, -2, -1, 0, 1, 14):
        for groups in (1, 16):
            maker.conv(out=16, groups=groups, padding=1, limits=limits)
            conv = maker.nodes[-1]
            assert isinstance(conv, ir.Conv)
            factors = 2.0**exponent * (torch.rand(16, generator=maker.rng, dtype=torch.float64) - 0.5)
            maker.nodes[-1] = dataclasses.replace(conv, requant=Dyadic.from_real(factors), fraction=None)
    shifts = {node.requant.shift for node in maker.nodes if isinstance(node, ir.Conv) and node.requant is not None}
    assert min(shifts) < 31
    assert max(shifts) > 60
    assert {31, 32, 33} & shifts
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph))


def test_residual_sums(target: CpuTarget) -> None:
    maker = Maker(16, 7, seed=7)
    for limits in (UINT8, INT8, WIDE):
        for multiplier in (2**12, 2**26):
            trunk = maker.conv(out=24, padding=1, limits=limits)
            branch = maker.conv(out=24, padding=1, limits=limits)
            maker.add(trunk, branch, limits, multiplier)
    shared = maker.conv(out=24, padding=1)
    maker.conv(maker.add(shared, shared), out=16, padding=1)
    a, b = maker.conv(out=24, padding=1), maker.max_pool(maker.conv(out=24, padding=1), 3, 1, 1)
    maker.add(b, a)
    maker.conv(maker.add(b, shared), out=16, kernel=1, limits=None)
    graph = maker.graph()
    x = images(graph)
    fused, plain = compiled(graph, target), compiled(graph, target, fuse=False)
    assert len(fused.plan.calls) == len(plain.plan.calls) - 7
    adds = [node.name for node in graph if node.name.startswith("add")]
    assert_exact(fused, x, also=adds)
    assert_exact(plain, x, also=adds)
    if can_run(target.path):
        assert torch.equal(fused.run(x), plain.run(x))


def test_int32_residual_stream(target: CpuTarget) -> None:
    """A residual stream of 17 bits between blocks; convolutions read it through 8-bit copies."""
    maker = Maker(16, 5, seed=9)
    stream = maker.conv(out=32, padding=1, limits=WIDE)
    for _ in range(2):
        branch = maker.conv(maker.requantize(stream, UINT8, 0.003), out=32, padding=1, limits=WIDE)
        stream = maker.add(stream, branch, WIDE, 2**20)
    maker.linear(maker.flatten(maker.requantize(stream, UINT8, 0.003)), 10)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph, 2))


def test_pixel_operators(target: CpuTarget) -> None:
    maker = Maker(19, 13, seed=11)
    for limits in (UINT8, INT8, WIDE):
        value = maker.conv(out=19, padding=1, limits=limits)
        for wanted, factor in ((UINT8, 0.7), (INT8, -1.9), (WIDE, 800.0), ((0, 3), 0.01)):
            maker.requantize(value, wanted, factor)
        maker.clip(value, (max(0, limits[0]), 90))
        maker.max_pool(value, 3, 2, 1)
        maker.max_pool(value, 2, 2, 0, ceil_mode=True)
        maker.avg_pool(value, 3, 2)
        maker.avg_pool(value, 13, 1, INT8)
    maker.max_pool("x", 3, 1, 1)
    maker.avg_pool("x", 2, 2)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph))


def test_linear_reads_a_flattened_image(target: CpuTarget) -> None:
    maker = Maker(3, (5, 4), seed=13)
    image = maker.conv(out=21, kernel=3, padding=1)
    hidden = maker.linear(maker.flatten(image), 37, UINT8)
    maker.linear(hidden, 10, weight_bits=4)
    graph = maker.graph()
    for seed in range(2):
        assert_exact(compiled(graph, target, random_schedules(graph, target, seed)), images(graph, 2))


def test_threads() -> None:
    maker = Maker(16, 9, seed=15)
    maker.conv(maker.conv(out=64, padding=1), out=32, padding=1)
    graph = maker.graph()
    for order in ("channels", "pixels"):
        artifact = compiled(graph, get_target(), {layer: {"order": order} for layer in maker.bits}, threads=2)
        assert_exact(artifact, images(graph))


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_small_convolution(data: st.DataObject) -> None:
    draw = data.draw
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    maker = Maker(draw(st.integers(1, 40)), (height, width), draw(st.integers(2, 8)), seed=draw(st.integers(0, 99)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    padding = []
    for extent, k, step in zip((height, width), kernel, dilation, strict=True):
        before = draw(st.integers(0, 4))
        reach = step * (k - 1) + 1
        padding += [before, draw(st.integers(max(0, reach - extent - before), max(4, reach - extent - before)))]
    first = maker.conv(
        out=draw(st.integers(1, 50)),
        kernel=kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=(padding[0], padding[1], padding[2], padding[3]),
        dilation=dilation,
        weight_bits=draw(st.integers(2, 8)),
    )
    maker.conv(first, out=draw(st.integers(1, 30)), kernel=1, weight_bits=draw(st.integers(2, 8)), limits=None)
    graph = maker.graph()
    target = get_target(draw(st.sampled_from([path for path in PATHS if can_run(path)])))
    assert_exact(compiled(graph, target, random_schedules(graph, target, draw(st.integers(0, 99)))), images(graph))


def test_signed_inputs_are_refused_where_instructions_want_bytes() -> None:
    maker = Maker(16, 5)
    signed = maker.conv(out=16, limits=INT8)
    maker.conv(signed, out=16, kernel=1)
    with pytest.raises(BuildError, match="unsigned"):
        make_plan(maker.graph(), BuildOptions(get_target("avx2")))


class TestKnobs:
    @pytest.fixture
    def spec(self) -> ConvSpec:
        maker = Maker(32, 14)
        maker.conv(out=64, padding=1, weight_bits=4)
        spec = make_plan(maker.graph(), BuildOptions(get_target("vnni512"))).calls[1].spec
        assert isinstance(spec, ConvSpec)
        return spec

    def test_tiles_fit_the_registers(self, spec: ConvSpec) -> None:
        assert all(a * b * c + a + 1 <= 32 and a <= 4 for a, b, c in tiles(spec))
        assert len(set(tiles(spec))) == len(tiles(spec))

    def test_defaults_are_offered_first(self, spec: ConvSpec) -> None:
        space, default = knob_space(spec), default_knobs(spec)
        assert default["tile"] == space["tile"][0]
        assert all(default[name] in space[name] for name in space)
        assert check_knobs(spec, {}) == default

    def test_packed_needs_few_bits(self, spec: ConvSpec) -> None:
        assert "packed" in knob_space(spec)["weights"]
        wide = dataclasses.replace(spec, weight_bits=5)
        assert knob_space(wide)["weights"] == ["bytes"]
        assert check_knobs(wide, {"weights": "packed"})["weights"] == "bytes"

    @pytest.mark.parametrize(
        ("channels", "size", "bits", "packed"),
        [(256, 1, 4, True), (256, 2, 3, True), (256, 4, 4, False), (64, 1, 4, False), (256, 1, 8, False)],
    )
    def test_many_weights_of_few_pixels_stay_packed(self, channels: int, size: int, bits: int, packed: bool) -> None:
        maker = Maker(channels, size)
        maker.conv(out=channels, padding=1, weight_bits=bits)
        spec = make_plan(maker.graph(), BuildOptions(get_target("vnni512"))).calls[1].spec
        assert isinstance(spec, ConvSpec)
        assert default_knobs(spec)["weights"] == ("packed" if packed else "bytes")

    @pytest.mark.parametrize(
        "knobs",
        [
            {"tile": "9x9x9"},
            {"tile": "x"},
            {"order": "x"},
            {"unroll": 3},
            {"weights": "bits"},
            {"speed": 1},
            {"reduction": "channels/24"},
            {"intrinsic": "maybe"},
        ],
    )
    def test_wrong_values_are_refused(self, spec: ConvSpec, knobs: dict[str, object]) -> None:
        with pytest.raises(ConfigError):
            check_knobs(spec, knobs)


def test_random_data_is_not_trivial() -> None:
    """The conformance graphs exercise whole ranges: they would not notice much if all values were clipped."""
    maker = Maker(24, 9, seed=1)
    names = [maker.conv(out=24, padding=1, weight_bits=bits, limits=limits) for bits, limits in ((8, UINT8), (3, WIDE))]
    values = maker.graph().run_all(images(maker.graph()))
    for name in names:
        assert len(np.unique(values[name])) > 50
