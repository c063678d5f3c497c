"""Fake-quantized model to integer graph.

The graph is walked in order. Each tensor becomes the name of an IR node, with its type. An integer producer (layer,
addition, pooling) looks ahead through transparent operators for the quantizer that its output ends in and requantizes
onto that grid at once, ReLU being the lower end of the range; the quantizer itself then has nothing left to do.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lightning_baqe.errors import ConfigError, UnsupportedModelError
from lightning_baqe.integer.folding import Affine, add_factors, fold, integer_weights, requant
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.nodes import (
    Add,
    AvgPool,
    Clip,
    Conv,
    Dequantize,
    Flatten,
    FloatAdd,
    FloatAvgPool,
    FloatConv,
    FloatLinear,
    FloatRelu,
    Input,
    Linear,
    MaxPool,
    Node,
    Quantize,
    Requantize,
    TensorType,
)
from lightning_baqe.integer.shapes import GraphValues, padding_of, pair, pool_window
from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.layers import QuantConv2d, QuantLinear
from lightning_baqe.quantization.ops import TRANSPARENT, Op, OpReader

_ACCUMULATOR = (-(2**31), 2**31 - 1)


@dataclass(frozen=True, eq=False)
class _Value:
    """A lowered tensor: the IR node that holds it, its type, and the quantizer whose grid it is on."""

    name: str
    type: TensorType
    grid: ActivationQuantizer | None = None


@dataclass(frozen=True, eq=False)
class _Target:
    """Where an integer producer's output goes: a grid and the range that ReLUs on the way leave."""

    grid: ActivationQuantizer
    scale: float
    zero_point: int
    low: int
    high: int


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
    if not isinstance(model, QuantizedModel):
        raise ConfigError(f"lower wants what lightning_baqe.quantize returned, got a {type(model).__name__}")
    for quantizer in model.quantizers().values():
        quantizer.require_initialized()
    shape = model.record.input_shape if example_input is None else tuple(example_input.shape[1:])
    if shape is None:
        raise ConfigError("the input's shape is not known: give example_input to lower or to quantize")
    frozen = copy.deepcopy(model).cpu().eval()
    return _Lowering(frozen, shape).lower()


class _Lowering:
    def __init__(self, model: QuantizedModel, shape: tuple[int, ...]) -> None:
        self.model = model
        self.reader = OpReader(model, model.graph)
        self.python = GraphValues(model, shape)
        self.shape = shape
        self.nodes: list[Node] = []
        self.names: set[str] = set()
        self.values: dict[fx.Node, _Value] = {}
        self.floats: dict[str, _Value] = {}  # dequantized integer values by the integer node's name
        self.done: set[fx.Node] = set()  # ReLUs fused into their producer
        self.bits: dict[str, tuple[int, int]] = {}

    def lower(self) -> IntegerGraph:
        final: _Value | None = None
        for node in self.model.graph.nodes:
            op = self.reader[node]
            if op.kind == "output":
                final = self._output(node, op)
            elif op.kind != "value":
                self.values[node] = self._lower(node, op)
        assert final is not None
        order = {name: self.bits[name] for name in self.model.bits if name in self.bits}
        return IntegerGraph(_reachable(self.nodes, final.name), order)

    # --- bookkeeping

    def _name(self, wish: str) -> str:
        name, count = wish, 1
        while name in self.names:
            name, count = f"{wish}_{count}", count + 1
        self.names.add(name)
        return name

    def _label(self, node: fx.Node) -> str:
        return self.model.record.labels.get(node.name, node.name)

    def _emit(self, node: Node, grid: ActivationQuantizer | None = None) -> _Value:
        self.nodes.append(node)
        return _Value(node.name, node.type, grid)

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.python.shape(node, self._label(node))

    def _refuse(self, node: fx.Node, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._label(node)!r} ({node.op} {node.target}): {reason}")

    def _target(self, node: fx.Node) -> _Target | None:
        """The grid that the output of a producer ends in, None if it ends in the network's output."""
        clips: list[str] = []
        while True:
            consumers = self.reader.consumers[node]
            if len(consumers) != 1:
                raise self._refuse(node, f"its integer output has {len(consumers)} consumers and no quantizer")
            node = consumers[0]
            op = self.reader[node]
            if op.kind == "output":
                return None
            if isinstance(op.module, ActivationQuantizer):
                return _clip_target(op.module, clips)
            if op.kind in ("relu", "relu6"):
                clips.append(op.kind)
            elif op.kind not in TRANSPARENT and op.kind != "batch_norm":
                raise self._refuse(node, "it reads an integer tensor that has no quantizer")

    def _type(self, node: fx.Node, target: _Target | None) -> TensorType:
        if target is None:
            return TensorType(self._shape(node), *_ACCUMULATOR, scale=0.0)
        return TensorType(self._shape(node), target.low, target.high, target.scale, target.zero_point)

    def _as_float(self, value: _Value) -> _Value:
        """The float32 value of an integer tensor: one Dequantize for all that read it."""
        if not value.type.is_integer:
            return value
        if value.name not in self.floats:
            kind = value.type
            scale = torch.tensor(kind.scale, dtype=torch.float32)
            name = self._name(f"{value.name}.dequantize")
            self.floats[value.name] = self._emit(
                Dequantize(
                    name=name,
                    inputs=(value.name,),
                    type=TensorType(kind.shape),
                    scale=scale,
                    zero_point=kind.zero_point,
                )
            )
        return self.floats[value.name]

    def _only_relu(self, node: fx.Node) -> bool:
        """Whether the only consumer is a ReLU; it is then taken to be fused."""
        consumers = self.reader.consumers[node]
        fused = len(consumers) == 1 and self.reader[consumers[0]].kind == "relu"
        if fused:
            self.done.add(consumers[0])
        return fused

    # --- operators

    def _lower(self, node: fx.Node, op: Op) -> _Value:
        if op.kind == "input":
            if self.nodes:
                raise self._refuse(node, "a network has one input; give the others constant values")
            return self._emit(Input(name=self._name("input"), inputs=(), type=TensorType(self.shape)))
        if op.kind == "layer":
            return self._layer(node, op)
        if op.kind == "add":
            return self._add(node, op)
        if not op.inputs or op.kind in ("other", "item"):
            raise self._refuse(
                node, "this operator has no integer meaning here; keep it out of the network or replace it (convs, "
                "linears, batch norm after them, ReLU, ReLU6, max and average pooling, additions and flattening lower)"
            )  # fmt: skip
        value = self.values[op.inputs[0]]
        if node in self.done or op.kind in ("dropout", "identity"):
            return value
        if op.kind == "quantizer":
            return self._quantizer(node, op, value)
        if op.kind == "batch_norm":
            if self.reader.is_attached(node):
                return value
            raise self._refuse(node, "only a batch norm right after a conv or linear, its only reader, can be folded")
        if op.kind in ("relu", "relu6"):
            return self._relu(node, op, value)
        if op.kind == "max_pool":
            return self._max_pool(node, op, value)
        if op.kind == "reshape":
            return self._reshape(node, value)
        return self._avg_pool(node, op, value)

    def _quantizer(self, node: fx.Node, op: Op, value: _Value) -> _Value:
        grid = op.module
        assert isinstance(grid, ActivationQuantizer)
        if value.grid is grid:
            return value
        target = _clip_target(grid, [])
        kind = TensorType(value.type.shape, target.low, target.high, target.scale, target.zero_point)
        name = self._name(f"{value.name}.quantize{'' if value.grid is None else f'_{grid.bits}bit'}")
        if value.grid is None:
            inverse = float(np.float32(1.0) / np.float32(target.scale))
            return self._emit(Quantize(name=name, inputs=(value.name,), type=kind, inverse_scale=inverse), grid)
        factor = requant(value.type.scale / target.scale, name)
        source = value.type.zero_point
        return self._emit(
            Requantize(name=name, inputs=(value.name,), type=kind, requant=factor, input_zero_point=source), grid
        )

    def _relu(self, node: fx.Node, op: Op, value: _Value) -> _Value:
        kind = value.type
        if not kind.is_integer:
            if op.kind == "relu6":
                raise self._refuse(node, "ReLU6 between float layers does not lower; give its layers 2..8 bits")
            return self._emit(FloatRelu(name=self._name(self._label(node)), inputs=(value.name,), type=kind))
        assert value.grid is not None
        assert kind.low is not None
        assert kind.high is not None
        target = _clip_target(value.grid, [op.kind])
        low, high = max(kind.low, target.low), min(kind.high, target.high)
        if (low, high) == (kind.low, kind.high):
            return value
        clipped = replace(kind, low=low, high=high)
        return self._emit(Clip(name=self._name(self._label(node)), inputs=(value.name,), type=clipped), value.grid)

    def _max_pool(self, node: fx.Node, op: Op, value: _Value) -> _Value:
        options = self.python.resolve(op.options)
        kernel = pair(options["kernel_size"])
        stride = options.get("stride")
        pool = MaxPool(
            name=self._name(self._label(node)),
            inputs=(value.name,),
            type=replace(value.type, shape=self._shape(node)),
            kernel=kernel,
            stride=kernel if stride is None or stride == [] else pair(stride),
            padding=pair(options.get("padding", 0)),
            dilation=pair(options.get("dilation", 1)),
            ceil_mode=bool(options.get("ceil_mode", False)),
        )
        return self._emit(pool, value.grid)

    def _reshape(self, node: fx.Node, value: _Value) -> _Value:
        shape = self._shape(node)
        if shape == value.type.shape:
            return value
        if shape != (math.prod(value.type.shape),):
            raise self._refuse(node, f"only flattening lowers, not a reshape of {value.type.shape} to {shape}")
        kind = replace(value.type, shape=shape)
        return self._emit(Flatten(name=self._name(self._label(node)), inputs=(value.name,), type=kind), value.grid)

    def _avg_pool(self, node: fx.Node, op: Op, value: _Value) -> _Value:
        label = self._label(node)
        options = self.python.resolve(op.options)
        kernel, stride = pool_window(op.kind, options, value.type.shape, label)
        channels, height, width = value.type.shape
        shape = (
            channels,
            (height - kernel[0]) // stride[0] + 1,
            (width - kernel[1]) // stride[1] + 1,
        )
        if op.kind != "mean" and shape != self._shape(node):
            raise self._refuse(
                node, "average pooling whose ceil_mode adds partial windows does not lower; set it False"
            )
        inputs, name = (value.name,), self._name(label)
        if value.type.is_integer:
            target = self._target(node)
            assert target is not None, "quantize puts a quantizer before the output"
            pooled = self._emit(
                AvgPool(
                    name=name,
                    inputs=inputs,
                    type=replace(self._type(node, target), shape=shape),
                    kernel=kernel,
                    stride=stride,
                    requant=requant(value.type.scale / (target.scale * math.prod(kernel)), label),
                    input_zero_point=value.type.zero_point,
                ),
                target.grid,
            )
        else:
            kind = TensorType(shape)
            pooled = self._emit(FloatAvgPool(name=name, inputs=inputs, type=kind, kernel=kernel, stride=stride))
        return self._reshape(node, pooled)  # a mean without keepdim

    def _add(self, node: fx.Node, op: Op) -> _Value:
        a, b = (self.values[source] for source in op.inputs)
        label = self._label(node)
        if a.type.shape != b.type.shape:
            raise self._refuse(node, f"operands of different shapes, {a.type.shape} and {b.type.shape}")
        name = self._name(label)
        if not a.type.is_integer and not b.type.is_integer:
            relu = self._only_relu(node)
            kind = TensorType(a.type.shape)
            return self._emit(FloatAdd(name=name, inputs=(a.name, b.name), type=kind, relu=relu))
        if not (a.type.is_integer and b.type.is_integer):
            raise self._refuse(node, "one operand is an integer tensor, the other is not")
        target = self._target(node)
        assert target is not None, "quantize puts a quantizer before the output"
        assert a.type.low is not None
        assert b.type.low is not None
        assert a.type.high is not None
        assert b.type.high is not None
        factors = add_factors(
            (a.type.scale / target.scale, b.type.scale / target.scale),
            ((a.type.low, a.type.high), (b.type.low, b.type.high)),
            (a.type.zero_point, b.type.zero_point),
            label,
        )
        return self._emit(
            Add(
                name=name,
                inputs=(a.name, b.name),
                type=self._type(node, target),
                multipliers=factors.multipliers,
                shift=factors.shift,
                offset=factors.offset,
            ),
            target.grid,
        )

    def _layer(self, node: fx.Node, op: Op) -> _Value:
        layer, path = op.module, str(node.target)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        value = self.values[op.inputs[0]]
        last, norm = node, None
        following = self.reader.consumers[node]
        if len(following) == 1 and self.reader[following[0]].kind == "batch_norm":
            last, norm = following[0], self.reader[following[0]].module
        affine = fold(layer, norm, path)
        conv = _conv_options(layer, path) if isinstance(layer, nn.Conv2d) else {}
        if isinstance(layer, nn.Linear) and len(value.type.shape) != 1:
            raise self._refuse(node, f"a linear layer on values of shape {value.type.shape}; flatten them first")
        if not isinstance(layer, QuantConv2d | QuantLinear):
            return self._float_layer(node, last, layer, self._as_float(value), affine, conv)
        grid = value.grid
        assert grid is not None, "quantize puts a quantizer before each integer layer"
        assert value.type.low is not None
        assert value.type.high is not None
        numbers = integer_weights(layer, affine, value.type.scale, value.type.zero_point)
        target = self._target(last)
        weight_bits = layer.weight_quantizer.bits
        self.bits[path] = (weight_bits, grid.bits)
        factors = None if target is None else requant(numbers.scale / target.scale, path)
        common: dict[str, Any] = {
            "name": self._name(path),
            "inputs": (value.name,),
            "type": self._type(last, target),
            "layer": path,
            "weight": numbers.weight,
            "weight_bits": weight_bits,
            "activation_bits": grid.bits,
            "bias": numbers.bias,
            "input_range": (value.type.low, value.type.high),
            "requant": factors,
            "fraction": None if factors is None else numbers.fraction(factors),
        }
        made = Conv(**common, **conv, pad_value=value.type.zero_point) if conv else Linear(**common)
        out = self._emit(made, None if target is None else target.grid)
        if target is not None:
            return out
        return self._emit(
            Dequantize(
                name=self._name(f"{path}.dequantize"),
                inputs=(out.name,),
                type=TensorType(out.type.shape),
                scale=numbers.scale.to(torch.float32),
                zero_point=0,
            )
        )

    def _float_layer(
        self, node: fx.Node, last: fx.Node, layer: nn.Conv2d | nn.Linear, value: _Value, affine: Affine, conv: Any
    ) -> _Value:
        path = str(node.target)
        self.bits[path] = (32, 32)
        gain = affine.gain.reshape(-1, *[1] * (layer.weight.ndim - 1))
        common: dict[str, Any] = {
            "name": self._name(path),
            "inputs": (value.name,),
            "type": TensorType(self._shape(last)),
            "layer": path,
            "weight": (layer.weight.detach().double() * gain).float(),
            "bias": affine.shift.float(),
            "relu": self._only_relu(last),
        }
        return self._emit(FloatConv(**common, **conv) if conv else FloatLinear(**common))

    def _output(self, node: fx.Node, op: Op) -> _Value:
        if not isinstance(node.args[0], fx.Node):
            raise self._refuse(node, "a network returns one tensor, not a collection; wrap it to return its logits")
        return self._as_float(self.values[op.inputs[0]])


def _clip_target(grid: ActivationQuantizer, clips: list[str]) -> _Target:
    """The quantizer's grid, its range cut by ReLUs."""
    scale, zero_point = grid.step(), grid.zero_point()
    low, high = grid.low, grid.qmax
    if clips:
        low = zero_point
    if "relu6" in clips:
        high = min(high, round(6.0 / scale) + zero_point)
    return _Target(grid, scale, zero_point, low, high)


def _conv_options(layer: nn.Conv2d, path: str) -> dict[str, Any]:
    if layer.padding_mode != "zeros":
        raise UnsupportedModelError(f"layer {path!r}: padding_mode must be 'zeros', got {layer.padding_mode!r}")
    return {
        "stride": pair(layer.stride),
        "padding": padding_of(layer),
        "dilation": pair(layer.dilation),
        "groups": layer.groups,
    }


def _reachable(nodes: list[Node], output: str) -> tuple[Node, ...]:
    """The nodes that the output depends on and the input, in order, the output last."""
    wanted = {output}
    for node in reversed(nodes):
        if node.name in wanted:
            wanted.update(node.inputs)
    kept = [node for node in nodes if (node.name in wanted and node.name != output) or isinstance(node, Input)]
    return (*kept, *(node for node in nodes if node.name == output and not isinstance(node, Input)))
