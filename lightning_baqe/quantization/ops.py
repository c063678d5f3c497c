"""What each node of a traced graph is, whichever of PyTorch's many spellings was used.

| kind | what |
| --- | --- |
| input, output, quantizer | |
| layer | conv or linear |
| batch_norm | |
| add, mul | of two tensors; ``options["sign"]`` of a sum's second operand is 1 or -1 |
| affine | one tensor and a constant by channel: ``options``: ``operation``, ``constant``, ``reversed`` |
| function | pointwise, of one tensor: ``options["expression"]``; ``options["parts"]``: all nodes that it is made of |
| prelu | a slope by channel for what is negative: ``options["weight"]`` |
| avg_pool, adaptive_avg_pool, mean, sum, amax | |
| concat | along ``options["dim"]`` |
| relu, relu6, max_pool, adaptive_max_pool, movement, dropout, identity | transparent: they commute with quantization, \
since they only select, clip or rearrange elements |
| literal | a constant that is an operand like any tensor |
| constant | a parameter or buffer, and what is computed from such alone |
| value | Python numbers such as ``x.size(0)`` |
| part | a step of later functions, which compute it themselves |
| other | no integer meaning |
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.aten import COLLECTIONS, KINDS, STOCHASTIC, bound, is_python, name_of, origin
from lightning_baqe.quantization.pointwise import Step, clip_of, is_pointwise, step_name

TRANSPARENT = frozenset({
    "relu", "relu6", "max_pool", "adaptive_max_pool", "amax", "movement", "dropout", "identity", "concat",
})  # fmt: skip
_MODULES: dict[type[nn.Module], str] = {
    ActivationQuantizer: "quantizer",
    nn.Conv1d: "layer",
    nn.Conv2d: "layer",
    nn.ConvTranspose2d: "layer",
    nn.Linear: "layer",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.Dropout: "dropout",
    nn.Dropout2d: "dropout",
    nn.AlphaDropout: "dropout",
    nn.FeatureAlphaDropout: "dropout",
    nn.Identity: "identity",
}
_AFFINE = ("batch_norm", "affine")
_CLIPS = {(0.0, float("inf")): "relu", (0.0, 6.0): "relu6"}


@dataclass(frozen=True)
class Op:
    """One operator.

    Args:
        kind: see the module's docstring.
        inputs: the tensors that it reads, in order, each once for each time it is read; constants are left out.
        options: its other arguments by ATen's names; values may be nodes (of kind ``value`` or ``constant``).
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
        graph: what :func:`lightning_baqe.quantization.trace.trace` returned, perhaps with quantizers in it.
    """

    def __init__(self, modules: nn.Module, graph: fx.Graph) -> None:
        self.modules = modules
        self.graph = graph
        self.ops: dict[fx.Node, Op] = {}
        self.consumers: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.nodes}
        self._order = {node: place for place, node in enumerate(graph.nodes)}
        self._roots: dict[
            fx.Node, list[fx.Node]
        ] = {}  # of pointwise nodes: what they are an expression of, latest last
        for node in graph.nodes:
            self.ops[node] = self._read(node)
        self._read_expressions()
        for node, op in self.ops.items():
            for source in dict.fromkeys(op.inputs):
                self.consumers[source].append(node)

    def __getitem__(self, node: fx.Node) -> Op:
        return self.ops[node]

    def _tensors(self, node: fx.Node) -> tuple[fx.Node, ...]:
        found: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n))
        return tuple(n for n in found if self.ops[n].kind not in ("value", "constant"))

    # -- one node -----------------------------------------------------------------------------------------------------

    def _read(self, node: fx.Node) -> Op:
        if node.op == "placeholder":
            return Op("input", (), {})
        if node.op == "get_attr":
            return Op("constant", (), {})
        module = self.modules.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer):
            self._make_literal(node.all_input_nodes[0])
        tensors = self._tensors(node)
        if node.op == "output":
            return Op("output", tensors, {})
        fixed = all(self.ops[source].kind == "literal" for source in tensors)
        if module is not None and fixed and not isinstance(module, ActivationQuantizer):
            return Op("constant", (), {})  # a layer of constants
        if module is not None:
            kind = next((_MODULES[cls] for cls in type(module).__mro__ if cls in _MODULES), "other")
            by_chance = f"{type(module).__module__}.{type(module).__qualname__}" in STOCHASTIC
            return Op("dropout" if by_chance else kind, tensors, {}, module)
        if is_python(node):
            return Op("value", (), {})
        if fixed:
            constant = any(self.ops[source].kind in ("constant", "literal") for source in node.all_input_nodes)
            return Op("constant" if constant or not node.all_input_nodes else "value", (), {})
        return self._read_call(node, tensors)

    def _read_call(self, node: fx.Node, tensors: tuple[fx.Node, ...]) -> Op:
        options, name = bound(node), name_of(node)
        kind = "movement" if node.target is operator.getitem else KINDS.get(name, "other")
        if kind == "concat":
            return self._concat(node, options)
        if kind == "prelu":
            return Op(kind, tensors, {"weight": options["weight"]}) if len(tensors) == 1 else Op("other", tensors, {})
        if kind in ("add", "mul", "div") or is_pointwise(node.target):
            return self._pointwise(node, kind, name, tensors, options)
        if kind == "movement":
            return Op("other" if _fills(node, name, options) else kind, tensors[:1], {})
        if kind in ("mean", "sum", "amax"):
            dims = options.get("dim")
            dims = [dims] if isinstance(dims, int) else list(dims or ())
            count = len(origin(tensors[0]).shape)
            numbers = tuple(sorted(dim % count for dim in dims)) if count else ()
            known = bool(numbers) and 0 not in numbers
            return Op(kind if known else "other", tensors, {"dim": numbers, "keepdim": options.get("keepdim", False)})
        options = {key: value for key, value in options.items() if key not in ("self", "input")}
        return Op(kind, tensors, options)

    def _concat(self, node: fx.Node, options: Mapping[str, Any]) -> Op:
        """Constants among the parts are literals: operands like any tensor."""
        parts = tuple(options["tensors"])
        dim, count = options.get("dim", 0), len(origin(node).shape)
        for part in parts:
            self._make_literal(part)
        dim = dim % count if count else dim
        return Op("concat" if dim else "other", parts, {"dim": dim})

    def _make_literal(self, node: fx.Node) -> None:
        if self.ops[node].kind == "constant":
            self.ops[node] = Op("literal", (), {})

    def _pointwise(
        self, node: fx.Node, kind: str, name: str, tensors: tuple[fx.Node, ...], options: Mapping[str, Any]
    ) -> Op:
        """An expression of one tensor where it is one, else a sum, difference, product or quotient."""
        constants = [n for n in node.all_input_nodes if self.ops[n].kind == "constant"]
        if is_pointwise(node.target) and all(_numel(self.modules, n) == 1 for n in constants):
            common = self._common_roots(tensors)
            if common:
                self._roots[node] = common
                return Op("function", tensors, {})
        finite = all(_is_finite(self.modules, n) for n in constants)  # a mask of -inf is nothing that a grid holds
        plain = options.get("alpha", 1) == 1 and options.get("rounding_mode") is None and finite
        if kind not in ("add", "mul", "div") or not plain:
            return Op("other", tensors, {})
        operands = (options["self"], options["other"])
        if not all(isinstance(operand, fx.Node) for operand in operands):
            return Op("other", tensors, {})
        if len(constants) == 1 and len(tensors) == 1:
            place = _varies_along(origin(node).shape, _shape(self.modules, constants[0]))
            count = len(origin(node).shape)
            if place is not None and place in (1, count - 1) and origin(tensors[0]).shape == origin(node).shape:
                is_reversed = (operands[0] is constants[0]) != (name == "rsub")
                operation = "sub" if name == "rsub" else name
                if operation == "div" and is_reversed:
                    return Op("other", tensors, {})
                options = {"operation": operation, "constant": constants[0], "reversed": is_reversed, "dim": place}
                return Op("affine", tensors, options)
            if kind == "div":
                return Op("other", tensors, {})
            self._make_literal(constants[0])
        if kind == "div":
            return Op("other", tensors, {})
        ordered = operands[::-1] if name == "rsub" else operands
        return Op(kind, cast(tuple[fx.Node, ...], ordered), {"sign": -1 if name in ("sub", "rsub") else 1})

    # -- expressions --------------------------------------------------------------------------------------------------

    def _common_roots(self, tensors: tuple[fx.Node, ...]) -> list[fx.Node]:
        """The tensors that all of the given ones are an expression of, in the graph's order."""
        chains = [{source, *self._roots.get(source, ())} for source in tensors]
        return sorted(set.intersection(*chains), key=self._order.__getitem__)

    def _read_expressions(self) -> None:
        """Give each function the tensor that it starts from, and find the nodes that are parts of functions alone."""
        readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.ops}
        for node, op in self.ops.items():
            for source in dict.fromkeys(op.inputs):
                readers[source].append(node)
        needed: set[fx.Node] = set()
        for node in reversed(list(self.graph.nodes)):
            op = self.ops[node]
            if op.kind != "function":
                needed.update(op.inputs)
            elif node in needed:
                is_truth = origin(node).dtype == "bool"  # which no grid holds
                found = Op("other", self._tensors(node), {}) if is_truth else self._expression(node, readers)
                self.ops[node] = found
                needed.update(found.inputs)
        for node, op in self.ops.items():
            if op.kind == "function" and node not in needed:
                self.ops[node] = Op("part", (), {})

    def _expression(self, node: fx.Node, readers: Mapping[fx.Node, list[fx.Node]]) -> Op:
        root = self._roots[node][-1]
        parts = self._between(root, node)
        while root in self._roots and self._clip(root) not in _CLIPS and set(readers[root]) <= set(parts):
            root = self._roots[root][-1]
            parts = self._between(root, node)
        places = {root: "%0"} | {part: f"%{place}" for place, part in enumerate(parts, 1)}
        steps: list[Step] = []
        for part in parts:
            values = (
                places.get(value, value) if isinstance(value, fx.Node) else value for value in bound(part).values()
            )
            steps.append((step_name(part.target), *_in_order(part, dict(zip(bound(part), values, strict=True)))))
        clip = clip_of(steps[0]) if len(steps) == 1 else None
        if clip in _CLIPS:
            return Op(_CLIPS[clip], (root,), {})
        return Op("function", (root,), {"steps": tuple(steps), "parts": tuple(parts)})

    def _clip(self, node: fx.Node) -> tuple[float, float] | None:
        """The range that a node clips to, None for any other operator."""
        options = bound(node)
        values = _in_order(node, {key: "%0" if key == "self" else value for key, value in options.items()})
        return clip_of((step_name(node.target), *values))

    def _between(self, root: fx.Node, last: fx.Node) -> list[fx.Node]:
        """The nodes that compute ``last`` from ``root``, in order."""
        found: set[fx.Node] = set()
        waiting = [last]
        while waiting:
            node = waiting.pop()
            if node is root or node in found or node not in self._roots:
                continue
            found.add(node)
            waiting += [source for source in node.all_input_nodes if self.ops[source].kind not in ("constant", "value")]
        return sorted(found, key=self._order.__getitem__)

    # -- tensors ------------------------------------------------------------------------------------------------------

    def is_collection(self, node: fx.Node) -> bool:
        """Whether a node's output is several tensors, to be taken out one by one."""
        return self[node].kind == "movement" and name_of(node) in COLLECTIONS

    def is_attached(self, node: fx.Node) -> bool:
        """Whether a batch norm or affine operator belongs to what is right before it, whose output goes nowhere else:
        a layer, or another that is attached.
        """
        source = self._alone_before(node)
        return source is not None and (self[source].kind == "layer" or self.is_attached(source))

    def is_chained(self, node: fx.Node) -> bool:
        """Whether a batch norm or affine operator follows another, whose output goes nowhere else: the two are one."""
        source = self._alone_before(node)
        return source is not None and self[source].kind in _AFFINE

    def _alone_before(self, node: fx.Node) -> fx.Node | None:
        """What a batch norm or affine operator by channel alone reads; None for all others."""
        op = self[node]
        if op.kind not in _AFFINE or op.options.get("dim", 1) != 1 or len(self.consumers[op.inputs[0]]) != 1:
            return None
        source = op.inputs[0]
        return source if self[source].options.get("dim", 1) == 1 else None


def _in_order(node: fx.Node, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """A call's arguments in the order of its schema."""
    schema = cast(torch._ops.OpOverload, node.target)._schema.arguments
    return tuple(values[argument.name] for argument in schema)


def _fills(node: fx.Node, name: str, options: Mapping[str, Any]) -> bool:
    """Whether padding puts in something else than 0, what is there, or what no maximum is taken of."""
    if name not in ("pad", "constant_pad_nd") or options.get("mode", "constant") != "constant":
        return False
    pooled = len(node.users) == 1 and KINDS.get(name_of(next(iter(node.users)))) == "max_pool"
    return bool(options.get("value")) and not (options["value"] == float("-inf") and pooled)


def _shape(modules: nn.Module, node: fx.Node) -> tuple[int | None, ...]:
    if node.op == "get_attr":
        return tuple(operator.attrgetter(str(node.target))(modules).shape)
    return origin(node).shape


def _is_finite(modules: nn.Module, node: fx.Node) -> bool:
    return node.op != "get_attr" or bool(torch.isfinite(operator.attrgetter(str(node.target))(modules)).all())


def _numel(modules: nn.Module, node: fx.Node) -> int:
    return torch.Size([size or 0 for size in _shape(modules, node)]).numel()


def _varies_along(shape: tuple[int | None, ...], constant: tuple[int | None, ...]) -> int | None:
    """The only dimension of a ``shape`` along which a constant that broadcasts to it has more than one element."""
    found = [place - len(constant) + len(shape) for place, size in enumerate(constant) if size != 1]
    return found[0] if len(found) == 1 and found[0] > 0 else None
