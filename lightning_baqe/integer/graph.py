"""The integer graph: what `lower` returns, `build` compiles, and the reference that compiled code must equal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lightning_baqe.errors import ConfigError
from lightning_baqe.integer.float_operators import FloatOperator
from lightning_baqe.integer.nodes import Add, Affine, FloatAffine, FloatLayer, Input, Layer, Node, Table, TensorType

MULTIPLIER_BYTES, SHIFT_BYTES, BIAS_BYTES, OFFSET_BYTES = 4, 1, 4, 8


@dataclass(frozen=True, eq=False)
class IntegerGraph:
    """Operators in topological order.

    Args:
        nodes: the operators; the first is the only :class:`~lightning_baqe.integer.nodes.Input`, the last the output.
        bits: ``{layer: (weight bits, activation bits)}`` in network order, 32 = float.

    Raises:
        ConfigError: names are not unique, or a node reads what is computed later or nowhere, or is no operand for it.
    """

    nodes: tuple[Node, ...]
    bits: Mapping[str, tuple[int, int]]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        known = {node.name: node for node in self.nodes}
        for node in self.nodes:
            if node.name in seen:
                raise ConfigError(f"two nodes are named {node.name!r}")
            missing = [name for name in node.inputs if name not in seen]
            if missing:
                raise ConfigError(f"node {node.name!r} reads {missing}, which no earlier node computes")
            if isinstance(node, FloatOperator):
                _check_operands(node, [known[name].type for name in node.inputs])
            seen.add(node.name)
        if not self.nodes or not isinstance(self.nodes[0], Input) or any(isinstance(n, Input) for n in self.nodes[1:]):
            raise ConfigError("a graph begins with its one Input")

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.nodes[0].type.shape

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    @torch.no_grad()
    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch.

        Args:
            x: float, shape ``(n, *input_shape)``.

        Returns:
            float32, shape ``(n, *output.type.shape)``.

        Raises:
            ConfigError: the shape does not fit.
        """
        return self.run_all(x, keep=False)[self.output.name]

    @torch.no_grad()
    def run_all(self, x: torch.Tensor, keep: bool = True) -> dict[str, torch.Tensor]:
        """Every node's value by name: integers as int64, floats as float32.

        Args:
            x: as for :meth:`run`.
            keep: False frees values that no later node reads.
        """
        if tuple(x.shape[1:]) != self.input_shape:
            raise ConfigError(
                f"input has shape {tuple(x.shape)}, the graph wants (n, {', '.join(map(str, self.input_shape))})"
            )
        values: dict[str, torch.Tensor] = {}
        last_use = {name: node.name for node in self.nodes for name in node.inputs}
        for node in self.nodes:
            values[node.name] = node.run(*(values[name] for name in node.inputs)) if node.inputs else node.run(x)
            if not keep:
                for name in set(node.inputs):
                    if last_use[name] == node.name:
                        del values[name]
        return values

    def with_int32_biases(self) -> IntegerGraph:
        """The graph whose biases are int32 alone, as HAWQ-V3, ONNX and most integer engines have them.

        What rounding took from each bias (``fraction`` of the layers), up to half a step of an accumulator, is dropped:
        a little less like the fake-quantized network, and what an exported model computes.
        """
        nodes = (replace(n, fraction=None) if isinstance(n, Layer) else n for n in self.nodes)
        return IntegerGraph(tuple(nodes), self.bits)

    def to_onnx(self, path: str | Path, **options: Any) -> Path:
        """Write the graph as an ONNX model, for devices that TVM does not reach.

        Args:
            path, options: see :func:`lightning_baqe.onnx.export.export_onnx`.

        Raises:
            ConfigError: onnx is not installed, or an option cannot be right.
            UnsupportedModelError: numbers that have no place in ONNX.
        """
        from lightning_baqe.onnx.export import export_onnx

        return export_onnx(self, path, **options)

    @property
    def is_integer_only(self) -> bool:
        """Whether no float arithmetic happens between the input's quantize and the output's dequantize."""
        return not any(node.is_float for node in self.nodes)

    @property
    def size_bytes(self) -> int:
        """Bytes of packed weights, int32 biases, requantization numbers and tables; of float layers and operators all
        their constants.

        Channel orders and pooling windows are structure, and part of the code.
        """
        return sum(node_bytes(node) for node in self.nodes)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all convs, linears and float matrix products, per image."""
        return sum(node_macs(node) for node in self.nodes)

    @property
    def bops(self) -> int:
        """Bit operations per image: weight bits x activation bits x MACs (HAWQ-V3 section III-E), float = 32 x 32."""
        return sum(
            node_macs(node) * (node.weight_bits * node.activation_bits if isinstance(node, Layer) else 1024)
            for node in self.nodes
        )


def _check_operands(node: FloatOperator, kinds: Sequence[TensorType]) -> None:
    for kind, shape in zip(kinds, node.shapes, strict=True):
        if kind.is_integer or math.prod(kind.shape) != math.prod(shape):
            raise ConfigError(
                f"node {node.name!r} reads {kind}, its operator wants floats of shape {shape}: dequantize the value, "
                "and give the shape that it has in the float network"
            )


def node_bytes(node: Node) -> int:
    """Constants of one node, bytes; see :attr:`IntegerGraph.size_bytes`."""
    factors = getattr(node, "requant", None)
    total = 0 if factors is None else MULTIPLIER_BYTES * factors.multiplier.numel() + SHIFT_BYTES
    match node:
        case FloatLayer():
            total += 4 * (node.weight.numel() + node.bias.numel())
        case FloatAffine():
            total += 4 * (node.gain.numel() + node.shift.numel())
        case FloatOperator():
            total += node.size_bytes
        case Add():
            total += 2 * MULTIPLIER_BYTES + SHIFT_BYTES
        case Table():
            total += node.table.numel() * math.ceil(node.type.limits[1].bit_length() / 8)
        case Affine():
            total += OFFSET_BYTES * node.offset.numel()
        case Layer():
            total += math.ceil(node.weight.numel() * node.weight_bits / 8) + BIAS_BYTES * node.bias.numel()
            total += 0 if node.fraction is None else MULTIPLIER_BYTES * node.fraction.numel()
    return total


def node_macs(node: Node) -> int:
    """Multiply-accumulates of one node per image; 0 for all but convs, linears and float matrix products."""
    if isinstance(node, FloatOperator):
        return node.macs
    return node.weight.numel() * math.prod(node.type.shape[1:]) if isinstance(node, Layer | FloatLayer) else 0
