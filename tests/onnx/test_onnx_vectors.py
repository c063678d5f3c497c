"""ONNX's own test vectors of its quantized operators through ours.

The onnx package makes the vectors of its backend tests when they are asked for. Each node is translated as lowering
does it: zero points of inputs go into the bias, those of weights into the weights, which become integers of 9 bits
where they are asymmetric; the real factor becomes a dyadic one. A product of stacks of matrices is one Linear for each,
scales by axis or block are one Quantize or Dequantize for each.

All outputs are equal, although ONNX rounds requantized halves to even and we round them up: no requantized value of
these vectors is a tie (asserted). Where Quantize meets one, both round to even.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from small_graphs import compiled

from lightning_baqe.hardware.target import get_target
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.dyadic import Dyadic
from lightning_baqe.integer.graph import IntegerGraph

OPERATORS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QuantizeLinear", "DequantizeLinear")
INT32 = (-(2**31), 2**31 - 1)

EXPRESSED = (
    "test_qlinearconv",
    *(
        f"test_qlinearmatmul_{rank}_{kind}_{scale}"
        for rank, kind, scale in itertools.product(("2D", "3D"), ("uint8", "int8"), ("float32", "float16"))
    ),
    "test_convinteger_without_padding",
    "test_convinteger_with_padding",
    "test_matmulinteger",
    *(
        f"test_quantizelinear{kind}"
        for kind in ("", "_axis", "_uint16", "_int16", "_uint4", "_int4", "_uint2", "_int2", "_blocked_asymmetric",
                     "_blocked_symmetric")
    ),
    *(
        f"test_dequantizelinear{kind}"
        for kind in ("", "_axis", "_uint16", "_int16", "_uint4", "_int4", "_uint2", "_int2", "_blocked")
    ),
)  # fmt: skip
NOT_INTEGER = "its quantized values are floats of 4 or 8 bits, not integers on a grid"
LEFT_OUT = {
    f"test_{operator}linear_{kind}": NOT_INTEGER
    for operator, kinds in {
        "quantize": ("e4m3fn", "e5m2", "float4e2m1"),
        "dequantize": ("e4m3fn", "e4m3fn_float16", "e4m3fn_zero_point", "e5m2", "float4e2m1"),
    }.items()
    for kind in kinds
}
# int8 weights, uint8 values, one scale for all: what our kernels take. The weights of all vectors of QLinearConv and
# QLinearMatMul have 9 bits without their zero points.
COMPILED = (
    "test_convinteger_without_padding",
    "test_convinteger_with_padding",
    "test_matmulinteger",
    "test_quantizelinear",
    "test_quantizelinear_uint4",
    "test_quantizelinear_uint2",
    "test_quantizelinear_axis",
    "test_quantizelinear_blocked_asymmetric",
    "test_dequantizelinear",
    "test_dequantizelinear_axis",
    "test_dequantizelinear_uint4",
    "test_dequantizelinear_uint2",
    "test_dequantizelinear_blocked",
)


@dataclass(frozen=True, eq=False)
class Vector:
    """One vector.

    Args:
        operator: its ONNX name.
        inputs: by the operator's own names, as arrays of integers or floats.
        attributes: of the node.
        output: what is wanted.
        limits: range of the output's integers, None of floats.
    """

    operator: str
    inputs: dict[str, np.ndarray]
    attributes: dict[str, Any]
    output: np.ndarray
    limits: tuple[int, int] | None


@functools.cache
def cases() -> dict[str, Any]:
    """The cases of our operators by name."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy, of overflows that other operators' vectors mean
        found = load_model_tests(kind="node")
    return {c.name: c for c in found if len(c.model.graph.node) == 1 and c.model.graph.node[0].op_type in OPERATORS}


def load(name: str) -> Vector:
    case = cases()[name]
    node = case.model.graph.node[0]
    inputs, outputs = case.data_sets[0]
    schema = onnx.defs.get_schema(node.op_type)
    arrays = iter([_array(value) for value in inputs])
    named = {schema.inputs[i].name: next(arrays) for i, given in enumerate(node.input) if given}
    kind = outputs[0].data_type if isinstance(outputs[0], onnx.TensorProto) else None
    output = _array(outputs[0])
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind) if kind is not None else output.dtype
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return Vector(node.op_type, named, attributes, _wide(output), _limits(dtype))


def _array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _limits(dtype: Any) -> tuple[int, int] | None:
    from ml_dtypes import iinfo

    return None if dtype.kind == "f" else (int(iinfo(dtype).min), int(iinfo(dtype).max))


def _wide(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.kind == "f" else array.astype(np.int64)


def integers(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))


def quotient(*scales: np.ndarray) -> torch.Tensor:
    """``s_a * s_b / s_y`` in float64, ``()`` or ``(channels,)``."""
    a, b, y = (torch.from_numpy(np.asarray(scale, np.float64)).squeeze() for scale in scales)
    return a * b / y


def assert_no_ties(accumulators: torch.Tensor, factor: torch.Tensor) -> None:
    exact = accumulators.double() * factor
    assert ((exact - torch.floor(exact) - 0.5).abs() > 1e-9).all()


def conv(vector: Vector) -> tuple[ir.Conv, torch.Tensor]:
    """A convolution and its input."""
    given = vector.inputs
    x, w = integers(given["x"]), integers(given["w"])
    x_zero = int(given.get("x_zero_point", np.array(0)))
    w_zero = integers(given.get("w_zero_point", np.zeros(1)))
    weight = w - w_zero.reshape(-1, 1, 1, 1)
    pads = vector.attributes.get("pads", [0, 0, 0, 0])
    limits, requant, zero = INT32, None, 0
    if vector.operator == "QLinearConv":
        assert vector.limits is not None
        limits, zero = vector.limits, int(given["y_zero_point"])
        factor = quotient(given["x_scale"], given["w_scale"], given["y_scale"]).expand(len(weight))
        requant = Dyadic.from_real(factor)
    kind = ir.TensorType(tuple(vector.output.shape[1:]), *limits, 1.0, zero)
    node = ir.Conv(
        name="node", inputs=("x",), type=kind, layer="node", weight=weight, weight_bits=9, activation_bits=8,
        bias=-x_zero * weight.flatten(1).sum(1), stride=tuple(vector.attributes.get("strides", [1, 1])),
        padding=(pads[0], pads[2], pads[1], pads[3]), dilation=tuple(vector.attributes.get("dilations", [1, 1])),
        groups=vector.attributes.get("group", 1), pad_value=x_zero, input_range=(0, 255), requant=requant,
    )  # fmt: skip
    return node, x


def products(vector: Vector) -> Iterator[tuple[ir.Linear, torch.Tensor, np.ndarray]]:
    """One matrix product for each pair of matrices, with its input and what is wanted."""
    a_name, b_name = ("a", "b") if vector.operator == "QLinearMatMul" else ("A", "B")
    given = vector.inputs
    a, b = integers(given[a_name]), integers(given[b_name])
    a_zero, b_zero = (int(given[f"{name}_zero_point"].squeeze()) for name in "ab")
    limits, requant, zero = INT32, None, 0
    if vector.operator == "QLinearMatMul":
        assert vector.limits is not None
        limits, zero = vector.limits, int(given["y_zero_point"].squeeze())
        requant = Dyadic.from_real(quotient(given["a_scale"], given["b_scale"], given["y_scale"]))
    for index in np.ndindex(tuple(a.shape[:-2])):
        weight = (b[index] - b_zero).T.contiguous()
        node = ir.Linear(
            name="node", inputs=("x",), type=ir.TensorType((len(weight),), *limits, 1.0, zero), layer="node",
            weight=weight, weight_bits=9, activation_bits=8, bias=-a_zero * weight.sum(1), input_range=(-128, 255),
            requant=requant,
        )  # fmt: skip
        yield node, a[index], vector.output[index]


def grids(vector: Vector) -> Iterator[tuple[np.ndarray, np.float32, int]]:
    """Each ``(scale, zero point)`` with the mask of the elements that have it."""
    name = "y" if vector.operator == "QuantizeLinear" else "x"
    x, scale = vector.inputs["x"], vector.inputs[f"{name}_scale"]
    zero = _wide(vector.inputs.get(f"{name}_zero_point", np.zeros_like(scale, np.int64)))
    axis, block = vector.attributes.get("axis", 1), vector.attributes.get("block_size", 0)
    if block:
        scale, zero = (np.repeat(values, block, axis) for values in (scale, zero))
    elif scale.size > 1:
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    scale, zero = np.broadcast_to(scale, x.shape), np.broadcast_to(zero, x.shape)
    for s, z in sorted({(float(s), int(z)) for s, z in zip(scale.flat, zero.flat, strict=True)}):
        yield (scale == np.float32(s)) & (zero == z), np.float32(s), z


def quantizer(vector: Vector, scale: np.float32, zero: int, count: int) -> ir.Quantize:
    assert vector.limits is not None
    kind = ir.TensorType((count, 1, 1), *vector.limits, float(scale), zero)
    return ir.Quantize(name="node", inputs=("image",), type=kind, inverse_scale=float(np.float32(1) / scale))


def dequantizer(scale: np.float32, zero: int, count: int) -> ir.Dequantize:
    kind = ir.TensorType((count, 1, 1))
    return ir.Dequantize(name="node", inputs=("x",), type=kind, scale=torch.tensor(scale), zero_point=zero)


@pytest.mark.parametrize("name", EXPRESSED)
def test_vector(name: str) -> None:
    vector = load(name)
    if vector.operator in ("QLinearConv", "ConvInteger"):
        node, x = conv(vector)
        np.testing.assert_array_equal(node.run(x), vector.output)
        if node.requant is not None:
            assert_no_ties(replace(node, requant=None).run(x), node.requant.real().reshape(1, -1, 1, 1))
    elif vector.operator in ("QLinearMatMul", "MatMulInteger"):
        for product, x, wanted in products(vector):
            np.testing.assert_array_equal(product.run(x), wanted)
            if product.requant is not None:
                assert_no_ties(replace(product, requant=None).run(x), product.requant.real())
    else:
        seen = 0
        for mask, scale, zero in grids(vector):
            x, count = vector.inputs["x"][mask], int(mask.sum())
            made: ir.Node
            if vector.operator == "QuantizeLinear":
                made, values = quantizer(vector, scale, zero, count), torch.from_numpy(x.astype(np.float32))
            else:
                made, values = dequantizer(scale, zero, count), integers(x)
            np.testing.assert_array_equal(made.run(values.reshape(1, -1, 1, 1)).flatten(), vector.output[mask])
            seen += count
        assert seen == vector.output.size


def run_compiled(image: torch.Tensor, *nodes: ir.Node) -> torch.Tensor:
    """Images through compiled code, one after the other; float images that hold integers reach ``x`` as these."""
    kind = ir.TensorType(tuple(image.shape[1:]))
    start: list[ir.Node] = [ir.Input(name="image", inputs=(), type=kind)]
    if nodes[0].inputs == ("x",):
        grid = ir.TensorType(kind.shape, 0, 255, 1.0, 0)
        start.append(ir.Quantize(name="x", inputs=("image",), type=grid, inverse_scale=1.0))
    graph = IntegerGraph((*start, *nodes), {})
    artifact = compiled(graph, get_target())
    outs = [artifact.run(one[None]) for one in image.to(torch.float32)]
    assert torch.equal(torch.cat(outs), graph.run(image.to(torch.float32)))
    return torch.cat(outs)


def as_they_are(node: ir.Node) -> ir.Dequantize:
    """The integers of a node as floats."""
    kind = ir.TensorType(node.type.shape)
    return ir.Dequantize(name="out", inputs=(node.name,), type=kind, scale=torch.tensor(1.0), zero_point=0)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_vector(name: str) -> None:
    vector = load(name)
    if vector.operator == "ConvInteger":
        layer, x = conv(vector)
        np.testing.assert_array_equal(run_compiled(x, layer, as_they_are(layer)), vector.output)
        return
    if vector.operator == "MatMulInteger":
        ((product, x, wanted),) = products(vector)
        flat = ir.Flatten(name="flat", inputs=("x",), type=ir.TensorType((x.shape[1],), 0, 255, 1.0, 0))
        node = replace(product, inputs=("flat",))
        np.testing.assert_array_equal(run_compiled(x[:, :, None, None], flat, node, as_they_are(node)), wanted)
        return
    for mask, scale, zero in grids(vector):
        x, count = vector.inputs["x"][mask].astype(np.float32), int(mask.sum())
        image = torch.from_numpy(x).reshape(1, -1, 1, 1)
        if vector.operator == "QuantizeLinear":
            quantize = quantizer(vector, scale, zero, count)
            out = run_compiled(image, quantize, as_they_are(quantize))
        else:
            out = run_compiled(image, dequantizer(scale, zero, count))
        np.testing.assert_array_equal(out.flatten(), vector.output[mask])


def test_no_vector_is_missing() -> None:
    assert set(cases()) == {*EXPRESSED, *LEFT_OUT}
    assert not set(EXPRESSED) & set(LEFT_OUT)
    assert set(COMPILED) <= set(EXPRESSED)
    for name in LEFT_OUT:
        values = [_array(value) for value in itertools.chain(*cases()[name].data_sets[0])]
        assert any(str(value.dtype).startswith(("float4", "float8")) for value in values), name
