from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_baqe.errors import ConfigError, UnsupportedModelError
from lightning_baqe.integer.dyadic import Dyadic
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.nodes import (
    Conv,
    FloatPRelu,
    Input,
    MaxWindows,
    Move,
    PRelu,
    TensorType,
    check_accumulator,
)


def naive_conv(node: Conv, values: torch.Tensor) -> list[int]:
    """Python integers, one output at a time."""
    top, bottom, left, right = node.padding
    channels, height, width = values.shape
    out_channels, per_group, kernel_h, kernel_w = node.weight.shape
    out_h = (height + top + bottom - node.dilation[0] * (kernel_h - 1) - 1) // node.stride[0] + 1
    out_w = (width + left + right - node.dilation[1] * (kernel_w - 1) - 1) // node.stride[1] + 1
    result = []
    for o, y, x in itertools.product(range(out_channels), range(out_h), range(out_w)):
        acc = int(node.bias[o])
        first = o // (out_channels // node.groups) * per_group
        for c, i, j in itertools.product(range(per_group), range(kernel_h), range(kernel_w)):
            row = y * node.stride[0] + i * node.dilation[0] - top
            column = x * node.stride[1] + j * node.dilation[1] - left
            inside = 0 <= row < height and 0 <= column < width
            value = int(values[first + c, row, column]) if inside else node.pad_value
            acc += value * int(node.weight[o, c, i, j])
        if node.requant is not None:
            multiplier = int(node.requant.multiplier[o])
            acc = (acc * multiplier + (1 << (node.requant.shift - 1))) >> node.requant.shift
            acc = min(max(acc + node.type.zero_point, node.type.low or 0), node.type.high or 0)
        result.append(acc)
    assert channels == per_group * node.groups
    return result


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([1, 2]), st.integers(1, 2), st.integers(1, 2))
def test_conv_equals_integer_loops(seed: int, requantized: bool, groups: int, stride: int, dilation: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    factors = torch.randn(4, generator=generator, dtype=torch.float64) * 0.05
    padding = tuple(integers(0, 2, (4,)).tolist())
    options = {
        "stride": (stride, 1), "padding": padding, "dilation": (1, dilation), "groups": groups, "pad_value": 3,
        "weight": integers(-8, 7, (4, 4 // groups, 2, 3)), "bias": integers(-500, 500, (4,)),
    }  # fmt: skip
    node = Conv(
        name="c", layer="c", inputs=("x",), weight_bits=4, activation_bits=4, input_range=(0, 15),
        type=TensorType((4, 0, 0), 0, 255, 0.1, 17), requant=Dyadic.from_real(factors) if requantized else None,
        **options,
    )  # fmt: skip
    values = integers(0, 15, (2, 4, 6, 6))
    out = node.run(values)
    assert [out[0].flatten().tolist(), out[1].flatten().tolist()] == [naive_conv(node, v) for v in values]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_prelu_equals_python_integers(data: st.DataObject) -> None:
    channels, zero_point = data.draw(st.integers(1, 3)), data.draw(st.integers(-9, 9))
    factors = []
    for _ in range(2):
        size = 1 if data.draw(st.booleans()) else channels
        exponent = data.draw(st.integers(-20, 3))
        reals = [data.draw(st.floats(-1, 1)) * 2.0**exponent for _ in range(size)]
        factors.append(Dyadic.from_real(reals[0] if size == 1 else reals))
    kind = TensorType((channels, 1, 2), -300, 500, 1.0, 40)
    node = PRelu(
        name="p", inputs=("x",), type=kind, positive=factors[0], negative=factors[1], input_zero_point=zero_point
    )
    values = torch.tensor(
        data.draw(st.lists(st.integers(-(2**15), 2**15), min_size=channels * 4, max_size=channels * 4))
    )
    values = values.reshape(2, channels, 1, 2)
    out = node.run(values)
    for n, c, x in itertools.product(range(2), range(channels), range(2)):
        steps = int(values[n, c, 0, x]) - zero_point
        part = factors[1] if steps < 0 else factors[0]
        multiplier = int(part.multiplier.expand(channels)[c])
        rounded = math.floor(Fraction(steps * multiplier, 2**part.shift) + Fraction(1, 2))
        assert out[n, c, 0, x] == min(max(rounded + 40, -300), 500)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6))
def test_max_windows_are_adaptive_pooling(height: int, width: int, rows: int, columns: int) -> None:
    values = torch.randint(-999, 999, (2, 3, height, width))
    bounds = [
        torch.tensor([(i * size // out, -(-(i + 1) * size // out)) for i in range(out)])
        for size, out in ((height, rows), (width, columns))
    ]
    node = MaxWindows(name="m", inputs=("x",), type=TensorType((3, rows, columns)), rows=bounds[0], columns=bounds[1])
    wanted = torch.nn.functional.adaptive_max_pool2d(values.double(), (rows, columns))
    assert torch.equal(node.run(values), wanted.to(torch.int64))
    assert torch.equal(node.run(values.float()), wanted.float())


def test_float_prelu_is_torch_s() -> None:
    values, slope = torch.randn(4, 3, 5, 6), torch.randn(3)
    node = FloatPRelu(name="p", inputs=("x",), type=TensorType((3, 5, 6)), slope=slope)
    assert torch.equal(node.run(values), torch.nn.functional.prelu(values, slope))


def test_moves_are_torch_s() -> None:
    """Any chain of views and permutations is one move: the number of every element goes the same way."""
    values = torch.randint(-999, 999, (3, 8, 6, 4))
    numbers = torch.arange(8 * 6 * 4).reshape(1, 8, 6, 4)
    for change in (
        lambda x: torch.nn.functional.pixel_shuffle(x, 2),
        lambda x: torch.nn.functional.pixel_unshuffle(x, 2),
        lambda x: x.permute(0, 3, 1, 2),
        lambda x: x.roll((1, 2), (2, 3)).flatten(1),
        lambda x: x.reshape(len(x), 2, 4, 24).transpose(1, 2).reshape(len(x), 24, 8, 1),
    ):
        index = change(numbers.double())[0].to(torch.int64)
        node = Move(name="m", inputs=("x",), type=TensorType(tuple(index.shape)), index=index)
        assert torch.equal(node.run(values), change(values))
    absent = Move(name="m", inputs=("x",), type=TensorType((2,), 0, 9, 1.0, 7), index=torch.tensor([-1, 5]))
    assert absent.run(values)[0].tolist() == [7, int(values[0].flatten()[5])]


def test_accumulator_beyond_32_bits_is_refused() -> None:
    weight, bias = torch.full((2, 70_000), 127), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UnsupportedModelError, match=r"layer 'wide'.*2\^31"):
        check_accumulator("wide", weight, bias, (0, 255))
    check_accumulator("narrow", weight, bias, (0, 15))
    with pytest.raises(UnsupportedModelError):
        check_accumulator("bias", weight[:, :1], torch.tensor([2**31, 0]), (0, 1))


def test_graph_refuses_disorder() -> None:
    start = Input(name="x", inputs=(), type=TensorType((1,)))
    with pytest.raises(ConfigError, match="two nodes"):
        IntegerGraph((start, start), {})
    with pytest.raises(ConfigError, match="begins with"):
        IntegerGraph((), {})
    with pytest.raises(ConfigError, match="no earlier node"):
        IntegerGraph((Input(name="x", inputs=("y",), type=TensorType((1,))),), {})
    with pytest.raises(ConfigError, match="input has shape"):
        IntegerGraph((start,), {}).run(torch.zeros(1, 2))
