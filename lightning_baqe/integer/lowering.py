"""Fake-quantized model to integer graph.

The graph is walked in order. Each tensor becomes the name of an IR node, with its type. An integer producer (layer,
sum, product, table, pooling) looks ahead through transparent operators for the quantizer that its output ends in and
requantizes onto that grid at once, ReLU being the lower end of the range; the quantizer itself then has nothing left to
do. Operators that only move elements are remembered as an index map and become a node where the value is read.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from lightning_baqe.errors import ConfigError, UnsupportedModelError
from lightning_baqe.integer import movement, operators
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.folding import fold, integer_weights, requant
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.shapes import padding_of, pair
from lightning_baqe.integer.values import Builder, Target, Value
from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.layers import QuantConv2d, QuantLinear
from lightning_baqe.quantization.ops import Op

ACCUMULATOR = (-(2**31), 2**31 - 1)


def lower(model: QuantizedModel, example_input: torch.Tensor | None = None) -> IntegerGraph:
    """The integer graph of a calibrated fake-quantized model; the model stays as it is.

    Args:
        model: what :func:`quantize` returned, calibrated or trained.
        example_input: a batch of any size, for its shape; None: the shape that ``quantize`` was given.

    Raises:
        CalibrationError: a quantizer has no scale yet.
        ConfigError: the input's shape is not known.
        UnsupportedModelError: an operator without integer meaning, or an accumulator beyond 32 bits.
    """
    return lower_with_sources(model, example_input)[0]


def lower_with_sources(
    model: QuantizedModel, example_input: torch.Tensor | None = None
) -> tuple[IntegerGraph, dict[str, str]]:
    """As :func:`lower`, and where each integer node's value stands in the fake-quantized network.

    Returns:
        the graph, and ``{node of model.graph whose output it is: integer node}`` for every quantizer's output.
    """
    if not isinstance(model, QuantizedModel):
        raise ConfigError(f"lower wants what lightning_baqe.quantize returned, got a {type(model).__name__}")
    for quantizer in model.quantizers().values():
        quantizer.require_initialized()
    shape = model.record.input_shape if example_input is None else tuple(example_input.shape[1:])
    if shape is None:
        raise ConfigError("the input's shape is not known: give example_input to lower or to quantize")
    frozen = copy.deepcopy(model).cpu().eval()
    build = Builder(frozen, shape)
    graph = _lower_all(build)
    kept = {node.name for node in graph}
    sources = {
        node.name: value.name
        for node, value in build.values.items()
        if build.reader[node].kind == "quantizer"
        and value.name in kept
        # Nothing but the shape changed since the integer node.
        and movement.is_reshape(value.index, value.type.shape)
    }
    return graph, sources


def _lower_all(build: Builder) -> IntegerGraph:
    for node, op in build.reader.ops.items():
        if op.kind in ("value", "constant"):
            continue
        if op.kind not in _OPERATORS or not (op.inputs or op.kind == "input"):
            raise build.refuse(
                node,
                "this operator has no integer meaning here; keep it out of the network or replace it. What lowers: "
                "convs, linears, batch norms, sums and products, concatenation of channels, ReLU and all pointwise "
                "functions of lightning_baqe.quantization.pointwise, max and average pooling, and what only moves "
                "elements",
            )
        build.values[node] = value = _OPERATORS[op.kind](build, node, op)
        if not isinstance(value.index, tuple) and value.shape != build.shape_of(node):
            raise build.refuse(node, f"lowered to shape {value.shape} instead of {build.shape_of(node)}; report this")
    return build.graph(value.name)  # the output stands last


def _input(build: Builder, node: fx.Node, op: Op) -> Value:
    if build.nodes:
        raise build.refuse(node, "a network has one input; give the others constant values")
    return build.emit(ir.Input, "input", [], ir.TensorType(build.shape_of(node)))


def _output(build: Builder, node: fx.Node, op: Op) -> Value:
    if not isinstance(node.args[0], fx.Node):
        raise build.refuse(node, "a network returns one tensor, not a collection; wrap it to return its logits")
    return build.in_place(build.as_float(build.source(op)), node)


def _as_it_is(build: Builder, node: fx.Node, op: Op) -> Value:
    return build.source(op)


def _move(build: Builder, node: fx.Node, op: Op) -> Value:
    value = build.source(op)
    index = movement.start(value.type.shape) if value.index is None else value.index
    return replace(value, index=movement.move(node, op.inputs[0], index, build.model, build.python.values))


def _quantizer(build: Builder, node: fx.Node, op: Op) -> Value:
    grid, value = op.module, build.source(op)
    assert isinstance(grid, ActivationQuantizer)
    if value.grid is grid:
        return value
    target = Target(grid)
    if value.grid is not None:
        return build.requantize(value, target, f"{value.name}.quantize_{grid.bits}bit")
    kind, factor = target.type(value.type.shape), target.inverse_scale
    return build.emit(ir.Quantize, f"{value.name}.quantize", [value], kind, grid, value.index, inverse_scale=factor)


def _layer(build: Builder, node: fx.Node, op: Op) -> Value:
    layer, path, value = op.module, str(node.target), build.source(op)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    last, norm = node, None
    following = build.reader.consumers[node]
    if len(following) == 1 and build.reader[following[0]].kind == "batch_norm":
        last, norm = following[0], build.reader[following[0]].module
    gain, shift = fold(layer, norm, path)
    value = value if isinstance(layer, QuantConv2d | QuantLinear) else build.as_float(value)
    conv: dict[str, Any] = {}
    if isinstance(layer, nn.Conv2d):
        value, conv = _convolution(layer, path, value)
    value = build.in_place(value, node)
    if isinstance(layer, nn.Linear) and len(value.type.shape) != 1:
        raise build.refuse(node, f"a linear layer on values of shape {value.type.shape}; flatten them first")
    if not isinstance(layer, QuantConv2d | QuantLinear):
        build.bits[path] = (32, 32)
        by_channel = gain.reshape(-1, *[1] * (layer.weight.ndim - 1))
        return build.emit(
            ir.FloatConv if conv else ir.FloatLinear,
            path,
            [value],
            ir.TensorType(build.shape_of(last)),
            layer=path,
            weight=(layer.weight.detach().double() * by_channel).float(),
            bias=shift.float(),
            relu=operators.fuse_relu(build, last),
            **conv,
        )
    assert value.grid is not None, "quantize puts a quantizer before each integer layer"
    weight, bias, remainder, scale = integer_weights(layer, gain, shift, value.type)
    target, shape = build.target(last), build.shape_of(last)
    build.bits[path] = (layer.weight_quantizer.bits, value.grid.bits)
    factors = fraction = None
    if target is not None:
        factors = requant(scale / target.scale, path)
        fraction = torch.round(remainder * factors.multiplier.double()).to(torch.int64)
    if conv:
        conv["pad_value"] = value.type.zero_point
    made = build.emit(
        ir.Conv if conv else ir.Linear,
        path,
        [value],
        ir.TensorType(shape, *ACCUMULATOR, scale=0.0) if target is None else target.type(shape),
        None if target is None else target.grid,
        layer=path,
        weight=weight,
        weight_bits=layer.weight_quantizer.bits,
        activation_bits=value.grid.bits,
        bias=bias,
        input_range=value.type.limits,
        requant=factors,
        fraction=fraction,
        **conv,
    )
    return made if target is not None else replace(made, scale=scale)


def _convolution(layer: nn.Conv2d, path: str, value: Value) -> tuple[Value, dict[str, Any]]:
    """What a convolution reads and its options; zeros around the input become part of its own padding."""
    if layer.padding_mode != "zeros":
        raise UnsupportedModelError(f"layer {path!r}: padding_mode must be 'zeros', got {layer.padding_mode!r}")
    padding, around = padding_of(layer), movement.padding(value.index, value.type.shape)
    if around is not None:
        value, padding = replace(value, index=None), tuple(map(operator.add, padding, around))
    options = {"stride": pair(layer.stride), "dilation": pair(layer.dilation), "groups": layer.groups}
    return value, {"padding": padding, **options}


_OPERATORS: dict[str, Callable[[Builder, fx.Node, Op], Value]] = {
    "input": _input,
    "output": _output,
    "layer": _layer,
    "quantizer": _quantizer,
    "movement": _move,
    "dropout": _as_it_is,
    "identity": _as_it_is,
    "add": operators.add,
    "mul": operators.mul,
    "concat": operators.concat,
    "function": operators.function,
    "batch_norm": operators.batch_norm,
    "affine": operators.constant_affine,
    "relu": operators.relu,
    "relu6": operators.relu,
    "max_pool": operators.max_pool,
    "adaptive_max_pool": operators.max_pool,
    "avg_pool": operators.avg_pool,
    "adaptive_avg_pool": operators.avg_pool,
    "mean": operators.avg_pool,
}
