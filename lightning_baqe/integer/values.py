"""What lowering knows of each tensor: the IR node that holds it, the grid it is on, and what has moved since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer import movement
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.folding import requant
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.shapes import GraphValues
from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.aten import name_of, origin
from lightning_baqe.quantization.batch_norm import gain_and_shift
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.ops import TRANSPARENT, Op, OpReader


@dataclass(frozen=True, eq=False)
class Value:
    """A lowered tensor.

    Args:
        name, type: of the IR node that holds its elements.
        grid: the quantizer whose grid they are on; None for floats and accumulators.
        index: where each element comes from, if anything moved (see :mod:`lightning_baqe.integer.movement`).
        scale: of accumulators, float64 ``(channels,)``.
    """

    name: str
    type: ir.TensorType
    grid: ActivationQuantizer | None = None
    index: movement.Index | None = None
    scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the batch dimension."""
        if self.index is None:
            return self.type.shape
        assert isinstance(self.index, torch.Tensor)
        return movement.of_one(tuple(self.index.shape))

    @property
    def elements(self) -> torch.Tensor:
        """The index map, also where nothing moved."""
        assert not isinstance(self.index, tuple)
        return movement.start(self.type.shape) if self.index is None else self.index


@dataclass(frozen=True, eq=False)
class Target:
    """Where an integer producer's output goes: a grid, its range cut by the ReLUs (``clips``) on the way."""

    grid: ActivationQuantizer
    clips: tuple[str, ...] = ()

    def type(self, shape: tuple[int, ...]) -> ir.TensorType:
        """The type of a tensor that is stored there."""
        low, high, zero_point = self.grid.low, self.grid.qmax, self.grid.zero_point()
        if self.clips:
            low = max(low, zero_point)
        if "relu6" in self.clips:
            high = min(high, round(6.0 / self.scale) + zero_point)
        return ir.TensorType(shape, low, high, self.scale, zero_point)

    @property
    def scale(self) -> float:
        return self.grid.step()

    @property
    def inverse_scale(self) -> float:
        """What quantizing to it multiplies with, a float32."""
        return float(np.float32(1.0) / np.float32(self.scale))


class Builder:
    """The graph under construction: names, values, look-ahead. The model is fake-quantized, in eval mode, on the CPU;
    the shape is that of one input.
    """

    def __init__(self, model: QuantizedModel, shapes: Sequence[tuple[int, ...]]) -> None:
        self.model = model
        self.reader = OpReader(model, model.graph)
        self.constants = {node for node, op in self.reader.ops.items() if op.kind in ("constant", "literal")}
        self.shapes = tuple(shapes)
        self.python = GraphValues(model, shapes, self.constants)
        self.nodes: list[ir.Node] = []
        self.names: dict[str, None] = {}
        self.values: dict[fx.Node, Value] = {}
        self.floats: dict[str, Value] = {}  # dequantized integer values by the integer node's name
        self.moved: dict[tuple[str, bytes, tuple[int, ...]], Value] = {}  # values whose elements were moved already
        self.done: dict[fx.Node, None] = {}  # what their producer has done besides
        self.bits: dict[str, tuple[int | tuple[int, ...], int]] = {}

    def state(self) -> tuple[int, ...]:
        """What :meth:`reset` returns to."""
        return len(self.nodes), len(self.names), len(self.floats), len(self.moved), len(self.done)

    def reset(self, state: tuple[int, ...]) -> None:
        """Forget what was added since ``state``."""
        del self.nodes[state[0] :]
        added: tuple[dict[Any, Any], ...] = (self.names, self.floats, self.moved, self.done)
        for found, size in zip(added, state[1:], strict=True):
            while len(found) > size:
                found.popitem()

    @cached_property
    def alone(self) -> dict[fx.Node, Any]:
        """What nodes evaluate to for a batch of one image."""
        return GraphValues(self.model, self.shapes, self.constants, 1).values

    def batch_dim(self, node: fx.Node) -> int:
        """The dimension that the batch lies in, perhaps outside of another."""
        two, one = self.python.values[node].shape, self.alone[node].shape
        found = [dim for dim, (a, b) in enumerate(zip(two, one, strict=True)) if a != b]
        if len(found) != 1:
            raise UnsupportedModelError(
                f"{self.label(node)!r} has the shape {tuple(one)} for one image and {tuple(two)} for two: it mixes "
                "the images of a batch; let one dimension alone depend on the batch"
            )
        return found[0]

    def label(self, node: fx.Node) -> str:
        """A node's readable name."""
        return origin(node).label

    def emit(
        self,
        make: Callable[..., ir.Node],
        wish: str,
        inputs: Sequence[Value],
        kind: ir.TensorType,
        grid: ActivationQuantizer | None = None,
        index: movement.Index | None = None,
        /,
        **constants: Any,
    ) -> Value:
        """Append an IR node of the class ``make``, named ``wish`` or the next free name like it; ``constants`` are the
        class's own fields, ``grid`` and ``index`` those of the value that it makes.
        """
        name, count = wish, 1
        while name in self.names:
            name, count = f"{wish}_{count}", count + 1
        self.names[name] = None
        self.nodes.append(make(name=name, inputs=tuple(value.name for value in inputs), type=kind, **constants))
        return Value(name, kind, grid, index)

    def source(self, op: Op) -> Value:
        """The first tensor that an operator reads."""
        return self.values[op.inputs[0]]

    def shape_of(self, node: fx.Node) -> tuple[int, ...]:
        """Without the batch dimension."""
        return self.python.shape(node)

    def refuse(self, node: fx.Node, reason: str) -> UnsupportedModelError:
        """The error for an operator that does not lower."""
        return UnsupportedModelError(f"{named(node, self.model)}: {reason}")

    def target(self, node: fx.Node) -> Target | None:
        """The grid that a producer's output ends in; None for the network's output and float operators."""
        clips: list[str] = []
        while True:
            consumers = self.reader.consumers[node]
            if len(consumers) != 1:
                raise self.refuse(node, f"its integer output has {len(consumers)} consumers and no quantizer")
            node = consumers[0]
            op = self.reader[node]
            if op.kind in ("output", "other"):
                return None
            if isinstance(op.module, ActivationQuantizer):
                return Target(op.module, tuple(clips))
            if op.kind in ("relu", "relu6"):
                clips.append(op.kind)
            elif op.kind not in TRANSPARENT and not self.reader.is_chained(node) and not self.reader.is_attached(node):
                raise self.refuse(node, "it reads an integer tensor that has no quantizer")

    def need_target(self, node: fx.Node) -> Target:
        """As :meth:`target`, for operators that only layers are exempt from being quantized after."""
        target = self.target(node)
        assert target is not None, "quantize puts a quantizer before the output"
        return target

    def requantize(self, value: Value, target: Target, wish: str) -> Value:
        """The value on another grid."""
        factor, zero_point = requant(value.type.scale / target.scale, wish), value.type.zero_point
        kind, grid, index = target.type(value.type.shape), target.grid, value.index
        return self.emit(ir.Requantize, wish, [value], kind, grid, index, requant=factor, input_zero_point=zero_point)

    def as_float(self, value: Value) -> Value:
        """The float32 value of an integer tensor: one Dequantize for all that read it."""
        if not value.type.is_integer:
            return value
        if value.scale is None:
            scale, zero_point = torch.tensor(value.type.scale, dtype=torch.float32), value.type.zero_point
        else:
            value, zero_point = self.in_place(value), 0
            if value.scale is None:  # elements changed places, which floats do
                return value
            repeat = value.type.shape[0] // len(value.scale)  # accumulators that were flattened
            scale = value.scale.repeat_interleave(repeat).to(torch.float32)
        if value.name not in self.floats:
            kind = ir.TensorType(value.type.shape)
            self.floats[value.name] = self.emit(
                ir.Dequantize, f"{value.name}.dequantize", [value], kind, scale=scale, zero_point=zero_point
            )
        return replace(self.floats[value.name], index=value.index)

    def in_place(self, value: Value, node: fx.Node | None = None) -> Value:
        """The value with all of its elements where they belong: what moved them becomes an IR node. A value of two or
        of more than three dimensions gets three, in the same order.
        """
        if value.index is None:
            return value
        if not isinstance(value.index, torch.Tensor):
            where = named(node, self.model) if node is not None else value.name
            raise UnsupportedModelError(f"{where} reads several tensors as one; take one of them by its number")
        if bool(value.index.isinf().any()):
            where = named(node, self.model) if node is not None else value.name
            raise UnsupportedModelError(f"{where} reads padding of negative infinity, which has no integer meaning")
        index = value.index.reshape(2, *movement.stored(value.shape))
        key = (value.name, index.numpy().tobytes(), tuple(index.shape))
        if key not in self.moved:
            try:
                self.moved[key] = self._move(replace(value, index=None), index)
            except UnsupportedModelError as error:
                raise self.refuse(node, str(error)) if node is not None else error from error
        return self.moved[key]

    def _move(self, value: Value, index: torch.Tensor) -> Value:
        shape, wanted = value.shape, tuple(index.shape[1:])
        selected = _selected_shape(wanted, shape)
        found = None if selected is None else movement.select(index.reshape(2, *selected), shape)
        if selected is None or found is None:
            if value.scale is not None:  # accumulators have a scale by channel: they move as floats
                value = self.as_float(value)
            source = movement.from_one(index, shape)
            kind = replace(value.type, shape=wanted)
            return self.emit(ir.Move, f"{value.name}.move", [value], kind, value.grid, None, index=source)
        channels, rows, columns = found
        if any(part is not None for part in found):
            kind, indices = (
                replace(value.type, shape=selected),
                {"channels": channels, "rows": rows, "columns": columns},
            )
            made = self.emit(ir.Gather, f"{value.name}.gather", [value], kind, value.grid, **indices)
            scale = value.scale if value.scale is None or channels is None else value.scale[channels]
            value = replace(made, scale=scale)
        return self._flatten(value, wanted)

    def _flatten(self, value: Value, shape: tuple[int, ...]) -> Value:
        if value.shape == shape:
            return value
        made = self.emit(ir.Flatten, f"{value.name}.flatten", [value], replace(value.type, shape=shape), value.grid)
        return replace(made, scale=value.scale)

    def gain_and_shift(self, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor, int]:
        """What a batch norm or a constant does to what it reads: a gain and a shift, float64, along one dimension."""
        op = self.reader[node]
        if op.kind == "batch_norm":
            assert isinstance(op.module, nn.BatchNorm1d | nn.BatchNorm2d)
            return *gain_and_shift(op.module, self.label(node)), 1
        dim, size = op.options["dim"], self.python.values[node].shape[op.options["dim"]]
        number = self.python.values[op.options["constant"]].detach().double().flatten().expand(size)
        ones, zeros = torch.ones_like(number), torch.zeros_like(number)
        sign = -1.0 if op.options["reversed"] else 1.0
        gain, shift = {
            "add": (ones, number),
            "sub": (sign * ones, -sign * number),
            "mul": (number, zeros),
            "div": (1.0 / number, zeros),
        }[op.options["operation"]]
        return gain, shift, dim

    def graph(self, output: str, returned: tuple[int, ...]) -> IntegerGraph:
        """What was built, as far as the output depends on it."""
        wanted = {output}
        for node in reversed(self.nodes):
            if node.name in wanted:
                wanted.update(node.inputs)
        kept = tuple(node for node in self.nodes if node.name in wanted or isinstance(node, ir.Input))
        shape = None if kept[-1].type.shape == returned else returned
        return IntegerGraph(kept, {name: self.bits[name] for name in self.model.bits if name in self.bits}, shape)


def _selected_shape(shape: tuple[int, ...], source: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a selection that, perhaps flattened, gives ``shape``; None if there is none."""
    if len(shape) == len(source):
        return shape
    if len(shape) == 1 and shape[0] % torch.Size(source[1:]).numel() == 0:
        return (shape[0] // torch.Size(source[1:]).numel(), *source[1:])
    if len(source) == 1 and len(shape) == 3 and shape[1:] == (1, 1):
        return shape[:1]
    return None


def named(node: fx.Node, model: fx.GraphModule) -> str:
    """An operator as messages name it: what it is, and the module that calls it with its class."""
    found, what = origin(node), name_of(node)
    if node.op == "call_module":
        what = type(model.get_submodule(str(node.target))).__name__
    kind = found.kind.rpartition(".")[2]
    if kind == what or not kind:
        return f"{found.label!r} ({what})"
    return f"{what} in {f'module {found.path!r}' if found.path else 'the forward'} ({kind})"
