"""Operands of sums and products: equal, constant, of fewer rows, columns or channels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from small_graphs import INT8, UINT8, WIDE, Maker, assert_exact, compiled, images

from lightning_baqe.hardware.target import CpuTarget, get_target
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.x86.conv_spec import ConvSpec


@pytest.fixture(params=["vnni512", "avx2", "portable"])
def target(request: pytest.FixtureRequest) -> CpuTarget:
    return get_target(request.param)


def reduced(maker: Maker, name: str, keep: tuple[bool, ...]) -> str:
    """One channel, row or column of a value, along each dimension that is not kept."""
    return maker.gather(name, *[None if kept else [0] for kept in keep])


@pytest.mark.parametrize("channels", [1, 3, 40])
def test_operands_are_broadcast(channels: int, target: CpuTarget) -> None:
    maker = Maker(channels, (4, 5), seed=channels)
    whole = maker.conv(out=channels, padding=1)
    real = maker.dequantize(whole)
    for keep in itertools.product((True, False), repeat=3):
        part = reduced(maker, whole, keep)
        float_part = maker.dequantize(part)
        for pair in ((whole, part), (part, whole), (part, part)):
            maker.add(*pair)
            maker.add(*pair, WIDE, 2**26)
            maker.mul(*pair)
        maker.float_conv(maker.float_node(ir.FloatMul, real, float_part), 3, 1)
        maker.float_conv(maker.float_node(ir.FloatAdd, real, float_part, relu=False), 3, 1)
        maker.float_conv(maker.float_node(ir.FloatAdd, real, real, relu=True), 3, 1)
    row, column = reduced(maker, whole, (True, False, True)), reduced(maker, whole, (True, True, False))
    maker.conv(maker.mul(row, column), out=3, padding=1)
    flat = maker.linear(maker.flatten(whole), 11, UINT8)
    one = maker.gather(flat, [4])
    maker.mul(flat, one)
    maker.add(one, flat, INT8)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph, 2))


def test_a_convolution_is_not_fused_with_a_sum_of_another_shape(target: CpuTarget) -> None:
    maker = Maker(16, (4, 5))
    row = reduced(maker, "x", (True, False, True))
    pixel = maker.conv(maker.avg_windows("x", [(0, 4)], [(0, 5)]), out=16, kernel=1)
    sums = [maker.add(maker.conv(out=16, kernel=1), row), maker.add(pixel, "x"), maker.add(row, pixel)]
    fused = maker.add(maker.conv(out=16, kernel=1), maker.literal((16, 4, 5)))
    graph = maker.graph()
    artifact = compiled(graph, target)
    ends = [call.result for call in artifact.plan.calls if isinstance(call.spec, ConvSpec)]
    assert fused in ends
    assert not set(sums) & set(ends)
    assert_exact(artifact, images(graph))


@pytest.mark.parametrize("channels", [3, 40])
def test_literals(channels: int, target: CpuTarget) -> None:
    maker = Maker(channels, (4, 5), seed=channels)
    shape = (channels, 4, 5)
    value = maker.conv(out=channels, padding=1)
    for limits in (UINT8, INT8, WIDE, (3, 9)):
        literal = maker.literal(shape, limits)
        maker.add(value, literal)
        maker.add(literal, maker.literal((channels, 1, 1), limits), WIDE)
        maker.mul(literal, value, WIDE)
        maker.concat(value, literal, literal)
        maker.move(literal, torch.arange(channels * 20).flip(0).reshape(shape))
        maker.gather(literal, [0, -1, 1])
        maker.affine(literal)
        maker.table(literal)
        maker.prelu(literal)
        maker.clip(literal, (4, 8))
        maker.requantize(literal, UINT8)
        maker.max_pool(literal, 2, 1, 1)
        maker.avg_pool(literal, 2, 2)
    literal = maker.literal(shape)
    for pad_value in (0, 7, 200):  # one layout with a halo, and copies with other ones
        maker.conv(literal, out=6, padding=1, pad_value=pad_value)
        maker.conv(literal, out=channels, padding=2, groups=channels, pad_value=pad_value)
    maker.linear(maker.flatten(literal), 4)
    hidden = maker.linear(maker.literal((30,)), 16, UINT8)
    maker.conv(maker.flatten(hidden), out=5, kernel=1)
    real = maker.float_literal(*shape)
    maker.float_conv(maker.float_node(ir.FloatMul, real, "input"), 3, 1, padding=1)
    maker.float_node(ir.FloatAdd, real, real, relu=True)
    maker.conv(maker.quantize(real), out=3, padding=1)
    maker.concat(maker.literal((32, 4, 5)), maker.conv(out=16, padding=1))
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph, 2))


def test_a_literal_may_be_all_there_is(target: CpuTarget) -> None:
    maker = Maker(3, 4)
    maker.literal((5, 2, 3))
    assert_exact(compiled(maker.graph(), target), images(maker.graph(), 3))
    name = maker.float_literal(7)
    graph = IntegerGraph((maker.nodes[0], maker[name]), {})
    got = compiled(graph, get_target()).run(images(graph, 2))
    assert torch.equal(got, graph.run(images(graph, 2)))
    assert np.array_equal(got[1], graph.output.run()[0])
