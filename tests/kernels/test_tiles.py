"""Kernels on AMX's tiles: the operations themselves, and convolutions under every knob. Where there is no AMX, what
stands for it runs; the head of the test report says which of the two."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_graphs import INT8, TILE_PATHS, TILES, Maker, assert_exact, compiled, images
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as B

import lightning_baqe as baqe
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import BuildError, ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import can_run, get_target
from lightning_baqe.kernels.tunable import template_of
from lightning_baqe.kernels.x86.arithmetic import ARITHMETICS, TileProducts
from lightning_baqe.kernels.x86.emit import arguments
from lightning_baqe.kernels.x86.tile_spec import (
    MOST_SUMS,
    SIDES,
    TileSpec,
    check_tile_knobs,
    registers,
    step,
    tile_knob_space,
)
from lightning_baqe.kernels.x86.tiles import BYTES, COLUMNS, REGISTERS, ROWS, Tiles
from lightning_baqe.measurement.peak import peak_gmacs
from lightning_baqe.tuning.bench import kernel_space
from lightning_baqe.tuning.strategies import Ranked

RUN = tuple(path for path in TILE_PATHS if can_run(path))
pytestmark = pytest.mark.skipif(not RUN, reason="kernels on tiles are for x86-64")


def arithmetic_of(path: str) -> TileProducts:
    (found,) = (a for a in ARITHMETICS.values() if isinstance(a, TileProducts) and path in a.paths)
    return found


def product(path: str, rows: int, steps: int) -> Any:
    """``uint8 (rows, 64 steps) x int8 (64 steps, 16) + bias`` as a compiled module."""
    width = BYTES * steps
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        X, W, bias, Y = arguments(
            "main",
            (rows * width, "uint8"),
            (width * COLUMNS, "int8"),
            (COLUMNS, "int32"),
            (rows * 2 * COLUMNS, "int32"),
        )
        tiles = Tiles(arithmetic_of(path).how, [rows] * (REGISTERS - 1) + [ROWS])
        tiles.begin(0, bias, 0)
        with B.serial(steps) as s:
            tiles.load(3, X, s * BYTES, width)
            tiles.load(7, W, s * (ROWS * BYTES), BYTES)
            tiles.add(0, 3, 7)
        tiles.store(0, Y, COLUMNS, 2 * COLUMNS)
        tiles.release()
    function = builder.get().with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target=Target(get_target(path).tvm))


@pytest.mark.parametrize("rows", [16, 14, 7, 1])
@pytest.mark.parametrize("path", TILE_PATHS)
def test_products(path: str, rows: int) -> None:
    library, rng, steps = product(path, rows, 3), np.random.default_rng(rows), 3
    if path not in RUN:
        pytest.skip(f"this CPU does not run {path} code: it was compiled only")
    x = rng.integers(0, 256, (rows, BYTES * steps), np.uint8)
    weights = rng.integers(-128, 128, (BYTES * steps, COLUMNS)).astype(np.int8)
    bias = rng.integers(-(2**20), 2**20, COLUMNS).astype(np.int32)
    quads = np.ascontiguousarray(weights.reshape(-1, 4, COLUMNS).transpose(0, 2, 1)).ravel()
    out = tvm.runtime.tensor(np.full(rows * 2 * COLUMNS, 7, np.int32))
    library["main"](*map(tvm.runtime.tensor, (x.ravel(), quads, bias)), out)
    found = out.numpy().reshape(rows, 2, COLUMNS)
    assert (found[:, 1] == x.astype(np.int64) @ weights + bias).all()
    assert (found[:, 0] == 7).all()


def test_instructions() -> None:
    """For AMX the five operations are its instructions, and nothing else multiplies."""
    module = product("amx", 16, 2).mod
    text = (module.imports[0] if module.imports else module).inspect_source("asm")
    for name in ("ldtilecfg", "tileloadd", "tdpbusd", "tilestored", "tilerelease"):
        assert name in text
    assert "vpdpbusd" not in text


def test_a_peak_is_measured() -> None:
    assert peak_gmacs(get_target(TILES), arithmetic_of(TILES).name, 1, seconds=0.01) > 0


@pytest.mark.parametrize(("pixels", "channels"), [(p, c) for p in SIDES for c in SIDES if p * c <= MOST_SUMS])
def test_a_step_multiplies_what_it_loaded(pixels: int, channels: int) -> None:
    sums, values, weights = registers(pixels, channels)
    assert sorted({*sums, *values, *weights}) == [*sums, *sorted({*values, *weights})]
    assert len(sums) == pixels * channels
    assert not set(sums) & {*values, *weights}
    assert not set(values) & set(weights)
    assert max(*values, *weights) < REGISTERS
    held: dict[int, tuple[str, int]] = {}
    where: dict[tuple[str, int], int] = {}
    added = []
    for kind, first, second in step(pixels, channels):
        if kind == "add":
            assert held[where["values", first]] == ("values", first)
            assert held[where["weights", second]] == ("weights", second)
            added.append((first, second))
        else:
            assert second in {"values": values, "weights": weights}[kind]
            held[second], where[kind, first] = (kind, first), second
    assert sorted(added) == list(itertools.product(range(pixels), range(channels)))


def layers(graph: Any, path: str) -> dict[str, TileSpec]:
    plan = make_plan(graph, BuildOptions(get_target(path)))
    return {str(call.layer): call.spec for call in plan.calls if isinstance(call.spec, TileSpec)}


@pytest.mark.parametrize(
    ("path", "threads", "pace"),
    [(TILES, 1, 7), (TILES, 2, 9), *(pytest.param(path, n, 1, marks=pytest.mark.slow) for path in RUN for n in (1, 2))],
)
def test_every_knob(path: str, threads: int, pace: int) -> None:
    """Values of all knobs, each in its turn, on layers with a window, a residual sum, groups, a stride."""
    maker = Maker(40, (9, 18), seed=threads)
    first = maker.conv(out=96, padding=1)
    second = maker.conv(first, out=96, kernel=1)
    total = maker.add(second, first)
    grouped = maker.conv(total, out=64, groups=4, padding=1, weight_bits=4)
    maker.conv(grouped, out=33, stride=2, padding=1, limits=None)
    graph = maker.graph()
    mattering = ("block", "pixels", "order", "unroll", "epilogue", "ahead")
    spaces = {
        name: {knob: tile_knob_space(spec)[knob] for knob in mattering} for name, spec in layers(graph, path).items()
    }
    assert len(spaces) == 4
    most = max(len(values) for space in spaces.values() for values in space.values())
    for turn in range(0, most, pace):
        knobs = {
            name: {knob: values[(turn + place) % len(values)] for place, (knob, values) in enumerate(space.items())}
            | {"unit": "tiles"}
            for name, space in spaces.items()
        }
        assert_exact(compiled(graph, get_target(path), knobs, threads=threads), images(graph))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_convolution(data: st.DataObject) -> None:
    draw = data.draw
    path = draw(st.sampled_from(RUN))
    groups = draw(st.sampled_from([1, 1, 1, 2, 5]))
    size = (draw(st.sampled_from([1, 5, 7, 13, 14, 28, 56])), draw(st.sampled_from([1, 7, 13, 28])))
    maker = Maker(groups * draw(st.sampled_from([3, 17, 24, 40])), size, draw(st.integers(2, 8)))
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    value = maker.conv(
        out=groups * draw(st.integers(1, 40)), kernel=kernel, groups=groups, stride=draw(st.integers(1, 3)),
        padding=dilation * (kernel - 1), dilation=dilation, weight_bits=draw(st.integers(2, 8)),
        limits=draw(st.sampled_from([None, INT8, (0, 255)])),
    )  # fmt: skip
    del value
    graph = maker.graph()
    knobs = {
        name: {knob: draw(st.sampled_from(values)) for knob, values in tile_knob_space(spec).items()}
        for name, spec in layers(graph, path).items()
    }
    threads = draw(st.sampled_from([1, 2]))
    assert_exact(compiled(graph, get_target(path), knobs, threads=threads), images(graph))


@pytest.mark.parametrize("path", TILE_PATHS)
def test_an_artifact_can_be_kept(path: str, tmp_path: Path) -> None:
    maker = Maker(32, 8)
    maker.conv(out=32, padding=1)
    graph = maker.graph()
    artifact = baqe.build(graph, path, schedules="default")
    artifact.save(tmp_path / "kept")
    again = baqe.Artifact.load(tmp_path / "kept")
    assert again.target == get_target(path)
    if path in RUN:
        assert_exact(again, images(graph))
        assert baqe.measure(again, repeats=3, warmup=1).latency_us > 0
    else:
        with pytest.raises(BuildError, match=r"uses amx instructions .*which"):
            again.run(images(graph))


def test_blocks_are_ranked() -> None:
    """The tuner's ranked strategy walks the knob that makes another kernel."""
    maker = Maker(64, 14)
    maker.conv(out=64, padding=1)
    (spec,) = layers(maker.graph(), "amx_plain").values()
    space = kernel_space(spec)
    assert space.default["unit"] == "tiles"
    assert not space.matters("tile")
    assert space.matters("block")
    found = Ranked().propose(space, [], 16)
    assert len({knobs["block"] for knobs in found}) >= 6


def test_knobs_that_do_not_exist() -> None:
    maker = Maker(32, 8)
    maker.conv(out=32, stride=2, padding=1)
    (spec,) = layers(maker.graph(), "amx_plain").values()
    for knobs, message in (
        ({"depth": 1}, r"unknown knob \['depth'\]"),
        ({"unit": "gpu"}, "unit is tiles or vectors, got 'gpu'"),
        ({"block": "6x6x6"}, "block '6x6x6' does not fit 2 blocks of 16 channels and 4x4 pixels"),
        ({"unroll": 3}, "unroll is 1, 2 or 4"),
        ({"unit": "tiles", "tile": "9x9x9"}, "tile '9x9x9' does not fit"),
        ({"unit": "vectors", "block": "6x6x6"}, "block '6x6x6' does not fit"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_tile_knobs(spec, knobs)
    assert check_tile_knobs(spec, {"pixels": "flat"})["pixels"] == "rows"  # of a stride of 2
    full = check_tile_knobs(spec, {})
    assert check_tile_knobs(spec, full) == full
    vectors = check_tile_knobs(spec, {"unit": "vectors", "block": "2x1x1"})
    assert check_tile_knobs(spec, vectors) == vectors
    assert template_of(spec).cost(spec, full) > 0
    assert template_of(spec).cost(spec, vectors) > 0
