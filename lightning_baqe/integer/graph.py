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
from lightning_baqe.integer.nodes import (
    Add,
    Affine,
    FloatAdd,
    FloatAffine,
    FloatFunction,
    FloatLayer,
    FloatMul,
    FloatPRelu,
    Input,
    Layer,
    Literal,
    Node,
    Quantize,
    Table,
    TensorType,
)
from lightning_baqe.integer.proof import prove, prove_returned

MULTIPLIER_BYTES, SHIFT_BYTES, BIAS_BYTES, OFFSET_BYTES = 4, 1, 4, 8
_ELEMENTWISE = (FloatAdd, FloatAffine, FloatFunction, FloatMul)  # floats without weights


@dataclass(frozen=True, eq=False)
class IntegerGraph:
    """Operators in topological order.

    Args:
        nodes: the operators; the first is the only :class:`~lightning_baqe.integer.nodes.Input`, the last the output.
        bits: ``{layer: (weight bits, activation bits)}`` in network order, 32 = float. Weights have one number, or one
            for each output channel.
        returned: the shape in which the network returns the output, elements in the same order; None: as it is.

    Raises:
        ConfigError: names are not unique, a node reads what is computed later or nowhere, or is not what it says, see
            :mod:`lightning_baqe.integer.proof`.
    """

    nodes: tuple[Node, ...]
    bits: Mapping[str, tuple[int | tuple[int, ...], int]]
    returned: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        seen: dict[str, TensorType] = {}
        for node in self.nodes:
            if node.name in seen:
                raise ConfigError(f"two nodes are named {node.name!r}")
            missing = [name for name in node.inputs if name not in seen]
            if missing:
                raise ConfigError(f"node {node.name!r} reads {missing}, which no earlier node computes")
            prove(node, [seen[name] for name in node.inputs])
            seen[node.name] = node.type
        if not self.nodes or not isinstance(self.nodes[0], Input) or any(isinstance(n, Input) for n in self.nodes[1:]):
            raise ConfigError("a graph begins with its one Input")
        prove_returned(self.output, self.returned)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one image, as the caller gives it; of several inputs the number of all their elements."""
        first = self.nodes[0]
        assert isinstance(first, Input)
        return first.given or first.type.shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one image's output, as the network returns it."""
        return self.output.type.shape if self.returned is None else self.returned

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    @torch.no_grad()
    def run(self, x: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits of a batch.

        Args:
            x: float, shape ``(n, *input_shape)``, on any device; computed on the CPU. A tuple for several inputs.

        Returns:
            float32, shape ``(n, *output_shape)``.

        Raises:
            ConfigError: no tensor, or its shape or type does not fit.
        """
        found = self.run_all(x, keep=False)[self.output.name]
        return found.reshape(len(found), *self.output_shape)

    @torch.no_grad()
    def run_all(self, x: torch.Tensor | Sequence[torch.Tensor], keep: bool = True) -> dict[str, torch.Tensor]:
        """Every node's value by name: integers as int64, floats as float32.

        Args:
            x: as for :meth:`run`.
            keep: False frees values that no later node reads.
        """
        x = as_images(x, self, "graph")
        values: dict[str, torch.Tensor] = {}
        last_use = {name: node.name for node in self.nodes for name in node.inputs}
        for node in self.nodes:
            values[node.name] = evaluate(node, [values[name] for name in node.inputs], x)
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
        return IntegerGraph(tuple(nodes), self.bits, self.returned)

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
        """Whether no float arithmetic happens between the input's quantize and the output's dequantize.

        What is done to each element of the float input alone before it is quantized (the normalisation of a picture's
        bytes, say) lies before it; layers never do.
        """
        before = self._before_quantize()
        return not any(node.is_float and node.name not in before for node in self.nodes)

    def _before_quantize(self) -> set[str]:
        """Values of the input alone that only quantizations read, perhaps through others of the kind."""
        found: set[str] = set()
        for node in self.nodes:
            moves = not (node.is_float or node.type.is_integer)
            if (moves or isinstance(node, _ELEMENTWISE)) and found.issuperset(node.inputs):
                found.add(node.name)
        for node in reversed(self.nodes):
            if (node is self.output or node.name not in found) and not isinstance(node, Quantize):
                found.difference_update(node.inputs, {node.name})
        return found

    @property
    def size_bytes(self) -> int:
        """Bytes of packed weights, int32 biases, requantization numbers, tables and literals; of float layers and
        operators all their constants.

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
            int(node_macs(node) * (node.mean_weight_bits * node.activation_bits if isinstance(node, Layer) else 1024))
            for node in self.nodes
        )


def evaluate(node: Node, inputs: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A node's value, ``(n, *type.shape)``, from those that it reads; the network's input ``x`` gives the batch."""
    if isinstance(node, Input):
        return node.run(x)
    return node.run(*inputs) if inputs else node.run().expand(len(x), *node.type.shape)


def node_bytes(node: Node) -> int:
    """Constants of one node, bytes; see :attr:`IntegerGraph.size_bytes`."""
    factors = [part for name in ("requant", "positive", "negative") if (part := getattr(node, name, None)) is not None]
    total = sum(MULTIPLIER_BYTES * part.multiplier.numel() + SHIFT_BYTES for part in factors)
    match node:
        case Literal():
            total += node.value.numel() * _bytes_of(node.type)
        case FloatPRelu():
            total += 4 * node.slope.numel()
        case FloatLayer():
            total += 4 * (node.weight.numel() + node.bias.numel())
        case FloatAffine():
            total += 4 * (node.gain.numel() + node.shift.numel())
        case FloatOperator():
            total += node.size_bytes
        case Add():
            total += 2 * MULTIPLIER_BYTES + SHIFT_BYTES
        case Table():
            total += node.table.numel() * _bytes_of(node.type)
        case Affine():
            total += OFFSET_BYTES * node.offset.numel()
        case Layer():
            total += math.ceil(node.weight.numel() * node.mean_weight_bits / 8) + BIAS_BYTES * node.bias.numel()
            total += 0 if node.fraction is None else MULTIPLIER_BYTES * node.fraction.numel()
    return total


def node_macs(node: Node) -> int:
    """Multiply-accumulates of one node per image; 0 for all but convs, linears and float matrix products."""
    if isinstance(node, FloatOperator):
        return node.macs
    return node.weight.numel() * math.prod(node.type.shape[1:]) if isinstance(node, Layer | FloatLayer) else 0


def _bytes_of(kind: TensorType) -> int:
    """Of one element: as many whole bytes as its range wants."""
    if not kind.is_integer:
        return 4
    low, high = kind.limits
    sign = low < 0
    return math.ceil((max((-low - 1) if sign else 0, high).bit_length() + sign) / 8)


def as_images(x: torch.Tensor | Sequence[torch.Tensor], graph: IntegerGraph, reader: str) -> torch.Tensor:
    """A network's input as it is computed on: float32, on the CPU, without a gradient.

    Args:
        x: float, ``(n, *graph.input_shape)``; integers where the network itself casts them. For several inputs a tuple
            of them, or all as this function returns them: ``(n, elements)``.
        graph: whose input it is.
        reader: ``"graph"`` or ``"artifact"``, for the message.

    Raises:
        ConfigError: it is something else. Integers, too, where nothing says whether they were to be scaled.
    """
    first, shape = graph.nodes[0], graph.input_shape
    assert isinstance(first, Input)
    wanted = f"the {reader} wants a float tensor of shape (n, {', '.join(map(str, shape))})"
    if first.parts and isinstance(x, tuple | list):
        return _packed(x, first, reader)
    if not isinstance(x, torch.Tensor):
        kind = type(x)
        advice = "torch.from_numpy(x)" if kind.__name__ == "ndarray" else "a tensor"
        raise ConfigError(f"x is a {kind.__module__}.{kind.__qualname__}, {wanted}: give {advice}")
    if x.is_meta or x.layout != torch.strided:
        raise ConfigError(
            f"x is on device {x.device} with layout {x.layout}, {wanted} that holds values: give a dense one"
        )
    if not x.is_floating_point() and not first.integers:
        raise ConfigError(
            f"x is {str(x.dtype).removeprefix('torch.')}, {wanted} as the network was trained on: scale and normalise "
            "x as in training, or give x.float() if it was trained on such numbers"
        )
    if tuple(x.shape[1:]) != tuple(shape) and first.parts:
        raise ConfigError(f"x is one tensor of shape {tuple(x.shape)}, {_tuple_of(first, reader)}")
    if tuple(x.shape[1:]) != tuple(shape):
        advice = ": give x[None] for one image" if tuple(x.shape) == tuple(shape) else ""
        raise ConfigError(f"input has shape {tuple(x.shape)}, {wanted}{advice}")
    return x.detach().to("cpu", torch.float32)


def _packed(given: Sequence[torch.Tensor], first: Input, reader: str) -> torch.Tensor:
    """Several inputs as the rows of one tensor."""
    tensors = [x for x in given if isinstance(x, torch.Tensor) and not x.is_meta and x.layout == torch.strided]
    shapes = [tuple(x.shape) for x in tensors]
    fits = len(tensors) == len(given) and [shape[1:] for shape in shapes] == list(first.parts)
    if not fits or len({shape[0] for shape in shapes}) != 1:
        raise ConfigError(f"x is a tuple of {shapes}, {_tuple_of(first, reader)}")
    if not first.integers and not all(x.is_floating_point() for x in tensors):
        kinds = [str(x.dtype).removeprefix("torch.") for x in tensors]
        raise ConfigError(f"x is a tuple of {kinds}, the {reader} wants floats: scale and normalise as in training")
    return torch.cat([x.detach().to("cpu", torch.float32).flatten(1) for x in tensors], 1)


def _tuple_of(first: Input, reader: str) -> str:
    shapes = ", ".join(f"(n, {', '.join(map(str, shape))})" for shape in first.parts)
    return f"the {reader} wants a tuple of {len(first.parts)} tensors with as many images each: {shapes}"
