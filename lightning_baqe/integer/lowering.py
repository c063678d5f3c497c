"""Fake-quantized model to integer graph.

The graph is walked in order. Each tensor becomes the name of an IR node, with its type. An integer producer (layer,
sum, product, table, pooling) looks ahead through transparent operators for the quantizer that its output ends in and
requantizes onto that grid at once, ReLU being the lower end of the range; the quantizer itself then has nothing left to
do. Operators that only move elements are remembered as an index map and become a node where the value is read.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lightning_baqe.errors import ConfigError, UnsupportedModelError
from lightning_baqe.integer import movement, operators
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.fallback import float_operator
from lightning_baqe.integer.folding import integer_weights, requant
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.shapes import padding_of, pair
from lightning_baqe.integer.values import Builder, Target, Value, named
from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.aten import LAYERS, name_of, origin
from lightning_baqe.quantization.config import LAYER_TYPES
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.layers import QuantLayer, outputs_first
from lightning_baqe.quantization.ops import Op, OpReader
from lightning_baqe.quantization.weight import WeightQuantizer

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
    model: QuantizedModel, example_input: torch.Tensor | tuple[torch.Tensor, ...] | None = None
) -> tuple[IntegerGraph, dict[str, str]]:
    """As :func:`lower`, and where each integer node's value stands in the fake-quantized network.

    Returns:
        the graph, and ``{node of model.graph whose output it is: integer node}`` for every quantizer's output.
    """
    lowered = lower_all(model, example_input)
    graph, values = lowered.graph, lowered.values
    reader = OpReader(model, model.graph)
    kept = {node.name for node in graph}
    kinds = {node.name: op.kind for node, op in reader.ops.items()}
    sources = {
        name: value.name
        for name, value in values.items()
        if kinds[name] == "quantizer"
        and value.name in kept
        # Nothing but the shape changed since the integer node.
        and movement.is_reshape(value.index, value.type.shape)
    }
    return graph, sources


@dataclass(frozen=True)
class Lowered:
    """A graph, and what became of each node of the fake-quantized network, by its name.

    Args:
        graph: where an operator is refused, it computes something else than the network.
        values: what stands for the nodes.
        floats: nodes that have no integer meaning and stay float, with the reason.
        refused: nodes that do not lower, with the reason; zeros stand for their results.
    """

    graph: IntegerGraph
    values: Mapping[str, Value]
    floats: Mapping[str, str]
    refused: Mapping[str, str]


def lower_all(
    model: QuantizedModel,
    example_input: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    collect: bool = False,
) -> Lowered:
    """As :func:`lower`, with what became of each node.

    Args:
        model, example_input: as for :func:`lower`.
        collect: go on after an operator that does not lower, to find all of them; else it is raised.
    """
    if not isinstance(model, QuantizedModel):
        raise ConfigError(f"lower wants what lightning_baqe.quantize returned, got a {type(model).__name__}")
    for quantizer in model.quantizers().values():
        quantizer.require_initialized()
    shapes = model.record.input_shapes
    if example_input is not None:
        given = (example_input,) if isinstance(example_input, torch.Tensor) else example_input
        shapes = tuple(tuple(x.shape[1:]) for x in given)
    build = Builder(copy.deepcopy(model).cpu().eval(), shapes)
    floats: dict[str, str] = {}
    refused: dict[str, str] = {}
    for node, op in build.reader.ops.items():
        if op.kind in ("value", "constant", "part"):
            continue
        before = build.state()
        try:
            value = _lowered(build, node, op)
        except UnsupportedModelError as error:
            build.reset(before)
            try:
                value = _stays_float(build, node, op, error)
                floats[node.name] = str(error)
            except UnsupportedModelError as last:
                found = build.python.values[node]
                of_batch = isinstance(found, torch.Tensor) and found.numel() % 2  # nothing can stand for it
                if not collect or op.kind in ("input", "output") or of_batch:
                    raise
                refused[node.name] = str(last)
                value = _zeros(build, node)
        build.values[node] = value
    graph = build.graph(value.name, build.shape_of(node))  # the output stands last
    return Lowered(graph, {node.name: value for node, value in build.values.items()}, floats, refused)


def _lowered(build: Builder, node: fx.Node, op: Op) -> Value:
    if node in build.done:
        return build.source(op)
    if op.kind not in _OPERATORS or not (op.inputs or op.kind in ("input", "literal")):
        raise build.refuse(node, _ADVICE.get(name_of(node), "it has no integer meaning here; replace it"))
    try:
        value = _OPERATORS[op.kind](build, node, op)
    except UnsupportedModelError as error:
        if named(node, build.model) in str(error):
            raise
        raise build.refuse(node, str(error)) from error
    if op.kind in _CARRY or isinstance(value.index, tuple):
        return value
    found, wanted = tuple(value.elements.shape), tuple(build.python.values[node].shape)
    if found != wanted:
        raise build.refuse(
            node,
            f"lowered to shape {found} instead of {wanted} for a batch of two: it runs on a batch that was merged with "
            "another dimension; let the batch alone be the first dimension of what a layer reads",
        )
    return value


def _stays_float(build: Builder, node: fx.Node, op: Op, refusal: UnsupportedModelError) -> Value:
    """A float operator in place of what has no integer meaning, where the model allows it; else the refusal."""
    is_alone = op.options.get("parts", (node,)) == (node,)
    if build.model.record.fallback != "float" or node.op != "call_function" or not op.inputs or not is_alone:
        raise refusal
    try:
        return float_operator(build, node, op)
    except UnsupportedModelError as error:
        reason = str(error).removeprefix(f"{named(node, build.model)}: ")
        raise build.refuse(node, f"it cannot stay float either: {reason}") from error


def _zeros(build: Builder, node: fx.Node) -> Value:
    """What stands for the result of an operator that does not lower."""
    found = build.python.values[node]
    parts = [part for part in (found if isinstance(found, tuple | list) else [found]) if isinstance(part, torch.Tensor)]
    sizes = [part.numel() // 2 for part in parts]
    value = build.emit(ir.Literal, f"{build.label(node)}.refused", [], ir.TensorType((sum(sizes),)),
        value=torch.zeros(sum(sizes)))  # fmt: skip
    maps = [
        index.reshape(part.shape)
        for index, part in zip(movement.start((sum(sizes),)).split(sizes, 1), parts, strict=True)
    ]
    return replace(value, index=tuple(maps) if isinstance(found, tuple | list) else maps[0])


# Of these the index map alone changes; the batch may lie anywhere meanwhile, as it does before heads are told apart.
_CARRY = frozenset({"literal", "movement", "quantizer", "relu", "relu6", "dropout", "identity", "output"})
_NORM = "it has no integer meaning: its statistics depend on the input; use batch norms instead"
_PROBABILITY = "it has no integer meaning; leave it out of the network: the order of the outputs is the same without it"
_WEIGHT = "it has no integer meaning: its weight is computed from the input"
_ADVICE = {
    **dict.fromkeys(LAYERS, _WEIGHT),
    **dict.fromkeys(("layer_norm", "group_norm", "instance_norm", "native_layer_norm", "native_group_norm"), _NORM),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), _PROBABILITY),
}


def _input(build: Builder, node: fx.Node, op: Op) -> Value:
    inputs = [source for source, found in build.reader.ops.items() if found.kind == "input"]
    if len(inputs) > 1:
        return _one_of(build, node, inputs)
    shape = build.shape_of(node)
    stored = movement.stored(shape)
    given, integers = None if stored == shape else shape, not getattr(torch, origin(node).dtype).is_floating_point
    made = build.emit(ir.Input, "input", [], ir.TensorType(stored), given=given, integers=integers)
    return made if stored == shape else replace(made, index=movement.start(stored).reshape(2, *shape))


def _one_of(build: Builder, node: fx.Node, inputs: list[fx.Node]) -> Value:
    """One of several inputs, which lie in the graph's one after the other."""
    shapes = tuple(map(build.shape_of, inputs))
    sizes, at = [math.prod(shape) for shape in shapes], inputs.index(node)
    base = (sum(sizes),)
    if at:
        first = build.nodes[0]
        made = Value(first.name, first.type)
    else:
        integers = any(not getattr(torch, origin(source).dtype).is_floating_point for source in inputs)
        made = build.emit(ir.Input, "input", [], ir.TensorType(base), integers=integers, parts=shapes)
    index = movement.start(base).split(sizes, 1)[at].reshape(2, *shapes[at])
    value = build.in_place(replace(made, index=index), node)
    return (
        value if value.shape == shapes[at] else replace(value, index=movement.start(value.shape).reshape(index.shape))
    )


def _output(build: Builder, node: fx.Node, op: Op) -> Value:
    if not isinstance(node.args[0], fx.Node):
        raise build.refuse(node, "a network returns one tensor, not a collection; wrap it to return its logits")
    return build.in_place(build.as_float(build.source(op)), node)  # perhaps of another shape: elements in this order


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
    constant = build.nodes[-1]
    if isinstance(constant, ir.Literal) and constant.name == value.name:
        rounding = ir.Quantize(name=value.name, inputs=(), type=kind, inverse_scale=factor)
        build.nodes[-1] = replace(constant, type=kind, value=rounding.run(constant.value))
        return replace(value, type=kind, grid=grid)
    return build.emit(ir.Quantize, f"{value.name}.quantize", [value], kind, grid, value.index, inverse_scale=factor)


def _layer(build: Builder, node: fx.Node, op: Op) -> Value:
    layer, path, value = op.module, build.label(node), build.source(op)
    assert isinstance(layer, LAYER_TYPES)
    last = node
    channels = layer.weight.shape[0] if isinstance(layer, nn.Linear) else layer.out_channels
    gain = torch.ones(channels, dtype=torch.float64)
    shift = torch.zeros_like(gain) if layer.bias is None else layer.bias.detach().double().cpu()
    while len(build.reader.consumers[last]) == 1 and build.reader.is_attached(build.reader.consumers[last][0]):
        last = build.reader.consumers[last][0]
        factor, term, _ = build.gain_and_shift(last)
        gain, shift = gain * factor, shift * factor + term
        build.done[last] = None
    is_integer = isinstance(layer, QuantLayer)
    value = value if is_integer else build.as_float(value)
    value, weight, conv, shape, index = _as_convolution(build, node, layer, value)
    if not is_integer:
        build.bits[path] = (32, 32)
        by_channel = gain.reshape(-1, *[1] * (weight.ndim - 1))
        return build.emit(
            ir.FloatConv if conv else ir.FloatLinear,
            path,
            [value],
            ir.TensorType(shape),
            None,
            index,
            layer=path,
            weight=(weight.detach().double() * by_channel).float(),
            bias=shift.float(),
            relu=operators.fuse_relu(build, last),
            **conv,
        )
    assert value.grid is not None, "quantize puts a quantizer before each integer layer"
    quantizer: WeightQuantizer = layer.weight_quantizer  # type: ignore[assignment]
    weight, bias, remainder, scale = integer_weights(quantizer, weight, gain, shift, value.type)
    target = build.target(last)
    build.bits[path] = (quantizer.bits, value.grid.bits)
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
        index,
        layer=path,
        weight=weight,
        weight_bits=quantizer.bits,
        activation_bits=value.grid.bits,
        bias=bias,
        input_range=value.type.limits,
        requant=factors,
        fraction=fraction,
        **conv,
    )
    return made if target is not None else replace(made, scale=scale)


def _as_convolution(
    build: Builder, node: fx.Node, layer: nn.Module, value: Value
) -> tuple[Value, torch.Tensor, dict[str, Any], tuple[int, ...], movement.Index | None]:
    """A layer as a matrix product of vectors or a 2-d convolution: what it reads, its float weight, the convolution's
    options (none for a product), the shape of its result, and how that lies in it.
    """
    weight, full = outputs_first(layer), build.python.values[node].shape
    if isinstance(layer, nn.Linear):
        if len(full) == 2 and full[0] == 2:
            return build.in_place(value, node), weight, {}, tuple(full[1:]), None
        order = movement.rows_by_image(value.elements, value.type.shape)
        found = value.elements if order is None else value.elements.flatten(0, -2)[order]
        value = build.in_place(replace(value, index=movement.features_first(found)), node)
        shape = (len(weight), *value.type.shape[1:])
        wanted = tuple(full) if order is None else (2, order.shape[1], len(weight))
        index = movement.features_last(shape, wanted)
        if order is not None:
            index = index.flatten(0, 1)[order.flatten().argsort()].reshape(full)
        return value, weight[:, :, None, None], _window(), shape, index
    if isinstance(layer, nn.Conv1d):
        index = value.elements.unsqueeze(2)
        size = f"padding_mode must be 'zeros', got {layer.padding_mode!r}"
        assert layer.padding_mode == "zeros", size  # torch.export records other padding as an operator of its own
        value, padding = _padded(replace(value, index=index), padding_of(layer))
        window = _window(padding, (1, *layer.stride), (1, *layer.dilation), layer.groups)
        shape = (full[1], 1, full[2])
        return build.in_place(value, node), weight.unsqueeze(2), window, shape, movement.start(shape).reshape(full)
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    shape = tuple(full[1:])
    if isinstance(layer, nn.ConvTranspose2d):
        value = replace(value, index=movement.dilate(value.elements, layer))
        window = _window((0, 0, 0, 0), (1, 1), pair(layer.dilation), layer.groups)
        return build.in_place(value, node), weight.flip((2, 3)), window, shape, None
    value, padding = _padded(value, padding_of(layer))
    window = _window(padding, pair(layer.stride), pair(layer.dilation), layer.groups)
    return build.in_place(value, node), weight, window, shape, None


def _window(
    padding: tuple[int, ...] = (0, 0, 0, 0),
    stride: tuple[int, ...] = (1, 1),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> dict[str, Any]:
    return {"padding": padding, "stride": stride, "dilation": dilation, "groups": groups}


def _padded(value: Value, padding: tuple[int, ...]) -> tuple[Value, tuple[int, ...]]:
    """What a convolution reads, and its padding: zeros around the input become part of its own."""
    around = movement.padding(value.index, value.type.shape)
    if around is None:
        return value, padding
    return replace(value, index=None), tuple(map(operator.add, padding, around))


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
    "function": operators.pointwise,
    "batch_norm": operators.affine,
    "affine": operators.affine,
    "prelu": operators.prelu,
    "literal": operators.literal,
    "relu": operators.relu,
    "relu6": operators.relu,
    "max_pool": operators.max_pool,
    "adaptive_max_pool": operators.max_pool,
    "avg_pool": operators.avg_pool,
    "adaptive_avg_pool": operators.avg_pool,
    "mean": operators.reduce,
    "sum": operators.reduce,
    "resize": operators.resize,
    "amax": operators.reduce,
}
