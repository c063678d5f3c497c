"""What lowering knows of each tensor: the IR node that holds it, the grid it is on, and what has moved since."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer import movement
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.folding import requant
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.shapes import GraphValues
from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.ops import TRANSPARENT, OpReader
from lightning_baqe.quantization.pointwise import Pointwise

ACCUMULATOR = (-(2**31), 2**31 - 1)


@dataclass(frozen=True, eq=False)
class Value:
    """A lowered tensor.

    Args:
        name, type: of the IR node that holds its elements.
        grid: the quantizer whose grid they are on; None for floats and accumulators.
        index: where each element comes from, if anything moved (see :mod:`lightning_baqe.integer.movement`).
        pending: functions that the next table has to apply first.
        scale: of accumulators, float64 ``(channels,)``.
    """

    name: str
    type: ir.TensorType
    grid: ActivationQuantizer | None = None
    index: movement.Index | None = None
    pending: tuple[Pointwise, ...] = ()
    scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the batch dimension."""
        if self.index is None:
            return self.type.shape
        assert isinstance(self.index, torch.Tensor)
        return tuple(self.index.shape[1:])

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest integer."""
        assert self.type.low is not None
        assert self.type.high is not None
        return self.type.low, self.type.high


@dataclass(frozen=True, eq=False)
class Target:
    """Where an integer producer's output goes: a grid and the range that ReLUs on the way leave."""

    grid: ActivationQuantizer
    scale: float
    zero_point: int
    low: int
    high: int

    def type(self, shape: tuple[int, ...]) -> ir.TensorType:
        return ir.TensorType(shape, self.low, self.high, self.scale, self.zero_point)


def clip_target(grid: ActivationQuantizer, clips: list[str]) -> Target:
    """The quantizer's grid, its range cut by ReLUs."""
    scale, zero_point = grid.step(), grid.zero_point()
    low, high = grid.low, grid.qmax
    if clips:
        low = max(low, zero_point)
    if "relu6" in clips:
        high = min(high, round(6.0 / scale) + zero_point)
    return Target(grid, scale, zero_point, low, high)


class Builder:
    """The graph under construction: names, values, look-ahead. Base of what lowers operators.

    Args:
        model: fake-quantized, in eval mode, on the CPU.
        shape: of one input.
    """

    def __init__(self, model: QuantizedModel, shape: tuple[int, ...]) -> None:
        self.model = model
        self.reader = OpReader(model, model.graph)
        constants = {node for node, op in self.reader.ops.items() if op.kind == "constant"}
        self.python = GraphValues(model, shape, constants)
        self.shape = shape
        self.nodes: list[ir.Node] = []
        self.names: set[str] = set()
        self.values: dict[fx.Node, Value] = {}
        self.floats: dict[str, Value] = {}  # dequantized integer values by the integer node's name
        self.moved: dict[tuple[str, bytes, tuple[int, ...]], Value] = {}  # values whose elements were moved already
        self.done: set[fx.Node] = set()  # ReLUs fused into their producer
        self.bits: dict[str, tuple[int, int]] = {}

    def name(self, wish: str) -> str:
        """``wish``, or the next free name like it."""
        name, count = wish, 1
        while name in self.names:
            name, count = f"{wish}_{count}", count + 1
        self.names.add(name)
        return name

    def label(self, node: fx.Node) -> str:
        """A node's readable name."""
        return self.model.record.labels.get(node.name, node.name)

    def emit(self, node: ir.Node, grid: ActivationQuantizer | None = None) -> Value:
        """Append an IR node."""
        self.nodes.append(node)
        return Value(node.name, node.type, grid)

    def shape_of(self, node: fx.Node) -> tuple[int, ...]:
        """Without the batch dimension."""
        return self.python.shape(node, self.label(node))

    def refuse(self, node: fx.Node, reason: str) -> UnsupportedModelError:
        """The error for an operator that does not lower."""
        return UnsupportedModelError(f"{self.label(node)!r} ({node.op} {node.target}): {reason}")

    def target(self, node: fx.Node) -> Target | None:
        """The grid that the output of a producer ends in, None if it ends in the network's output."""
        clips: list[str] = []
        while True:
            consumers = self.reader.consumers[node]
            if len(consumers) != 1:
                raise self.refuse(node, f"its integer output has {len(consumers)} consumers and no quantizer")
            node = consumers[0]
            op = self.reader[node]
            if op.kind == "output":
                return None
            if isinstance(op.module, ActivationQuantizer):
                return clip_target(op.module, clips)
            if op.kind in ("relu", "relu6"):
                clips.append(op.kind)
            elif op.kind not in TRANSPARENT and op.kind != "batch_norm":
                raise self.refuse(node, "it reads an integer tensor that has no quantizer")

    def need_target(self, node: fx.Node) -> Target:
        """As :meth:`target`, for operators that only layers are exempt from being quantized after."""
        target = self.target(node)
        assert target is not None, "quantize puts a quantizer before the output"
        return target

    def requantize(self, value: Value, target: Target, wish: str) -> Value:
        """The value on another grid."""
        factor = requant(value.type.scale / target.scale, wish)
        made = self.emit(
            ir.Requantize(
                name=self.name(wish),
                inputs=(value.name,),
                type=target.type(value.type.shape),
                requant=factor,
                input_zero_point=value.type.zero_point,
            ),
            target.grid,
        )
        return Value(made.name, made.type, made.grid, value.index)

    def as_float(self, value: Value) -> Value:
        """The float32 value of an integer tensor: one Dequantize for all that read it."""
        kind = value.type
        if not kind.is_integer:
            return value
        if value.scale is not None:
            scale, zero_point = value.scale, 0
            value = self.in_place(value)
            repeat = value.type.shape[0] // len(scale)  # accumulators that were flattened
            scale = scale.repeat_interleave(repeat).to(torch.float32)
        else:
            scale, zero_point = torch.tensor(kind.scale, dtype=torch.float32), kind.zero_point
        if value.name not in self.floats:
            name = self.name(f"{value.name}.dequantize")
            self.floats[value.name] = self.emit(
                ir.Dequantize(
                    name=name,
                    inputs=(value.name,),
                    type=ir.TensorType(value.type.shape),
                    scale=scale,
                    zero_point=zero_point,
                )
            )
        made = self.floats[value.name]
        return Value(made.name, made.type, None, value.index)

    def in_place(self, value: Value, node: fx.Node | None = None) -> Value:
        """The value with all of its elements where they belong: what moved them becomes an IR node.

        Raises:
            UnsupportedModelError: the elements moved in a way that no IR node has.
        """
        if value.index is None:
            return value
        index, shape = value.index, value.type.shape
        where = self.label(node) if node is not None else value.name
        if not isinstance(index, torch.Tensor):
            raise UnsupportedModelError(f"{where!r} reads several tensors as one; take one of them by its number")
        key = (value.name, index.numpy().tobytes(), value.shape)
        if key not in self.moved:
            self.moved[key] = self._move(value, index, shape, where)
        return self.moved[key]

    def _move(self, value: Value, index: torch.Tensor, shape: tuple[int, ...], where: str) -> Value:
        bare = Value(value.name, value.type, value.grid, None, (), value.scale)
        if movement.is_reshape(index, shape) and _is_flat(value.shape, shape):
            return bare if value.shape == shape else self._flatten(bare, value.shape)
        candidate = _selected_shape(value.shape, shape)
        found = None if candidate is None else movement.select(index.reshape(2, *candidate), shape)
        if candidate is not None and found is not None:
            made = self._gather(bare, found, candidate)
            return made if candidate == value.shape else self._flatten(made, value.shape)
        raise UnsupportedModelError(
            f"{where!r}: the elements of a {shape} tensor are brought into the order of a {value.shape} one in a way "
            "that is no flattening and no selection of channels, rows or columns; keep that out of the network"
        )

    def _gather(self, value: Value, found: movement.Selection, shape: tuple[int, ...]) -> Value:
        if found.is_identity:
            return value
        kind = ir.TensorType(shape, value.type.low, value.type.high, value.type.scale, value.type.zero_point)
        node = ir.Gather(
            name=self.name(f"{value.name}.gather"),
            inputs=(value.name,),
            type=kind,
            channels=found.channels,
            rows=found.rows,
            columns=found.columns,
        )
        scale = value.scale if value.scale is None or found.channels is None else value.scale[found.channels]
        made = self.emit(node, value.grid)
        return Value(made.name, made.type, made.grid, None, (), scale)

    def _flatten(self, value: Value, shape: tuple[int, ...]) -> Value:
        kind = ir.TensorType(shape, value.type.low, value.type.high, value.type.scale, value.type.zero_point)
        made = self.emit(
            ir.Flatten(name=self.name(f"{value.name}.flatten"), inputs=(value.name,), type=kind), value.grid
        )
        return Value(made.name, made.type, made.grid, None, (), value.scale)

    def graph(self, output: str) -> IntegerGraph:
        """What was built, as far as the output depends on it."""
        order = {name: self.bits[name] for name in self.model.bits if name in self.bits}
        return IntegerGraph(reachable(self.nodes, output), order)


def _is_flat(shape: tuple[int, ...], source: tuple[int, ...]) -> bool:
    """Whether a reshape is what the IR's Flatten does: to one dimension, or a vector to ``(channels, 1, 1)``."""
    return shape == source or len(shape) == 1 or (len(shape) == 3 and shape[1:] == (1, 1) and len(source) == 1)


def _selected_shape(shape: tuple[int, ...], source: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a selection that, perhaps flattened, gives ``shape``; None if there is none."""
    if len(shape) == len(source):
        return shape
    if len(shape) == 1 and shape[0] % torch.Size(source[1:]).numel() == 0:
        return (shape[0] // torch.Size(source[1:]).numel(), *source[1:])
    if len(source) == 1 and len(shape) == 3 and shape[1:] == (1, 1):
        return shape[:1]
    return None


def reachable(nodes: list[ir.Node], output: str) -> tuple[ir.Node, ...]:
    """The nodes that the output depends on and the input, in order, the output last."""
    wanted = {output}
    for node in reversed(nodes):
        if node.name in wanted:
            wanted.update(node.inputs)
    kept = [n for n in nodes if (n.name in wanted and n.name != output) or isinstance(n, ir.Input)]
    return (*kept, *(n for n in nodes if n.name == output and not isinstance(n, ir.Input)))
