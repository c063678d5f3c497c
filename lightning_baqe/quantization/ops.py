"""What each node of a traced graph is, whichever of torch's many spellings was used.

Kinds: ``input``, ``layer`` (conv, linear), ``batch_norm``, ``add``, ``avg_pool``, ``adaptive_avg_pool``, ``mean``,
``quantizer``, ``output``, the transparent ``relu``, ``relu6``, ``max_pool``, ``reshape``, ``dropout``, ``identity``
and ``item`` (they
commute with quantization: they only select, clip or rearrange elements), ``value`` (Python numbers such as
``x.size(0)``) and ``other``.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from lightning_baqe.quantization.activation import ActivationQuantizer

TRANSPARENT = frozenset({"relu", "relu6", "max_pool", "reshape", "dropout", "identity", "item"})

_MAX_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVG_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

_FUNCTIONS: dict[Any, str] = {
    functional.relu: "relu",
    torch.relu: "relu",
    functional.relu6: "relu6",
    functional.max_pool2d: "max_pool",
    torch.max_pool2d: "max_pool",
    functional.avg_pool2d: "avg_pool",
    functional.adaptive_avg_pool2d: "adaptive_avg_pool",
    torch.mean: "mean",
    torch.flatten: "reshape",
    torch.reshape: "reshape",
    torch.squeeze: "reshape",
    torch.unsqueeze: "reshape",
    functional.dropout: "dropout",
    operator.add: "add",
    torch.add: "add",
    operator.getitem: "item",
}
_METHODS = {
    "relu": "relu",
    "flatten": "reshape",
    "view": "reshape",
    "reshape": "reshape",
    "squeeze": "reshape",
    "unsqueeze": "reshape",
    "mean": "mean",
    "add": "add",
    "contiguous": "identity",
    "detach": "identity",
}
_MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (ActivationQuantizer, "quantizer"),
    (nn.Conv2d, "layer"),
    (nn.Linear, "layer"),
    (nn.BatchNorm2d, "batch_norm"),
    (nn.BatchNorm1d, "batch_norm"),
    (nn.ReLU6, "relu6"),
    (nn.ReLU, "relu"),
    (nn.MaxPool2d, "max_pool"),
    (nn.AvgPool2d, "avg_pool"),
    (nn.AdaptiveAvgPool2d, "adaptive_avg_pool"),
    (nn.Flatten, "reshape"),
    (nn.Dropout, "dropout"),
    (nn.Dropout2d, "dropout"),
    (nn.Identity, "identity"),
)
_SIZE_METHODS = frozenset({"size", "dim", "ndimension", "numel"})
_COLLECTIONS = frozenset({"chunk", "split", "tensor_split", "unbind"})
_NAMES = {
    "max_pool": _MAX_POOL,
    "avg_pool": _AVG_POOL,
    "adaptive_avg_pool": ("input", "output_size"),
    "mean": ("input", "dim", "keepdim", "dtype"),
    "add": ("input", "other", "alpha"),
}


@dataclass(frozen=True)
class Op:
    """One operator.

    Args:
        kind: see the module's docstring.
        inputs: the tensors that it reads, in order, each once for each time it is read.
        options: its other arguments by torch's names; values may be nodes (of kind ``value``).
        module: the module that is called, if one is.
    """

    kind: str
    inputs: tuple[fx.Node, ...]
    options: Mapping[str, Any]
    module: nn.Module | None = None


class OpReader:
    """Classifies the nodes of a graph and finds the consumers of each tensor.

    Args:
        modules: the root whose submodules ``call_module`` nodes name.
        graph: the traced graph.
    """

    def __init__(self, modules: nn.Module, graph: fx.Graph) -> None:
        self.modules = modules
        self.graph = graph
        self.ops: dict[fx.Node, Op] = {}
        self.consumers: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self.ops[node] = op = self._read(node)
            self.consumers[node] = []
            for source in dict.fromkeys(op.inputs):
                self.consumers[source].append(node)

    def __getitem__(self, node: fx.Node) -> Op:
        return self.ops[node]

    def _tensors(self, node: fx.Node) -> tuple[fx.Node, ...]:
        found: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n))
        return tuple(n for n in found if self.ops[n].kind != "value")

    def _read(self, node: fx.Node) -> Op:
        if node.op == "placeholder":
            return Op("input", (), {})
        tensors = self._tensors(node)
        if node.op == "output":
            return Op("output", tensors, {})
        if node.op == "call_module":
            module = self.modules.get_submodule(str(node.target))
            kind = next((kind for cls, kind in _MODULES if isinstance(module, cls)), "other")
            if isinstance(module, nn.AvgPool2d | nn.MaxPool2d | nn.AdaptiveAvgPool2d):
                options = {name: getattr(module, name) for name in _NAMES[kind][1:] if hasattr(module, name)}
                return Op(kind, tensors, options, module)
            return Op(kind, tensors, {}, module)
        if self._is_value(node, tensors):
            return Op("value", (), {})
        table: Mapping[Any, str] = _FUNCTIONS if node.op == "call_function" else _METHODS
        kind = table.get(node.target, "other") if node.op in ("call_function", "call_method") else "other"
        names = _NAMES.get(kind, ("input",))
        options = dict(zip(names[1:], node.args[1:], strict=False)) | dict(node.kwargs)
        options.pop("input", None)
        if kind == "add" and (len(tensors) != 2 or options.get("alpha", 1) != 1):
            kind = "other"
        if kind == "mean" and not _is_spatial(options.get("dim")):
            kind = "other"
        if kind == "max_pool" and options.get("return_indices", False):
            kind = "other"
        return Op(kind, tensors, options)

    def _is_value(self, node: fx.Node, tensors: tuple[fx.Node, ...]) -> bool:
        if node.op == "call_method" and node.target in _SIZE_METHODS:
            return True
        if node.op == "call_function" and node.target is getattr:
            return node.args[1] in ("shape", "ndim", "device", "dtype")
        return node.op == "call_function" and not tensors and bool(node.all_input_nodes)

    def is_collection(self, node: fx.Node) -> bool:
        """Whether a node's output is several tensors, to be taken out by ``item``."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return self[node].kind == "other" and name in _COLLECTIONS

    def is_attached(self, node: fx.Node) -> bool:
        """Whether a batch norm belongs to the layer right before it: that layer's output goes nowhere else."""
        op = self[node]
        if op.kind != "batch_norm":
            return False
        return self[op.inputs[0]].kind == "layer" and len(self.consumers[op.inputs[0]]) == 1


def _is_spatial(dims: Any) -> bool:
    return isinstance(dims, tuple | list) and sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]
