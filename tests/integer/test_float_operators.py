"""Float operators of the integer graph: shapes, what may be called, arguments, files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import Maker, images

from lightning_baqe.errors import ConfigError, DataError, UnsupportedModelError
from lightning_baqe.integer.float_operators import FloatOperator, canonical_shape, encode_arguments, find_operator
from lightning_baqe.integer.graph import IntegerGraph, node_bytes
from lightning_baqe.integer.nodes import TensorType
from lightning_baqe.integer.serialize import graph_from_parts, graph_to_parts
from lightning_baqe.onnx.export import export_onnx


def sample() -> IntegerGraph:
    maker = Maker(6, 4)
    real = maker.dequantize("x")
    tokens = maker.operator("flatten.using_ints", [real], "%0", 2)
    norm = {"w": maker.floats(16), "b": maker.floats(16)}
    normed = maker.operator("layer_norm.default", [tokens], "%0", [16], "@w", "@b", 1e-5, constants=norm)
    mask = {"mask": maker.floats(6, 16) > 1}
    masked = maker.operator("masked_fill.Scalar", [normed], "%0", "@mask", float("-inf"), constants=mask)
    soft = maker.operator("softmax.int", [masked], "%0", -1)
    some = maker.operator("index_select.default", [soft], "%0", 1, "@i", constants={"i": torch.tensor([4, 0, 0])})
    both = maker.operator("bmm.default", [some, normed], "%0", "%1", shapes=[(1, 3, 16), (1, 16, 6)])
    maker.operator("cat.default", [both, both], ["%0", "%1"], 2)
    return maker.graph()


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=6).map(tuple))
def test_canonical_shapes_hold_the_same_elements(shape: tuple[int, ...]) -> None:
    found = canonical_shape(shape)
    assert math.prod(found) == math.prod(shape)
    assert len(found) in (1, 3)
    assert canonical_shape((1, *found)) == found  # one image of the graph's own shapes is itself


def test_canonical_shapes() -> None:
    assert canonical_shape((1, 196, 192)) == (196, 1, 192)
    assert canonical_shape((64, 49, 96)) == (64, 49, 96)
    assert canonical_shape((1, 3, 49, 64)) == (3, 49, 64)
    assert canonical_shape((1, 64, 3, 49, 49)) == (192, 49, 49)
    assert canonical_shape((1, 10)) == (10,)
    assert canonical_shape((1,)) == (1,)
    assert canonical_shape((1, 1, 5)) == (1, 1, 5)


@pytest.mark.parametrize(
    "name",
    [
        "relu_.default", "add_.Tensor", "add.out", "rand_like.default", "bernoulli.p", "dropout.default",
        "from_file.default",
        "empty_like.default", "new_empty.default", "as_strided.default", "item.default", "topk.default",
        "arange.default",
        "no_such.default", "softmax.no_such", "__class__.default", "_cudnn_rnn.default", "layer_norm", "set_.default",
        "resize.default", "numpy.T",
    ],
)  # fmt: skip
def test_only_functions_of_tensors_are_called(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=name.replace(".", r"\.")):
        find_operator(name)


def test_every_node_is_its_operator() -> None:
    graph, x = sample(), None
    x = images(graph, 2)
    values = graph.run_all(x)
    for index in range(2):
        real = values["dequantize2"][index : index + 1]
        tokens = real.flatten(2)
        norm = graph["layer_norm4"]
        assert isinstance(norm, FloatOperator)
        normed = torch.nn.functional.layer_norm(tokens, [16], norm.constants["w"], norm.constants["b"])
        mask = graph["masked_fill5"]
        assert isinstance(mask, FloatOperator)
        soft = normed.masked_fill(mask.constants["mask"], float("-inf")).softmax(-1)
        both = torch.bmm(soft[:, [4, 0, 0]], normed.reshape(1, 16, 6))
        want = torch.cat([both, both], 2)
        assert torch.equal(values[graph.output.name][index].reshape(want.shape), want)
    assert graph.run(x[:0]).shape == (0, 3, 1, 12)
    assert not graph.is_integer_only


def test_size_and_products() -> None:
    graph = sample()
    assert graph.macs == 3 * 16 * 6
    assert graph.bops == 1024 * graph.macs
    assert [node_bytes(node) for node in graph if isinstance(node, FloatOperator)] == [0, 128, 96, 0, 24, 0, 0]


def test_files_keep_every_number() -> None:
    graph = sample()
    description, arrays = graph_to_parts(graph)
    again = graph_from_parts(json.loads(json.dumps(description)), arrays)
    x = images(graph, 2)
    assert torch.equal(again.run(x), graph.run(x))
    for node, other in zip(graph, again, strict=True):
        if isinstance(node, FloatOperator):
            assert isinstance(other, FloatOperator)
            assert (node.arguments, node.shapes, node.shape) == (other.arguments, other.shapes, other.shape)
            assert all(torch.equal(value, other.constants[key]) for key, value in node.constants.items())
            assert all(value.dtype == other.constants[key].dtype for key, value in node.constants.items())


@pytest.mark.parametrize("name", ["relu_.default", "from_file.default"])
def test_a_file_calls_nothing_else(name: str) -> None:
    description, arrays = graph_to_parts(sample())
    description["nodes"][3]["operator"] = name
    with pytest.raises(DataError, match=name):
        graph_from_parts(description, arrays)


def test_arguments_in_the_schemas_order() -> None:
    given_by_name = {"bias": "@b", "normalized_shape": [4], "input": "%0"}
    assert encode_arguments("layer_norm.default", (), given_by_name) == ("%0", (4,), None, "@b", 1e-5, True)
    assert encode_arguments("to.dtype", ["%0", torch.float32], {}) == ("%0", "torch.float32", False, False, None)
    with pytest.raises(UnsupportedModelError, match="lacks its argument 'dim'"):
        encode_arguments("softmax.int", ["%0"], {})
    with pytest.raises(UnsupportedModelError, match="4 arguments"):
        encode_arguments("softmax.int", ["%0", 1, None, 2], {})
    with pytest.raises(UnsupportedModelError, match="of type Tensor"):
        encode_arguments("softmax.int", [torch.zeros(1), 1], {})
    assert encode_arguments("relu.default", [torch.zeros(1)], {}, lambda leaf: "%0") == ("%0",)


def operator(**changes: object) -> FloatOperator:
    fields: dict[str, object] = {
        "name": "soft", "inputs": ("a",), "type": TensorType((3, 1, 4)), "operator": "softmax.int",
        "arguments": ("%0", -1, None), "constants": {}, "shapes": ((1, 3, 4),), "shape": (1, 3, 4),
    }  # fmt: skip
    return FloatOperator(**(fields | changes))  # type: ignore[arg-type]


def test_fields_that_do_not_fit_are_refused() -> None:
    assert operator().run(torch.zeros(2, 3, 1, 4)).tolist() == torch.full((2, 3, 1, 4), 0.25).tolist()
    refused: list[tuple[dict[str, object], str]] = [
        ({"arguments": ("%0", -1)}, "2 arguments"),
        ({"arguments": ("%1", -1, None)}, "refer to"),
        ({"constants": {"c": torch.zeros(1)}}, "refer to"),
        ({"shapes": ()}, "0 shapes"),
        ({"type": TensorType((3, 4, 1))}, "its type is"),
        ({"type": TensorType((3, 1, 4), 0, 255)}, "its type is"),
        ({"arguments": ("%0", -1, "torch.load")}, "no type, memory format"),
    ]
    for changes, why in refused:
        with pytest.raises(UnsupportedModelError, match=why):
            operator(**changes)
    with pytest.raises(UnsupportedModelError, match="wanted is float32"):
        operator(shape=(1, 4, 3), type=TensorType((4, 1, 3))).run(torch.zeros(1, 3, 1, 4))
    with pytest.raises(UnsupportedModelError, match="at random"):
        Maker(4, 4).operator("scaled_dot_product_attention.default", ["input"] * 3, "%0", "%1", "%2", None, 0.1)


def test_indices_count_from_the_front_and_lie_inside() -> None:
    for index, why in (([0, -1], "negative indices"), ([0, 3], "cannot run")):
        with pytest.raises(UnsupportedModelError, match=why):
            operator(
                operator="index_select.default", arguments=("%0", 1, "@i"), constants={"i": torch.tensor(index)},
                shape=(1, 2, 4), type=TensorType((2, 1, 4)),
            )  # fmt: skip


def test_operators_read_floats_of_their_shape() -> None:
    maker = Maker(3, 4)
    maker.nodes.append(operator(inputs=("x",), shapes=((1, 3, 4, 4),), shape=(1, 3, 4, 4), type=TensorType((3, 4, 4))))
    with pytest.raises(ConfigError, match="wants floats"):
        maker.graph()
    maker = Maker(3, 4)
    maker.nodes.append(operator(inputs=("input",)))
    with pytest.raises(ConfigError, match=r"wants \(1, 3, 4\)"):
        maker.graph()


def test_onnx_refuses_them_by_name(tmp_path: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"aten::flatten\.using_ints"):
        export_onnx(sample(), f"{tmp_path}/model.onnx")
