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

_MOVEMENTS: tuple[Any, ...] = (
    operator.getitem, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.transpose, torch.permute,
    torch.swapaxes, torch.chunk, torch.split, torch.tensor_split, torch.unbind, torch.narrow, torch.flip,
    torch.channel_shuffle, functional.channel_shuffle, functional.pixel_shuffle, functional.pixel_unshuffle,
    "flatten", "view", "reshape", "squeeze", "unsqueeze", "transpose", "permute", "swapaxes", "chunk", "split",
    "tensor_split", "unbind", "narrow", "flip", "expand", "unflatten",
    "expand_as", "view_as", "reshape_as",  # the second tensor gives its shape alone
    nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle,
)  # fmt: skip
# Functions, names of methods, and classes of modules.
_SPELLINGS: dict[str, tuple[Any, ...]] = {
    "quantizer": (ActivationQuantizer,),
    "layer": (nn.Conv2d, nn.Linear),
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d),
    "max_pool": (functional.max_pool2d, torch.max_pool2d, nn.MaxPool2d),
    "adaptive_max_pool": (functional.adaptive_max_pool2d, nn.AdaptiveMaxPool2d),
    "amax": (torch.amax, "amax"),
    "avg_pool": (functional.avg_pool2d, nn.AvgPool2d),
    "adaptive_avg_pool": (functional.adaptive_avg_pool2d, nn.AdaptiveAvgPool2d),
    "mean": (torch.mean, "mean"),
    "concat": (torch.cat, torch.concat),
    "movement": _MOVEMENTS,
    "dropout": (functional.dropout, nn.Dropout, nn.Dropout2d),
    "identity": ("contiguous", "detach", "clone", nn.Identity),
    "add": (operator.add, operator.sub, torch.add, torch.sub, "add", "sub"),
    "mul": (operator.mul, torch.mul, "mul"),
    "div": (operator.truediv, torch.div, "div"),
}
_KINDS = {spelling: kind for kind, spellings in _SPELLINGS.items() for spelling in spellings}
# Of torchvision and timm: identities in eval mode that drop whole branches or regions in training.
STOCHASTIC = frozenset({"StochasticDepth", "DropPath", "DropBlock2d"})
_SIZE_METHODS = frozenset({"size", "dim", "ndimension", "numel"})
_COLLECTIONS = frozenset({"chunk", "split", "tensor_split", "unbind"})
_ARGUMENTS = {
    "max_pool": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg_pool": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool": ("input", "output_size"),
    "adaptive_max_pool": ("input", "output_size", "return_indices"),
    "amax": ("input", "dim", "keepdim"),
    "mean": ("input", "dim", "keepdim", "dtype"),
    "concat": ("input", "dim"),
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
        kind = next((_KINDS[cls] for cls in type(module).__mro__ if cls in _KINDS), "other")
        if kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"):
            options = {name: getattr(module, name) for name in _ARGUMENTS[kind] if hasattr(module, name)}
            return Op("other" if options.get("return_indices") else kind, tensors, options, module)
        if kind != "other" or len(tensors) != 1:
            return Op(kind, tensors, {}, module)
        if type(module).__name__ in STOCHASTIC:
            return Op("dropout", tensors, {}, module)
        is_padding = isinstance(module, nn.ConstantPad2d) and module.value == 0
        if is_padding or (isinstance(module, nn.Upsample) and module.mode == "nearest"):
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
        kind = _KINDS.get(node.target, "other")
        if kind in ("add", "mul", "div"):
            return self._arithmetic(node, kind, tensors)
        options = _arguments(node, _ARGUMENTS.get(kind, ("input",)))
        options.pop("input", None)
        if kind == "concat":
            dim = options.get("dim", options.get("axis", 0))
            return Op("concat" if dim in (1, -3) else "other", tensors, {"dim": dim})
        if kind == "amax":
            is_pooling = _is_spatial(options.get("dim")) and options.get("keepdim", False)
            return Op("adaptive_max_pool" if is_pooling else "other", tensors, {"output_size": 1})
        if (kind == "mean" and not _is_spatial(options.get("dim"))) or options.get("return_indices", False):
            kind = "other"
        return Op(kind, tensors, options)

    def _arithmetic(self, node: fx.Node, kind: str, tensors: tuple[fx.Node, ...]) -> Op:
        """A sum, difference, product or quotient: of two tensors, or of a tensor and a constant of the network."""
        operation = target_name(node).removeprefix("true")
        operands = (*node.args, *(value for key, value in node.kwargs.items() if key == "other"))
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
        return self[node].kind == "movement" and node.op != "call_module" and target_name(node) in _COLLECTIONS

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


def target_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls, or the path of its module."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """A call's arguments by name, the positional ones by the given names."""
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _pointwise(found: pointwise.Pointwise | None, tensors: tuple[fx.Node, ...], module: nn.Module | None = None) -> Op:
    if found is None:
        return Op("other", tensors, {}, module)
    clips: dict[tuple[float, ...], str] = {(0.0, 6.0): "relu6", (0.0, float("inf")): "relu"}
    name = clips.get(found.parameters, found.name) if found.name == "clamp" else found.name
    if name in ("relu", "relu6"):
        return Op(name, tensors, {}, module)
    return Op("function", tensors, {"pointwise": found}, module)


def _is_movement(node: fx.Node) -> bool:
    if node.target is functional.pad:
        options = _arguments(node, ("input", "pad", "mode", "value"))
        return bool(options.get("mode", "constant") == "constant" and not options.get("value"))
    if node.target is functional.interpolate:
        return bool(_arguments(node, ("input", "size", "scale_factor", "mode")).get("mode", "nearest") == "nearest")
    return _KINDS.get(node.target) == "movement"


def _is_spatial(dims: Any) -> bool:
    return isinstance(dims, tuple | list) and sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3]
