"""Fake-quantized model to integer graph.

The graph is walked in order. Each tensor becomes the name of an IR node, with its type. An integer producer (layer,
sum, product, table, pooling) looks ahead through transparent operators for the quantizer that its output ends in and
requantizes onto that grid at once, ReLU being the lower end of the range; the quantizer itself then has nothing left to
do. Operators that only move elements are remembered as an index map and become a node where the value is read.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lightning_baqe.errors import ConfigError, UnsupportedModelError
from lightning_baqe.integer import movement
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.folding import Affine, fold, integer_weights, requant
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.operators import Operators
from lightning_baqe.integer.shapes import padding_of, pair
from lightning_baqe.integer.values import ACCUMULATOR, Value, clip_target
from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.layers import QuantConv2d, QuantLinear
from lightning_baqe.quantization.ops import Op

LOWERS = (
    "convs, linears, batch norms, sums and products, concatenation of channels, ReLU and all pointwise functions of "
    "lightning_baqe.quantization.pointwise, max and average pooling, and what only moves elements"
)


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
    lowering = _Lowering(frozen, shape)
    graph = lowering.lower()
    kept = {node.name for node in graph}
    sources = {
        node.name: value.name
        for node, value in lowering.values.items()
        if lowering.reader[node].kind == "quantizer" and value.name in kept and _is_in_order(value)
    }
    return graph, sources


def _is_in_order(value: Value) -> bool:
    """Whether nothing but the shape changed since the value's node."""
    if value.index is None:
        return True
    return isinstance(value.index, torch.Tensor) and movement.is_reshape(value.index, value.type.shape)


class _Lowering(Operators):
    def lower(self) -> IntegerGraph:
        final: Value | None = None
        for node in self.model.graph.nodes:
            op = self.reader[node]
            if op.kind == "output":
                final = self._output(node, op)
            elif op.kind not in ("value", "constant"):
                self.values[node] = value = self._lower(node, op)
                if isinstance(value.index, tuple) or value.shape == self.shape_of(node):
                    continue
                raise self.refuse(node, f"lowered to shape {value.shape} instead of {self.shape_of(node)}; report this")
        assert final is not None
        return self.graph(final.name)

    def _lower(self, node: fx.Node, op: Op) -> Value:
        if op.kind == "input":
            if self.nodes:
                raise self.refuse(node, "a network has one input; give the others constant values")
            return self.emit(ir.Input(name=self.name("input"), inputs=(), type=ir.TensorType(self.shape)))
        if op.kind == "layer":
            return self._layer(node, op)
        if op.kind == "add":
            return self.add(node, op)
        if op.kind == "mul":
            return self.mul(node, op)
        if op.kind == "concat":
            return self.concat(node, op)
        if not op.inputs or op.kind == "other":
            raise self.refuse(
                node, "this operator has no integer meaning here; keep it out of the network or replace it. What "
                f"lowers: {LOWERS}"
            )  # fmt: skip
        value = self.values[op.inputs[0]]
        if node in self.done or op.kind in ("dropout", "identity"):
            return value
        if op.kind == "movement":
            index = movement.start(value.type.shape) if value.index is None else value.index
            moved = movement.move(node, op.inputs[0], index, self.model, self.python.value)
            return replace(value, index=moved)
        if op.kind == "quantizer":
            return self._quantizer(op, value)
        if op.kind == "batch_norm":
            return value if self.reader.is_attached(node) else self.batch_norm(node, op, value)
        if op.kind == "affine":
            return self.constant_affine(node, op, value)
        if op.kind == "function":
            return self.function(node, op, value)
        if op.kind in ("relu", "relu6"):
            return self.relu(node, op, value)
        if op.kind in ("max_pool", "adaptive_max_pool"):
            return self.max_pool(node, op, value)
        return self.avg_pool(node, op, value)

    def _quantizer(self, op: Op, value: Value) -> Value:
        grid = op.module
        assert isinstance(grid, ActivationQuantizer)
        if value.grid is grid:
            return value
        target = clip_target(grid, [])
        wish = f"{value.name}.quantize{'' if value.grid is None else f'_{grid.bits}bit'}"
        if value.grid is not None:
            return self.requantize(value, target, wish)
        inverse = float(np.float32(1.0) / np.float32(target.scale))
        made = ir.Quantize(
            name=self.name(wish), inputs=(value.name,), type=target.type(value.type.shape), inverse_scale=inverse
        )
        return replace(self.emit(made, grid), index=value.index)

    def _layer(self, node: fx.Node, op: Op) -> Value:
        layer, path = op.module, str(node.target)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        value = self.values[op.inputs[0]]
        last, norm = node, None
        following = self.reader.consumers[node]
        if len(following) == 1 and self.reader[following[0]].kind == "batch_norm":
            last, norm = following[0], self.reader[following[0]].module
        affine = fold(layer, norm, path)
        is_integer = isinstance(layer, QuantConv2d | QuantLinear)
        value = value if is_integer else self.as_float(value)
        conv: dict[str, Any] = {}
        if isinstance(layer, nn.Conv2d):
            conv = _conv_options(layer, path)
            value, conv["padding"] = self._padded(value, conv["padding"])
        value = self.in_place(value, node)
        if isinstance(layer, nn.Linear) and len(value.type.shape) != 1:
            raise self.refuse(node, f"a linear layer on values of shape {value.type.shape}; flatten them first")
        if not isinstance(layer, QuantConv2d | QuantLinear):
            return self._float_layer(node, last, layer, value, affine, conv)
        grid = value.grid
        assert grid is not None, "quantize puts a quantizer before each integer layer"
        numbers = integer_weights(layer, affine, value.type.scale, value.type.zero_point)
        target = self.target(last)
        shape = self.shape_of(last)
        weight_bits = layer.weight_quantizer.bits
        self.bits[path] = (weight_bits, grid.bits)
        factors = None if target is None else requant(numbers.scale / target.scale, path)
        common: dict[str, Any] = {
            "name": self.name(path),
            "inputs": (value.name,),
            "type": ir.TensorType(shape, *ACCUMULATOR, scale=0.0) if target is None else target.type(shape),
            "layer": path,
            "weight": numbers.weight,
            "weight_bits": weight_bits,
            "activation_bits": grid.bits,
            "bias": numbers.bias,
            "input_range": value.limits,
            "requant": factors,
            "fraction": None if factors is None else numbers.fraction(factors),
        }
        made = ir.Conv(**common, **conv, pad_value=value.type.zero_point) if conv else ir.Linear(**common)
        if target is None:
            return replace(self.emit(made), scale=numbers.scale)
        return self.emit(made, target.grid)

    def _padded(self, value: Value, padding: tuple[int, int, int, int]) -> tuple[Value, tuple[int, int, int, int]]:
        """Take zeros around a convolution's input into its own padding."""
        if not isinstance(value.index, torch.Tensor) or value.index.ndim != 4 or len(value.type.shape) != 3:
            return value, padding
        selection = movement.select(value.index, value.type.shape)
        around = None if selection is None else selection.padding(value.type.shape)
        if around is None:
            return value, padding
        total = tuple(own + extra for own, extra in zip(padding, around, strict=True))
        return replace(value, index=None), (total[0], total[1], total[2], total[3])

    def _float_layer(
        self, node: fx.Node, last: fx.Node, layer: nn.Conv2d | nn.Linear, value: Value, affine: Affine, conv: Any
    ) -> Value:
        path = str(node.target)
        self.bits[path] = (32, 32)
        gain = affine.gain.reshape(-1, *[1] * (layer.weight.ndim - 1))
        common: dict[str, Any] = {
            "name": self.name(path),
            "inputs": (value.name,),
            "type": ir.TensorType(self.shape_of(last)),
            "layer": path,
            "weight": (layer.weight.detach().double() * gain).float(),
            "bias": affine.shift.float(),
            "relu": self.fused_relu(last),
        }
        return self.emit(ir.FloatConv(**common, **conv) if conv else ir.FloatLinear(**common))

    def _output(self, node: fx.Node, op: Op) -> Value:
        if not isinstance(node.args[0], fx.Node):
            raise self.refuse(node, "a network returns one tensor, not a collection; wrap it to return its logits")
        return self.in_place(self.as_float(self.values[op.inputs[0]]), node)


def _conv_options(layer: nn.Conv2d, path: str) -> dict[str, Any]:
    if layer.padding_mode != "zeros":
        raise UnsupportedModelError(f"layer {path!r}: padding_mode must be 'zeros', got {layer.padding_mode!r}")
    return {
        "stride": pair(layer.stride),
        "padding": padding_of(layer),
        "dilation": pair(layer.dilation),
        "groups": layer.groups,
    }
