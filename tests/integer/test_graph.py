"""What a graph checks, counts and says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from expressions import chain

from integer.real_graphs import RealMaker
from lightning_baqe.errors import ConfigError
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.dyadic import Dyadic
from lightning_baqe.integer.graph import IntegerGraph, node_bytes
from lightning_baqe.integer.serialize import graph_from_parts, graph_to_parts


def normalised(m: RealMaker, source: str = "image") -> str:
    kind, numbers = m[source].type, torch.rand(2, m[source].type.shape[0], generator=m.rng) + 0.1
    return m.add_node(
        ir.FloatAffine(name=m.rename("affine"), inputs=(source,), type=kind, gain=numbers[0], shift=numbers[1])
    )


def scaled(m: RealMaker, source: str = "image") -> str:
    kind = m[source].type
    return m.add_node(ir.FloatFunction(name=m.rename("div"), inputs=(source,), type=kind, steps=chain(("div", 255.0))))


def moved(m: RealMaker, source: str) -> str:
    return m.move(m.gather(source, [2, 1, 0]), torch.arange(192).reshape(3, 8, 8).flip(2))


def minus_mean(m: RealMaker) -> str:
    mean = ir.Literal(name="mean", inputs=(), type=ir.TensorType((3, 1, 1)), value=torch.rand(3, 1, 1))
    m.add_node(mean)
    return m.add_node(ir.FloatAdd(name="centred", inputs=("image", "mean"), type=ir.TensorType((3, 8, 8)), relu=False))


def float_sum(m: RealMaker, *names: str) -> str:
    return m.add_node(ir.FloatAdd(name=m.rename("sum"), inputs=names, type=m[names[0]].type, relu=False))


def prelu(m: RealMaker, source: str) -> str:
    return m.add_node(
        ir.FloatPRelu(name=m.rename("prelu"), inputs=(source,), type=m[source].type, slope=torch.tensor(0.2))
    )


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (lambda m: m.conv(m.quantize(), 4), True),
        (lambda m: m.conv(m.quantize(normalised(m, scaled(m))), 4), True),
        (lambda m: m.conv(m.quantize(normalised(m, moved(m, scaled(m)))), 4), True),
        (lambda m: m.conv(m.quantize(m.max_pool(normalised(m), 2, 2)), 4), True),
        (lambda m: m.conv(m.quantize(minus_mean(m)), 4), True),
        (lambda m: m.conv(m.quantize(m.float_conv("image", 3)), 4), False),
        (lambda m: m.conv(m.quantize(m.float_conv(normalised(m), 3)), 4), False),
        (lambda m: m.conv(m.quantize(prelu(m, "image")), 4), False),
        (lambda m: m.conv(m.quantize(normalised(m, m.dequantize(m.quantize()))), 4), False),
        (lambda m: float_sum(m, x := scaled(m), m.dequantize(m.quantize(x))), False),
        (lambda m: m.concat(x := scaled(m), m.dequantize(m.quantize(x))), False),
        (lambda m: scaled(m), False),
        (lambda m: scaled(m, m.dequantize(m.conv(m.quantize(scaled(m)), 4))), False),
    ],
)
def test_what_is_done_to_the_input_before_its_quantization_is_no_float_layer(
    build: Callable[[RealMaker], Any], wanted: bool
) -> None:
    maker = RealMaker((3, 8, 8))
    build(maker)
    assert maker.graph().is_integer_only == wanted


def test_the_batch_reaches_literals() -> None:
    m = RealMaker((3, 8, 8))
    m.literal(5)
    graph = m.graph()
    out = graph.run(torch.zeros(4, 3, 8, 8))
    assert out.shape == (4, 5)
    assert torch.equal(out[0], out[3])
    assert graph.run(torch.zeros(0, 3, 8, 8)).shape == (0, 5)
    m = RealMaker((3, 8, 8))
    m.concat(m.quantize(), m.literal(2, 8, 8))
    assert m.graph().run_all(torch.zeros(4, 3, 8, 8))["literal2"].shape == (4, 2, 8, 8)


def test_constants_are_counted() -> None:
    kind = ir.TensorType((3, 4, 5), 0, 255)
    one, many = Dyadic.from_real(0.3), Dyadic.from_real([0.1, 0.2, 0.3])
    prelu = ir.PRelu(name="p", inputs=("x",), type=kind, positive=one, negative=many, input_zero_point=0)
    assert node_bytes(prelu) == (4 + 1) + (3 * 4 + 1)
    real = ir.FloatPRelu(name="p", inputs=("x",), type=ir.TensorType((3, 4, 5)), slope=torch.rand(3))
    assert node_bytes(real) == 3 * 4
    for limits, size in (((0, 255), 1), ((-128, 127), 1), ((0, 256), 2), ((-129, 0), 2), ((-(2**31), 2**31 - 1), 4)):
        value = torch.full((6,), limits[1])
        assert node_bytes(ir.Literal(name="l", inputs=(), type=ir.TensorType((6,), *limits), value=value)) == 6 * size
        table = ir.Table(name="t", inputs=("x",), type=ir.TensorType((6,), *limits), table=value, input_low=0, steps=())
        assert node_bytes(table) == 6 * size
    assert node_bytes(ir.Literal(name="l", inputs=(), type=ir.TensorType((6,)), value=torch.rand(6))) == 6 * 4
    index = torch.arange(60).reshape(3, 4, 5)
    assert node_bytes(ir.Move(name="m", inputs=("x",), type=kind, index=index)) == 0


def test_round_trip() -> None:
    m = RealMaker((4, 8, 8))
    x = m.prelu(m.max_windows(m.quantize(prelu(m, "image")), [(0, 3), (2, 8)], [(0, 8), (1, 2)]), by_channel=True)
    x = m.add(m.prelu(m.move(x, torch.arange(-1, 15).reshape(2, 2, 4)), by_channel=False), m.literal(2, 1, 4))
    value = torch.randn(2, 2, 4, generator=m.rng)
    m.add_node(ir.Literal(name="real", inputs=(), type=ir.TensorType((2, 2, 4)), value=value))
    float_sum(m, m.dequantize(x), "real")
    graph = m.graph()
    description, arrays = graph_to_parts(graph)
    again = graph_from_parts(json.loads(json.dumps(description)), arrays)
    assert torch.equal(again.run(m.images), graph.run(m.images))
    assert again.size_bytes == graph.size_bytes
    assert [node.type for node in again] == [node.type for node in graph]


@pytest.mark.parametrize(
    ("shapes", "result", "fits"),
    [
        (((3, 4, 5), (3, 4, 5)), (3, 4, 5), True),
        (((3, 1, 1), (3, 4, 5)), (3, 4, 5), True),
        (((3, 1, 5), (1, 4, 1)), (3, 4, 5), True),
        (((5,), (1,)), (5,), True),
        (((3, 1, 1), (3, 1, 1)), (3, 4, 5), False),
        (((3, 4, 5), (3, 2, 5)), (3, 4, 5), False),
        (((3, 4, 5), (5,)), (3, 4, 5), False),
        (((3, 4, 5), (3, 4, 5)), (3, 1, 5), False),
    ],
)
def test_operands(shapes: tuple[tuple[int, ...], ...], result: tuple[int, ...], fits: bool) -> None:
    nodes: list[ir.Node] = [ir.Input(name="input", inputs=(), type=ir.TensorType((1,)))]
    for name, shape in zip("ab", shapes, strict=True):
        nodes.append(ir.Literal(name=name, inputs=(), type=ir.TensorType(shape), value=torch.rand(shape)))
    nodes.append(ir.FloatMul(name="c", inputs=("a", "b"), type=ir.TensorType(result)))
    if fits:
        assert IntegerGraph(tuple(nodes), {}).run(torch.zeros(2, 1)).shape == (2, *result)
    else:
        with pytest.raises(ConfigError, match=r"'c' .*(its type has the shape|same size or 1)"):
            IntegerGraph(tuple(nodes), {})


def test_refusals() -> None:
    start = ir.Input(name="x", inputs=(), type=ir.TensorType((2, 3, 4)))
    with pytest.raises(ConfigError, match=r"\(features,\).*not \(3, 4\)"):
        IntegerGraph((replace(start, type=ir.TensorType((3, 4))),), {})
    index = torch.arange(24)
    move = ir.Move(name="m", inputs=("x",), type=ir.TensorType((24,)), index=index)
    IntegerGraph((start, move), {})
    for wrong in (index + 1, index - 2):
        with pytest.raises(ConfigError, match=r"'m' .* take .* of 0\.\.23"):
            IntegerGraph((start, replace(move, index=wrong)), {})
    with pytest.raises(ConfigError, match=r"int64 .*\(24,\).*\(12,\)"):
        replace(move, index=index[:12])
    literal = ir.Literal(name="l", inputs=(), type=ir.TensorType((2,), 0, 9), value=torch.tensor([0, 9]))
    with pytest.raises(ConfigError, match=r"0\.\.10.*0\.\.9"):
        replace(literal, value=torch.tensor([0, 10]))
    with pytest.raises(ConfigError, match=r"int64 of shape \(2,\), got torch.float32"):
        replace(literal, value=torch.rand(2))
