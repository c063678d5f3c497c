"""Graphs that are not what they say are refused by the node's name, before anything is compiled or run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from quantization.small_networks import images, settled

import lightning_baqe as baqe
from lightning_baqe.errors import BaqeError, ConfigError
from lightning_baqe.integer.dyadic import Dyadic
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.nodes import (
    Add,
    AvgPool,
    Concat,
    Conv,
    Dequantize,
    FloatLinear,
    Gather,
    Input,
    MaxPool,
    Mul,
    Node,
    Quantize,
    Requantize,
    Table,
    TensorType,
)
from lightning_baqe.integer.proof import prove


@pytest.fixture(scope="module")
def graph() -> IntegerGraph:
    network = settled("residual")
    bits = baqe.BitConfig.uniform(network, 4, 8).replace({"fc": baqe.LayerBits(32, 32)})
    return baqe.lower(baqe.calibrate(baqe.quantize(network, bits, images()), [images()]))


def first(graph: IntegerGraph, kind: type[Node]) -> Any:
    found = next((node for node in graph if isinstance(node, kind)), None)
    if found is None:
        pytest.skip(f"the network has no {kind.__name__}")
    return found


def with_change(graph: IntegerGraph, node: Node, **changes: Any) -> IntegerGraph:
    nodes = [dataclasses.replace(n, **changes) if n is node else n for n in graph.nodes]
    return IntegerGraph(tuple(nodes), graph.bits, graph.returned)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (Conv, {"stride": (0, 1)}, "stride"),
        (Conv, {"stride": (2, 1)}, "its type has the shape"),
        (Conv, {"padding": (-1, 1, 1, 1)}, "padding"),
        (Conv, {"padding": (2**20, 2**20, 2**20, 2**20), "stride": (2**21, 2**21)}, "too large"),
        (Conv, {"dilation": (9, 9)}, "larger than the padded image"),
        (Conv, {"groups": 0}, "in 0 groups"),
        (Conv, {"pad_value": 10**6}, "pads with 1000000"),
        (Conv, {"input_range": (0, 1)}, "it was made for values 0..1"),
        (Conv, {"weight_bits": 2}, "have not 2 bits"),
        (Conv, {"bias": torch.zeros(1, dtype=torch.int64)}, "bias"),
        (Conv, {"requant": Dyadic(torch.ones(2, dtype=torch.int64), 4)}, "requant has the shape"),
        (Conv, {"requant": None}, "accumulators are of 32 bits|nothing that it is a fraction of"),
        (Quantize, {"inverse_scale": float("nan")}, "finite"),
        (Quantize, {"inverse_scale": -1.0}, "above 0"),
        (Dequantize, {"scale": torch.tensor(float("inf"))}, "not finite"),
        (Dequantize, {"scale": torch.ones(3)}, "one for all or for each"),
        (FloatLinear, {"weight": torch.full((10, 16), float("nan"))}, "weight"),
        (Add, {"shift": 63}, "its shift is 63"),
        (Add, {"multipliers": (2**40, 1)}, r"below 2\^31"),
        (Add, {"offset": 2**63 - 1}, r"below 2\^63"),
        (AvgPool, {"rows": torch.tensor([[0, 50_000_000]])}, "lies outside"),
        (AvgPool, {"columns": torch.tensor([[2, 2]])}, "lies outside"),
        (Input, {"given": (7,)}, "which is not of"),
        (Input, {"parts": ((3,), (4,))}, "which are not of"),
    ],
)
def test_a_node_that_is_changed(graph: IntegerGraph, kind: type[Node], change: dict[str, Any], said: str) -> None:
    node = first(graph, kind)
    with pytest.raises(BaqeError, match=said) as caught:
        with_change(graph, node, **change)
    assert repr(node.name) in str(caught.value) or getattr(node, "layer", node.name) in str(caught.value)


INTEGERS = TensorType((8, 4, 4), 0, 15)


def made(cls: type[Node], shape: tuple[int, ...], low: int | None = 0, high: int | None = 15, **fields: Any) -> Any:
    inputs = fields.pop("inputs", ("a",))
    return cls(name="n", inputs=inputs, type=TensorType(shape, low, high), **fields)  # type: ignore[call-arg]


def index(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


ONE = Dyadic(torch.tensor(1), 1)


@pytest.mark.parametrize(
    ("node", "kinds", "said"),
    [
        # What was found from outside: reads and writes outside of memory.
        (
            made(Gather, (1, 4, 4), channels=index(50_000_000), rows=None, columns=None),
            [INTEGERS],
            r"take 50000000\.\.50000000 of 0\.\.7",
        ),
        (made(Gather, (8, 4, 4), channels=None, rows=index(0, 1, -2, 3), columns=None), [INTEGERS], r"-2\.\.3"),
        (
            made(Concat, (8, 4, 4), inputs=("a", "b")),
            [INTEGERS, TensorType((2000, 4, 4), 0, 15)],
            r"gives \(2008, 4, 4\)",
        ),
        (made(Concat, (16, 4, 4), inputs=("a", "b")), [INTEGERS, TensorType((8, 4, 4), 0, 255)], "does not hold"),
        (made(Concat, (8, 4, 4), inputs=()), [], "reads nothing"),
        (made(Concat, (16, 4, 4), inputs=("a", "b")), [INTEGERS, TensorType((8, 4, 5), 0, 15)], "other sizes differ"),
        (
            made(Table, (8, 4, 4), table=index(*range(8)), input_low=0, steps=()),
            [INTEGERS],
            "not one for each of 0..15",
        ),
        (made(Table, (8, 4, 4), table=index(*range(16)), input_low=-5, steps=()), [INTEGERS], "from -5 on"),
        (
            made(Table, (8, 4, 4), 0, 3, table=index(*range(16)), input_low=0, steps=()),
            [INTEGERS],
            r"all within \(0, 3\)",
        ),
        (
            made(Table, (8, 4, 4), table=index(*range(16)), input_low=0, steps=(("no_such", "%0"),)),
            [INTEGERS],
            "cannot be computed",
        ),
        (
            made(Mul, (8, 4, 4), requant=ONE, input_zero_points=(0, -(2**40)), inputs=("a", "b")),
            [INTEGERS] * 2,
            "product",
        ),
        (made(Requantize, (8, 4, 4), requant=ONE, input_zero_point=2**40), [INTEGERS], "leave 32 bits"),
        (made(Requantize, (8, 4, 4), 15, 0, requant=ONE, input_zero_point=0), [INTEGERS], "is none of 32-bit"),
        (made(Requantize, (8, 4, 4), None, None, requant=ONE, input_zero_point=0), [INTEGERS], "it gives integers"),
        (made(Requantize, (8, 4, 4), requant=ONE, input_zero_point=0), [TensorType((8, 4, 4))], "wants integers"),
        (made(Requantize, (8, 4, 4), requant=ONE, input_zero_point=0), [INTEGERS] * 2, "wanted are 1"),
        (made(Requantize, (0, 4, 4), requant=ONE, input_zero_point=0), [INTEGERS], "1 or more of each"),
        (made(Requantize, (2**16, 2**16, 1), requant=ONE, input_zero_point=0), [INTEGERS], "too many"),
        (
            made(MaxPool, (8, 2, 2), kernel=(3, 3), stride=(2, 2), padding=(2, 2), dilation=(1, 1), ceil_mode=False),
            [INTEGERS],
            "more than half",
        ),
    ],
)
def test_a_node_that_is_made_up(node: Node, kinds: list[TensorType], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        prove(node, kinds)
    assert "'n'" in str(caught.value)


def test_the_returned_shape(graph: IntegerGraph) -> None:
    with pytest.raises(ConfigError, match="cannot be returned as"):
        IntegerGraph(graph.nodes, graph.bits, (3, 3))


def test_pooling_has_torchs_shapes() -> None:
    """Against torch itself, over many windows."""
    random = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    tried = 0
    while tried < 200:
        height, width, kernel, stride, dilation = draw(3, 12), draw(3, 12), draw(1, 5), draw(1, 4), draw(1, 3)
        padding, ceil = draw(0, kernel // 2 + 1), bool(draw(0, 2))
        value = torch.zeros(1, 2, height, width)
        try:
            shape = torch.nn.functional.max_pool2d(value, kernel, stride, padding, dilation, ceil).shape[1:]
        except RuntimeError:
            continue
        tried += 1
        window = {
            "kernel": (kernel,) * 2,
            "stride": (stride,) * 2,
            "padding": (padding,) * 2,
            "dilation": (dilation,) * 2,
        }
        node = made(MaxPool, tuple(shape), ceil_mode=ceil, **window)
        prove(node, [TensorType((2, height, width), 0, 15)])
