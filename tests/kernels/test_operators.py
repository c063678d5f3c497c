"""Conformance of the operators besides convolutions, on every path of this CPU: integers equal, floats within 1e-5."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from expressions import chain
from small_graphs import INT8, UINT8, WIDE, Maker, assert_exact, compiled, images

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, get_target
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.dyadic import Dyadic
from lightning_baqe.kernels.x86 import float_functions
from lightning_baqe.kernels.x86.moves import MoveSpec

PATHS = ("vnni512", "avx2", "portable")
CHANNELS = (1, 3, 17, 40)


@pytest.fixture(params=PATHS)
def target(request: pytest.FixtureRequest) -> CpuTarget:
    """Each path: compiled for all, run on those that this CPU has."""
    return get_target(request.param)


@pytest.mark.parametrize("channels", CHANNELS)
def test_elementwise(channels: int, target: CpuTarget) -> None:
    maker = Maker(channels, (5, 7), seed=channels)
    for limits in (UINT8, INT8, WIDE):
        value = maker.conv(out=channels, padding=1, limits=limits)
        narrow = maker.requantize(value, (-300, 500), 0.02)
        for wanted, by_channel in ((UINT8, (False, True)), (INT8, (False, False)), (WIDE, (True, True))):
            maker.affine(value, wanted)
            maker.prelu(value, wanted, by_channel)
            maker.table(narrow if limits == WIDE else value, wanted)
    for a in ("x", maker.conv(out=channels, padding=1)):
        gate = maker.avg_windows(a, [(0, 5)], [(0, 7)])
        for b in (a, gate, maker.table(gate)):
            for wanted in (UINT8, INT8, WIDE):
                maker.conv(maker.mul(a, b, wanted), out=2, padding=1) if wanted == UINT8 else maker.mul(a, b, wanted)
    stream = maker.conv(out=channels, padding=1, limits=WIDE)
    maker.mul(stream, "x", WIDE)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph))


@pytest.mark.parametrize("size", [2.0**-20, 2.0**-7, 1.0, 2.0**11])
def test_prelu_of_any_factors(size: float, target: CpuTarget) -> None:
    """Shifts on both sides of 32, alike and not, whose products need 32 bits and more."""
    maker = Maker(19, (3, 5), seed=3)
    for value in ("x", maker.conv(out=19, padding=1, limits=WIDE), maker.conv(out=19, padding=1, limits=None)):
        for limits in (UINT8, WIDE):
            maker.prelu(value, limits, (False, True), size)
            maker.prelu(value, limits, (False, False), size)
            node = maker.nodes[-1]
            assert isinstance(node, ir.PRelu)
            steep = Dyadic.from_real(float(node.positive.real()) * 2.0**12)
            maker.nodes[-1] = dataclasses.replace(node, negative=steep)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph))


@pytest.mark.parametrize("channels", CHANNELS)
def test_pools(channels: int, target: CpuTarget) -> None:
    maker = Maker(channels, (9, 6), seed=channels)
    uneven = [(0, 2), (1, 5), (4, 9)], [(0, 1), (0, 6), (3, 4), (5, 6)]
    for limits in (UINT8, INT8, WIDE):
        value = maker.conv(out=channels, padding=1, limits=limits)
        maker.avg_windows(value, *uneven)
        maker.avg_windows(value, *uneven, limits, by_pixel=False)
        maker.avg_windows(value, [(0, 4), (5, 9)], [(0, 3), (3, 6)], limits)
        maker.avg_windows(value, [(2, 5), (4, 7)], [(1, 4)], limits)
        maker.max_pool(value, (3, 2), (2, 1), (1, 0), dilation=(1, 2))
        maker.max_pool(value, 3, 1, 1, dilation=2)
        maker.max_pool(value, (2, 3), 2, (1, 1), ceil_mode=True)
        maker.max_windows(value, *uneven)
    pooled = maker.avg_windows("x", *uneven)
    maker.conv(pooled, out=5, padding=2)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph))


@pytest.mark.parametrize("channels", CHANNELS)
def test_movement(channels: int, target: CpuTarget) -> None:
    maker = Maker(channels, (5, 4), seed=channels)
    rows, columns = [-1, 0, 0, 4, 2, -1], [3, 3, -1, 0, 1]
    every = list(range(channels))
    values = [maker.conv(out=channels, padding=1, limits=limits) for limits in (UINT8, INT8, WIDE)]
    for value in ("x", *values):
        maker.gather(value, [-1, *reversed(every), *every])
        maker.gather(value, None, rows, columns)
        maker.gather(value, [*every, -1], rows, None)
        maker.gather(value, every[channels // 2 :], None, columns)
        maker.concat(value)
        maker.concat(value, maker.gather(value, [0, -1, 0]), value)
    maker.concat(*values, "x")
    maker.concat(*[values[0]] * 17)
    chunk = maker.gather(values[0], every[: (channels + 1) // 2])
    joined = maker.concat(chunk, values[0], maker.gather(values[0], every[channels // 2 :]))
    shuffled = maker.gather(joined, list(range(0, 2 * channels, 2)) + list(range(1, 2 * channels, 2)))
    maker.conv(shuffled, out=7, padding=1)
    maker.conv(joined, out=9, kernel=3, padding=(2, 0, 1, 3))
    maker.linear(maker.flatten(shuffled), 11)
    flat = maker.flatten(values[1])
    maker.gather(flat, [5, -1, 0, *range(19)])
    maker.concat(flat, maker.gather(flat, [1, 2]))
    hidden = maker.linear(maker.table(maker.flatten(values[0])), 21, UINT8)
    one = maker.flatten(hidden)
    maker.conv(maker.concat(one, one), out=3, kernel=1)
    maker.linear(maker.flatten(maker.flatten(maker.flatten(values[0]))), 3)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph, 2))


@pytest.mark.parametrize(("channels", "size"), [(1, (5, 7)), (17, (3, 5)), (40, 1), (64, (2, 1)), (16, (1, 3))])
@pytest.mark.parametrize("path", ["native", "portable"])
def test_tables_of_bytes(path: str, channels: int, size: int | tuple[int, int]) -> None:
    maker = Maker(channels, size, seed=channels)
    for value in ("x", maker.requantize("x", INT8), maker.clip("x", (3, 17))):
        for limits in (UINT8, INT8):
            maker.table(value, limits)
            maker.requantize(value, limits, 1.7)
        maker.conv(maker.table(value), out=3, padding=1)
    graph = maker.graph()
    assert_exact(compiled(graph, get_target(path)), images(graph))


@pytest.mark.parametrize("groups", [2, 3, 5, 8, 9])
def test_channel_shuffles(groups: int, target: CpuTarget) -> None:
    maker = Maker(4, (3, 4))
    for per in (1, 16, 21):
        for limits in (UINT8, WIDE):
            value = maker.conv(out=groups * per, kernel=1, limits=limits)
            shuffled = torch.arange(groups * per).reshape(groups, per).T.ravel().tolist()
            maker.gather(value, shuffled)
            maker.gather(value, shuffled[: per // 2 * groups] or [0], [1, -1, 0])
    maker.float_node(ir.Gather, maker.dequantize(value), channels=torch.tensor(shuffled), rows=None, columns=None)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph))


@pytest.mark.parametrize("width", [1, 15, 16, 33])
@pytest.mark.parametrize("channels", [1, 3, 5, 16, 20])
def test_images_of_any_width(channels: int, width: int, target: CpuTarget) -> None:
    maker = Maker(channels, (2, width), seed=width)
    maker.conv(out=3, padding=1)
    maker.float_conv("input", 3, padding=2)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph))


def test_squeeze_and_excite(target: CpuTarget) -> None:
    maker = Maker(17, (7, 5), seed=2)
    value = maker.table(maker.conv(out=33, groups=1, padding=1))
    pooled = maker.avg_windows(value, [(0, 7)], [(0, 5)])
    gate = maker.table(maker.conv(maker.table(maker.conv(pooled, out=9, kernel=1)), out=33, kernel=1))
    maker.conv(maker.mul(value, gate), out=18, padding=1)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph))


def test_a_value_is_copied_for_readers_that_pad_with_another_number(target: CpuTarget) -> None:
    maker = Maker(19, 6, seed=4)
    value = maker.conv(out=21, padding=1)
    for padding, pad_value in ((1, 5), (2, 0), ((0, 3, 1, 2), 255), (1, 255), (0, 17)):
        maker.conv(value, out=10, padding=padding, pad_value=pad_value)
        maker.conv(value, out=21, padding=padding, groups=21, pad_value=pad_value)
        maker.conv(padding=padding, pad_value=pad_value)
    graph = maker.graph()
    artifact = compiled(graph, target)
    copies = [call.nodes for call in artifact.plan.calls if isinstance(call.spec, MoveSpec)]
    assert len(copies) == 2 + 3  # of its own three numbers, and of the image's, which the first layer pads with 3
    assert_exact(artifact, images(graph))


def test_a_flatten_is_a_copy_only_where_its_readers_want_one() -> None:
    maker = Maker(16, 4)
    image = maker.conv(out=16, padding=1)
    maker.linear(maker.flatten(image), 8)
    assert not any(
        isinstance(call.spec, MoveSpec) for call in make_plan(maker.graph(), BuildOptions(get_target())).calls
    )
    maker.table(maker.flatten(image))
    assert (
        sum(isinstance(call.spec, MoveSpec) for call in make_plan(maker.graph(), BuildOptions(get_target())).calls) == 1
    )


# -- floats -----------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {
    "leaky_relu": [(0.01,), (-0.5,)],
    "elu": [(1.0,), (0.3, 1.5, 0.5)],
    "celu": [(0.7,)],
    "softplus": [(1.0, 20.0), (0.2, 5.0), (-3.0, 50.0)],
    "gelu": [("none",), ("tanh",)],
    "clamp": [(-1.0, 2.0), (None, 0.5), (0.1, None)],
    "clip": [(-1.0, 2.0)],
    "hardtanh": [(-2.0, 0.5)],
    "clamp_min": [(0.2,)],
    "clamp_max": [(0.2,)],
    "hardshrink": [(0.5,)],
    "softshrink": [(0.5,)],
    "threshold": [(0.1, 7.0)],
    "pow": [(2.0,), (3.0,), (0.5,), (1.7,), (0.0,)],
    **{name: [(0.7,), (-3.0,)] for name in ("add", "sub", "mul", "div", "rsub")},
}
POSITIVE = ("sqrt", "rsqrt", "log", "log2", "log10", "log1p", "pow")
SMALL = ("exp", "exp2", "expm1", "sin", "cos", "tan")  # of large numbers they are infinite, or PyTorch rounds otherwise
OF_TWO = ("maximum", "minimum", "where", "gt", "ge", "lt", "le", "eq")


@pytest.mark.parametrize("name", sorted(float_functions.NAMES - {*OF_TWO}))
def test_float_functions(name: str) -> None:
    maker = Maker(19, (4, 37))
    for arguments in ARGUMENTS.get(name, [()]):
        maker.float_node(ir.FloatFunction, "input", steps=chain((name, *arguments)))
    graph = maker.graph()
    artifact = compiled(graph, get_target())
    count = 19 * 4 * 37 // 4
    small, large = torch.logspace(-6, 0, count), torch.logspace(0, 0.1 if name in SMALL else 2.2, count)
    x = torch.cat([small, -small, large, -large]).reshape(1, 19, 4, 37)
    x = x.abs() if name in POSITIVE else x
    values = artifact.run_all(x)
    for node in graph.nodes[2:]:
        got, want = values.get(node.name, values.get(f"{node.name}.output")), node.run(x)
        assert got is not None
        assert torch.isfinite(want).all()
        # Where a sum cancels, the last bits are those of the larger part.
        near = 1e-6 if name in ("gelu", "elu") else 1e-35
        torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-5, atol=near)


@pytest.mark.parametrize("comparison", ["gt", "ge", "lt", "le", "eq"])
def test_float_expressions_of_several_steps(comparison: str) -> None:
    steps = (
        ("mul.Tensor", "%0", 0.1),
        ("maximum", "%0", "%1"),
        ("minimum", "%2", "%0"),
        (f"{comparison}.Scalar", "%0", 1.0),
        ("where.self", "%4", "%3", "%1"),
    )
    maker = Maker(5, (4, 8))
    maker.float_node(ir.FloatFunction, "input", steps=steps)
    graph, generator = maker.graph(), torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 4, 8, generator=generator).round(decimals=1)
    torch.testing.assert_close(compiled(graph, get_target()).run(x), graph.run(x))


@pytest.mark.parametrize("channels", CHANNELS)
def test_float_operators(channels: int, target: CpuTarget) -> None:
    maker = Maker(channels, (6, 5), seed=channels)
    every = list(range(channels))
    image = maker.float_conv("input", channels, padding=1)
    rdiv = maker.float_node(ir.FloatFunction, image, steps=chain(("reciprocal",)))
    maker.float_conv(rdiv, 7, padding=1)  # spare channels would be infinite
    powered = maker.float_node(ir.FloatFunction, "input", steps=chain(("exp",)))
    affine = maker.float_node(ir.FloatAffine, powered, gain=maker.floats(channels), shift=maker.floats(channels))
    bounds = {"rows": torch.tensor([[0, 3], [2, 6]]), "columns": torch.tensor([[0, 5], [1, 2], [4, 5]])}
    maker.float_node(ir.FloatAvgPool, affine, factors=torch.rand(6), **bounds)
    maker.float_node(ir.FloatAvgPool, affine, factors=torch.tensor(0.1), **bounds)
    whole = {"rows": torch.tensor([[0, 6]]), "columns": torch.tensor([[0, 5]])}
    gate = maker.float_node(ir.FloatAvgPool, affine, factors=torch.tensor(1 / 30), **whole)
    maker.float_node(ir.FloatMul, affine, gate)
    product = maker.float_node(ir.FloatMul, affine, image)
    maker.float_node(ir.FloatAdd, product, "input", relu=True)
    joined = maker.float_node(ir.Concat, product, "input", image)
    maker.float_conv(joined, 5, padding=2)
    index = {"channels": torch.tensor([-1, *reversed(every)]), "rows": torch.tensor([0, -1, 5]), "columns": None}
    picked = maker.float_node(ir.Gather, joined, **index)
    maker.float_conv(picked, 3, kernel=1)
    half = {"channels": torch.tensor(every[channels // 2 :]), "rows": None, "columns": None}
    maker.float_conv(maker.float_node(ir.Gather, image, **half), 3, padding=1)
    flat = maker.float_node(ir.FloatFunction, maker.flatten(image), steps=chain(("tanh",)))
    maker.float_linear(flat, 9)
    integers = maker.quantize(product)
    maker.conv(integers, out=6, padding=1)
    maker.dequantize(integers, maker.floats(channels))
    maker.max_pool(affine, 3, 1, 1, dilation=2)
    maker.float_conv(maker.float_node(ir.MaxWindows, affine, **bounds), 3, 1)
    for slope in (maker.floats(channels), torch.tensor(-0.3)):
        maker.float_conv(maker.float_node(ir.FloatPRelu, image, slope=slope), 3, padding=1)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph))
