"""Any small graph of integer operators: compiled code equals the interpreter, and computes with integers only."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import INTEGER_NODES, draw_graph
from small_graphs import TILE_PATHS, Maker, assert_exact, compiled, images, random_schedules

from lightning_baqe.deploy.calls import Call
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import can_run, get_target
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.graph import IntegerGraph

PATHS = (*TILE_PATHS, "vnni512", "avxvnni", "avx2", "portable")


def checked(path: str, examples: int) -> Callable[[], None]:
    """A test of so many random graphs, which must have had every operator."""
    seen: set[type[ir.Node]] = set()

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        graph = draw_graph(data).graph()
        seen.update(type(node) for node in graph)
        target = get_target(path)
        schedules = random_schedules(graph, target, data.draw(st.integers(0, 99)))
        artifact = compiled(graph, target, schedules, fuse=data.draw(st.booleans()))
        assert_exact(artifact, images(graph))
        assert not float_kernels(graph, path)

    def run() -> None:
        check()
        assert seen >= set(INTEGER_NODES)

    return run


def float_types(call: Call) -> set[str]:
    """All float types in a kernel's code: of arguments, loads, stores, constants and expressions."""
    return set(re.findall(r'"(b?float[^"]*)"', tvm.ir.save_json(call.function())))


def float_kernels(graph: IntegerGraph, path: str) -> list[str]:
    """Kernels with floats, but the one that quantizes the image and the one that dequantizes the output."""
    return [call.result for call in make_plan(graph, BuildOptions(get_target(path))).calls[1:-1] if float_types(call)]


def test_random_graphs() -> None:
    checked("native", 25)()


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_many_random_graphs(path: str) -> None:
    if not can_run(path):
        pytest.skip(f"this CPU does not run {path} code")
    checked(path, 100)()


@pytest.mark.parametrize("path", PATHS)
def test_integer_networks_compute_with_integers_only(path: str) -> None:
    maker = Maker(17, 6)
    stem = maker.conv(out=24, padding=1)
    deep = maker.table(maker.conv(stem, out=24, padding=1, groups=24))
    grouped = maker.affine(maker.conv(deep, out=24, groups=3, padding=1))
    gate = maker.avg_windows(grouped, [(0, 6)], [(0, 6)])
    product = maker.mul(grouped, gate)
    total = maker.requantize(maker.add(product, stem, (-500, 500)), (0, 255))
    joined = maker.concat(maker.gather(total, [3, -1, 2]), maker.max_pool(total, 3, 1, 1), maker.clip(total, (0, 9)))
    pooled = maker.max_windows(maker.avg_pool(joined, 2, 2), [(0, 2), (1, 3)], [(0, 3)])
    turned = maker.move(maker.prelu(maker.add(pooled, maker.literal((1, 2, 1)))), torch.arange(60).reshape(5, 3, 4))
    maker.linear(maker.flatten(turned), 5)
    graph = maker.graph()
    plan = make_plan(graph, BuildOptions(get_target(path)))
    assert {type(node) for node in graph} >= set(INTEGER_NODES)
    assert float_kernels(graph, path) == []
    assert float_types(plan.calls[0]) == float_types(plan.calls[-1]) == {"float32"}


def test_float_layers_are_seen() -> None:
    maker = Maker(16, 5)
    real = maker.dequantize(maker.conv(out=16))
    layer = maker.float_conv(real, 16, groups=16)
    again = maker.quantize(layer)
    maker.conv(again, out=8, kernel=1)
    assert float_kernels(maker.graph(), "avx2") == [real, layer, again]
