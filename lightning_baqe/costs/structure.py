"""What follows from bits alone, without weights: the size of a network, and which conversions its tensors need.

The rules are those of :func:`lightning_baqe.quantize` and of lowering: a tensor has one quantizer for each bit-width
that it is read at; all but the widest are requantized from it; float layers read it dequantized; what float layers
write is quantized for integer readers; a residual sum of integers ends a convolution where it can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lightning_baqe.integer.graph import MULTIPLIER_BYTES, SHIFT_BYTES, IntegerGraph, node_bytes
from lightning_baqe.integer.nodes import Conv, FloatConv, FloatLinear, Linear
from lightning_baqe.quantization.aten import origin
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import float_domain, plan
from lightning_baqe.quantization.ops import OpReader
from lightning_baqe.quantization.trace import trace

_LAYERS = (Conv, Linear, FloatConv, FloatLinear)
_POOLS = dict.fromkeys(("max_pool", "adaptive_max_pool"), "max_pool")
_POOLS |= dict.fromkeys(("avg_pool", "adaptive_avg_pool", "mean"), "avg_pool")


class Structure:
    """The operators of a float network, as far as bits decide what becomes of them.

    Args:
        net: the network; weights do not matter.
        input_shape: ``(channels, height, width)``.

    Raises:
        UnsupportedModelError: it cannot be traced.
    """

    def __init__(self, net: nn.Module, input_shape: tuple[int, ...]) -> None:
        network = trace(net.eval(), (torch.zeros(2, *input_shape),))
        self.reader = OpReader(network, network.graph)
        self.groups = {name: m.groups for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}

    def conversions(self, bits: BitConfig) -> Counter[str]:
        """How often each kernel without knobs is called: ``{"<operator> <channels>x<height>x<width>": times}``."""
        reader, in_float, found = self.reader, float_domain(self.reader, bits), Counter[str]()
        dequantized: set[fx.Node] = set()
        for node, op in reader.ops.items():
            if op.kind == "layer":
                if bits.of(origin(node).label).is_float and op.inputs[0] not in in_float:
                    dequantized.add(op.inputs[0])
            elif op.kind == "add":
                if node in in_float:
                    found[f"float_add {_shape(node)}"] += 1
                elif not any(self._ends_with(source, bits, in_float) for source in op.inputs):
                    found[f"add {_shape(node)}"] += 1
            elif op.kind in ("relu", "relu6", "function") and node in in_float and not self._is_fused(node):
                found[f"float_function {_shape(node)}"] += 1
            elif op.kind in _POOLS:
                found[f"{'float_' if node in in_float else ''}{_POOLS[op.kind]} {_shape(node)}"] += 1
        found.update(f"dequantize {_shape(node)}" for node in dequantized)
        for tensor, widths in self._widths(bits).items():
            if tensor in in_float and reader[tensor].kind != "input":
                found[f"quantize {_shape(tensor)}"] += 1
            if len(widths) > 1:
                found[f"requantize {_shape(tensor)}"] += len(widths) - 1
        return found

    def requantizations(self, bits: BitConfig) -> int:
        """How many tensors are brought from one grid to another."""
        return sum(len(widths) - 1 for widths in self._widths(bits).values())

    def integer_operators(self, bits: BitConfig) -> set[str]:
        """Names of the operators without weights whose operands are integers."""
        in_float = float_domain(self.reader, bits)
        return {node.name for node in self.reader.ops if node not in in_float}

    def _widths(self, bits: BitConfig) -> dict[fx.Node, set[int]]:
        found: dict[fx.Node, set[int]] = {}
        for (tensor, _), width in plan(self.reader, bits).items():
            found.setdefault(tensor, set()).add(width)
        return found

    def _ends_with(self, tensor: fx.Node, bits: BitConfig, in_float: set[fx.Node]) -> bool:
        """Whether a tensor that a sum reads comes from an integer convolution, which then computes the sum itself."""
        node = tensor
        while len(self.reader.consumers[node]) == 1:
            op = self.reader[node]
            if op.kind == "layer":
                path = origin(node).label
                return not bits.of(path).is_float and self.groups.get(path) == 1
            if not (self.reader.is_attached(node) or op.kind in ("relu", "relu6", "identity", "dropout")):
                return False
            node = op.inputs[0]
        return False

    def _is_fused(self, node: fx.Node) -> bool:
        """Whether the float kernel before a ReLU computes it, too."""
        source = self.reader[node].inputs[0]
        while self.reader.is_attached(source) or self.reader[source].kind in ("identity", "dropout"):
            source = self.reader[source].inputs[0]
        alone = len(self.reader.consumers[self.reader[node].inputs[0]]) == 1
        return self.reader[node].kind == "relu" and alone and self.reader[source].kind in ("layer", "add")


def _shape(node: fx.Node) -> str:
    shape = origin(node).shape[1:]
    return "x".join(map(str, (*shape, 1, 1)[:3] if len(shape) == 1 else shape))


@dataclass(frozen=True)
class SizeTable:
    """Bytes of everything that a deployed network holds.

    Args:
        layers: ``{layer: {bits: bytes}}``.
        operators: ``{operator without weights: bytes where its operands are integers}``; in float it holds none.
    """

    layers: Mapping[str, Mapping[int, int]]
    operators: Mapping[str, int]

    @classmethod
    def of(cls, graphs: Mapping[int, IntegerGraph], labels: Mapping[str, str]) -> SizeTable:
        """The table of a network, from its graphs at uniform bits, 8 among them.

        Args:
            graphs: ``{bits: graph}``.
            labels: ``{operator's name in the traced network: its name in the graphs}``.
        """
        layers: dict[str, dict[int, int]] = {}
        for graph in graphs.values():
            for node in graph:
                if isinstance(node, _LAYERS) and node.layer in graph.bits:
                    layers.setdefault(node.layer, {})[graph.bits[node.layer][1]] = node_bytes(node)
        by_name = {node.name: node_bytes(node) for node in graphs[8] if not isinstance(node, _LAYERS)}
        operators = {name: by_name[label] for name, label in labels.items() if by_name.get(label)}
        return cls(layers, operators)

    def size_bytes(self, structure: Structure, bits: BitConfig) -> int:
        """As :attr:`IntegerGraph.size_bytes` of the lowered network."""
        own = sum(self.layers[name][layer.activation] for name, layer in bits.items())
        integers = structure.integer_operators(bits)
        rest = sum(size for name, size in self.operators.items() if name in integers)
        return own + rest + structure.requantizations(bits) * (MULTIPLIER_BYTES + SHIFT_BYTES)

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "layers": {name: {str(b): size for b, size in sizes.items()} for name, sizes in self.layers.items()},
            "operators": dict(self.operators),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> SizeTable:
        """Of :meth:`record`."""
        layers = {name: {int(b): size for b, size in sizes.items()} for name, sizes in record["layers"].items()}
        return cls(layers, record["operators"])
