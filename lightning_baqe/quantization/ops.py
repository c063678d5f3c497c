"""What each node of a traced graph is, whichever of torch's many spellings was used.

| kind | what |
| --- | --- |
| input, output, quantizer | |
| layer | conv or linear |
| batch_norm | |
| add, mul | of two tensors; ``options["sign"]`` of a sum's second operand is 1 or -1 |
| affine | one tensor and a constant of the network: ``options``: ``operation``, ``constant``, ``reversed`` |
| function | pointwise, of one tensor: ``options["pointwise"]`` |
| avg_pool, adaptive_avg_pool, mean | |
| concat | along the channels |
| relu, relu6, max_pool, adaptive_max_pool, movement, dropout, identity | transparent: they commute with quantization, \
since they only select, clip or rearrange elements |
| constant | a parameter or buffer, and what is computed from such alone |
| value | Python numbers such as ``x.size(0)`` |
| other | no integer meaning |
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from lightning_baqe.quantization import pointwise
from lightning_baqe.quantization.activation import ActivationQuantizer

TRANSPARENT = frozenset({"relu", "relu6", "max_pool", "adaptive_max_pool", "movement", "dropout", "identity", "concat"})

_MAX_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVG_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

_FUNCTIONS: dict[Any, str] = {
    functional.max_pool2d: "max_pool",
    torch.max_pool2d: "max_pool",
    functional.adaptive_max_pool2d: "adaptive_max_pool",
    torch.amax: "adaptive_max_pool",
    functional.avg_pool2d: "avg_pool",
    functional.adaptive_avg_pool2d: "adaptive_avg_pool",
    torch.mean: "mean",
    torch.cat: "concat",
    torch.concat: "concat",
    functional.dropout: "dropout",
    operator.add: "add",
    torch.add: "add",
    operator.sub: "add",
    torch.sub: "add",
    operator.mul: "mul",
    torch.mul: "mul",
    operator.truediv: "div",
    torch.div: "div",
}
_MOVEMENTS: frozenset[Any] = frozenset(
    {
        operator.getitem, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.transpose, torch.permute,
        torch.swapaxes, torch.chunk, torch.split, torch.tensor_split, torch.unbind, torch.narrow, torch.flip,
        torch.channel_shuffle, functional.channel_shuffle, functional.pixel_shuffle, functional.pixel_unshuffle,
    }
)  # fmt: skip
_MOVEMENT_METHODS = frozenset(
    {
        "flatten", "view", "reshape", "squeeze", "unsqueeze", "transpose", "permute", "swapaxes", "chunk", "split",
        "tensor_split", "unbind", "narrow", "flip", "expand", "unflatten",
    }
)  # fmt: skip
# The second tensor gives its shape alone.
_SHAPED_LIKE = frozenset({"expand_as", "view_as", "reshape_as"})
_METHODS = {
    "mean": "mean",
    "amax": "adaptive_max_pool",
    "add": "add",
    "sub": "add",
    "mul": "mul",
    "div": "div",
    "contiguous": "identity",
    "detach": "identity",
    "clone": "identity",
}
_MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (ActivationQuantizer, "quantizer"),
    (nn.Conv2d, "layer"),
    (nn.Linear, "layer"),
    (nn.BatchNorm2d, "batch_norm"),
    (nn.BatchNorm1d, "batch_norm"),
    (nn.MaxPool2d, "max_pool"),
    (nn.AdaptiveMaxPool2d, "adaptive_max_pool"),
    (nn.AvgPool2d, "avg_pool"),
    (nn.AdaptiveAvgPool2d, "adaptive_avg_pool"),
    (nn.Flatten, "movement"),
    (nn.Unflatten, "movement"),
    (nn.ChannelShuffle, "movement"),
    (nn.PixelShuffle, "movement"),
    (nn.PixelUnshuffle, "movement"),
    (nn.Dropout, "dropout"),
    (nn.Dropout2d, "dropout"),
    (nn.Identity, "identity"),
)
# Of torchvision and timm: identities in eval mode that drop whole branches or regions in training.
STOCHASTIC = frozenset({"StochasticDepth", "DropPath", "DropBlock2d"})
_SIZE_METHODS = frozenset({"size", "dim", "ndimension", "numel"})
_COLLECTIONS = frozenset({"chunk", "split", "tensor_split", "unbind"})
_NAMES = {
    "max_pool": _MAX_POOL,
    "avg_pool": _AVG_POOL,
    "adaptive_avg_pool": ("input", "output_size"),
    "adaptive_max_pool": ("input", "output_size", "return_indices"),
    "mean": ("input", "dim", "keepdim", "dtype"),
    "add": ("input", "other", "alpha"),
}


@dataclass(frozen=True)
class Op:
    """One operator.

    Args:
        kind: see the module's docstring.
        inputs: the tensors that it reads, in order, each once for each time it is read; constants are left out.
        options: its other arguments by torch's names; values may be nodes (of kind ``value`` or ``constant``).
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
        return tuple(n for n in found if self.ops[n].kind not in ("value", "constant"))

    def _read(self, node: fx.Node) -> Op:
        if node.op == "placeholder":
            return Op("input", (), {})
        if node.op == "get_attr":
            return Op("constant", (), {})
        tensors = self._tensors(node)
        if node.op == "output":
            return Op("output", tensors, {})
        if node.op == "call_module":
            return self._read_module(node, tensors)
        if self._is_value(node, tensors):
            constant = any(self.ops[source].kind == "constant" for source in node.all_input_nodes)
            return Op("constant" if constant else "value", (), {})
        return self._read_call(node, tensors)

    def _read_module(self, node: fx.Node, tensors: tuple[fx.Node, ...]) -> Op:
        module = self.modules.get_submodule(str(node.target))
        kind = next((kind for cls, kind in _MODULES if isinstance(module, cls)), "other")
        if kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"):
            options = {name: getattr(module, name) for name in _NAMES[kind][1:] if hasattr(module, name)}
            return Op("other" if options.get("return_indices") else kind, tensors, options, module)
        if kind != "other" or len(tensors) != 1:
            return Op(kind, tensors, {}, module)
        if type(module).__name__ in STOCHASTIC:
            return Op("dropout", tensors, {}, module)
        if isinstance(module, nn.Upsample) and module.mode == "nearest":
            return Op("movement", tensors, {}, module)
        if isinstance(module, nn.ZeroPad2d) or (isinstance(module, nn.ConstantPad2d) and module.value == 0):
            return Op("movement", tensors, {}, module)
        return _pointwise(pointwise.of_module(module), tensors, module)

    def _read_call(self, node: fx.Node, tensors: tuple[fx.Node, ...]) -> Op:
        if node.op not in ("call_function", "call_method"):
            return Op("other", tensors, {})
        if len(tensors) == 1 and not any(self.ops[n].kind == "constant" for n in node.all_input_nodes):
            args = tuple(None if arg is tensors[0] else arg for arg in node.args)
            kwargs = {key: value for key, value in node.kwargs.items() if value is not tensors[0]}
            found = None
            if not any(isinstance(value, fx.Node) for value in (*args, *kwargs.values())):
                found = pointwise.of_call(node.target, args, kwargs)
            if found is not None:
                return _pointwise(found, tensors)
        if _is_movement(node):
            return Op("movement", tensors[:1], {})
        table: Mapping[Any, str] = _FUNCTIONS if node.op == "call_function" else _METHODS
        kind = table.get(node.target, "other")
        if kind in ("add", "mul", "div"):
            return self._arithmetic(node, kind, tensors)
        names = _NAMES.get(kind, ("input",))
        options = dict(zip(names[1:], node.args[1:], strict=False)) | dict(node.kwargs)
        options.pop("input", None)
        if kind == "concat":
            dim = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0))
            return Op("concat" if dim in (1, -3) else "other", tensors, {"dim": dim})
        if kind == "mean" and not _is_spatial(options.get("dim")):
            kind = "other"
        if kind == "adaptive_max_pool" and "amax" in (node.target, getattr(node.target, "__name__", "")):
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            keep = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
            kind = kind if _is_spatial(dims) and keep else "other"
            options = {"output_size": 1}
        if kind in ("max_pool", "adaptive_max_pool") and options.get("return_indices", False):
            kind = "other"
        return Op(kind, tensors, options)

    def _arithmetic(self, node: fx.Node, kind: str, tensors: tuple[fx.Node, ...]) -> Op:
        """A sum, difference, product or quotient: of two tensors, or of a tensor and a constant of the network."""
        name = node.target if isinstance(node.target, str) else node.target.__name__
        operation = {"truediv": "div"}.get(name, name)
        operands = (*node.args, *(value for key, value in node.kwargs.items() if key in ("other",)))
        if len(operands) != 2 or node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            return Op("other", tensors, {})
        if len(tensors) == 2 and kind != "div":
            return Op(kind, tensors, {"sign": -1 if operation == "sub" else 1})
        constant = [arg for arg in operands if isinstance(arg, fx.Node) and self.ops[arg].kind == "constant"]
        if len(tensors) != 1 or len(constant) != 1:
            return Op("other", tensors, {})
        is_reversed = operands[0] is constant[0]
        if operation == "div" and is_reversed:
            return Op("other", tensors, {})
        return Op("affine", tensors, {"operation": operation, "constant": constant[0], "reversed": is_reversed})

    def _is_value(self, node: fx.Node, tensors: tuple[fx.Node, ...]) -> bool:
        if node.op == "call_method" and node.target in _SIZE_METHODS:
            return True
        if node.op == "call_function" and node.target is getattr:
            return node.args[1] in ("shape", "ndim", "device", "dtype")
        return node.op in ("call_function", "call_method") and not tensors and bool(node.all_input_nodes)

    def is_collection(self, node: fx.Node) -> bool:
        """Whether a node's output is several tensors, to be taken out one by one."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return self[node].kind == "movement" and node.op != "call_module" and name in _COLLECTIONS

    def is_attached(self, node: fx.Node) -> bool:
        """Whether a batch norm belongs to the layer right before it: that layer's output goes nowhere else."""
        op = self[node]
        if op.kind != "batch_norm":
            return False
        return self[op.inputs[0]].kind == "layer" and len(self.consumers[op.inputs[0]]) == 1

    def is_composed(self, node: fx.Node) -> bool:
        """Whether a function's only reader is another function: one table then stands for both."""
        following = self.consumers[node]
        return self[node].kind == "function" and len(following) == 1 and self[following[0]].kind == "function"


def _pointwise(found: pointwise.Pointwise | None, tensors: tuple[fx.Node, ...], module: nn.Module | None = None) -> Op:
    if found is None:
        return Op("other", tensors, {}, module)
    if found.name == "clamp" and found.parameters == (0.0, 6.0):
        return Op("relu6", tensors, {}, module)
    if found.name == "clamp" and found.parameters == (0.0, float("inf")):
        return Op("relu", tensors, {}, module)
    if found.name in ("relu", "relu6"):
        return Op(found.name, tensors, {}, module)
    return Op("function", tensors, {"pointwise": found}, module)


def _is_movement(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _MOVEMENT_METHODS or node.target in _SHAPED_LIKE
    if node.target is functional.pad:
        options = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
        return bool(options.get("mode", "constant") == "constant" and not options.get("value"))
    if node.target is functional.interpolate:
        names = ("input", "size", "scale_factor", "mode")
        options = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        return bool(options.get("mode", "nearest") == "nearest")
    return node.target in _MOVEMENTS


def _is_spatial(dims: Any) -> bool:
    return isinstance(dims, tuple | list) and sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]
