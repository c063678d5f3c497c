"""What torch.export records of a network in eval mode, without side effects."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, default_decompositions

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.quantization.aten import (
    DROPOUTS,
    KINDS,
    LAYERS,
    NORMS,
    STOCHASTIC,
    bound,
    is_known,
    name_of,
)
from lightning_baqe.quantization.pointwise import is_pointwise
from lightning_baqe.quantization.train_modes import evaluating

aten = torch.ops.aten


def record(model: nn.Module, example: Sequence[torch.Tensor]) -> ExportedProgram:
    """All that reaches PyTorch's operators, in-place operators replaced and unknown ones taken apart.

    Args:
        model, example: as for :func:`lightning_baqe.quantization.trace.trace`.

    Raises:
        UnsupportedModelError: it cannot be traced, fixes the batch size, or changes its buffers.
    """
    return _functional(_export(model, example), model)


# by_chance stands for a module that drops branches or regions in training and is the identity in eval mode; dropped for
# a dropout, which torch.export takes for nothing in eval mode where it takes a graph apart. Defined as a library:
# torch's custom_op searches all loaded modules for this source, which takes longer than importing the whole package.
_OPERATORS = torch.library.Library("lightning_baqe", "DEF")
_OPERATORS.define("by_chance(Tensor x, str path) -> Tensor")
_OPERATORS.define("dropped(Tensor x, str kind, float p) -> Tensor")
for _name in ("by_chance", "dropped"):
    _OPERATORS.impl(_name, lambda x, *_: x.clone(), "CompositeExplicitAutograd")
    _OPERATORS.impl(_name, lambda x, *_: torch.empty_like(x), "Meta")


def full_name(kind: type) -> str:
    """A class with the module that defines it."""
    return f"{kind.__module__}.{kind.__qualname__}"


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Let modules that drop by chance leave a trace; only those that are exactly what their libraries wrote."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            if full_name(type(module)) in STOCHASTIC and not hooked:
                module.forward = lambda x, name=name: torch.ops.lightning_baqe.by_chance(x, name)
                stack.callback(delattr, module, "forward")
        yield


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Let modules run as they were before ``module.compile()``."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


class _Whereabouts:
    """The path of the module that is running, for messages about what goes wrong in it."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {module: name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []

    def __enter__(self) -> _Whereabouts:
        self.hooks = (
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.stack.append(module)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.stack.pop()

    def text(self) -> str:
        named = [module for module in self.stack if module in self.paths]
        if not named or not self.paths[named[-1]]:
            return "its forward"
        return f"module {self.paths[named[-1]]!r} ({type(named[-1]).__name__})"


def _export(model: nn.Module, example: Sequence[torch.Tensor]) -> ExportedProgram:
    shapes: tuple[Any, ...] = tuple({0: Dim.AUTO} for _ in example)
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        shapes = (*shapes[:first], *filter(None, [shapes[first:]]))  # to torch.export *args are one argument, or none
    with evaluating(model), _marked(model), _uncompiled(model), _Whereabouts(model) as where, warnings.catch_warnings():
        # Lists of a recurrent layer's weights, caches of masks: what they are for is in the trace.
        warnings.filterwarnings("ignore", message="The tensor attributes? .* assigned during export")
        try:
            program = torch.export.export(model, tuple(example), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # of torch's many kinds, or of the network's own code; always raised again
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be traced: in {where.text()}: {_first_line(error)}. Let forward be "
                "free of control flow that depends on values of tensors, and of code that leaves PyTorch (numpy, "
                "lists of numbers), or move such code out of the network"
            ) from error
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in program.graph_signature.user_inputs and not isinstance(tensor_shape(node)[0], torch.SymInt):
            raise UnsupportedModelError(
                f"{type(model).__name__} takes batches of {tensor_shape(node)[0]} alone: its forward fixes the batch "
                "size, for instance by view(1, ...) or reshape(-1, n) where n does not divide what one input gives; "
                "use x.size(0), flatten(1) or unflatten"
            )
    return program


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400].rstrip(".")


def tensor_shape(node: fx.Node) -> tuple[Any, ...]:
    """Of a recorded operator's (first) tensor; ``()`` where there is none."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list) and value:  # of several outputs the first has a meaning here
        value = value[0]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _functional(program: ExportedProgram, model: nn.Module) -> ExportedProgram:
    """Without in-place operators, and with what :mod:`lightning_baqe.quantization.ops` does not know taken apart."""
    unknown = {n.target for n in program.graph.nodes if n.op == "call_function" and not is_known(n)}
    for node in program.graph.nodes:
        _replace_plain_write(node)
    writes = any(_writes(node) for node in program.graph.nodes)
    table = default_decompositions() if unknown else {}
    table = {target: table[target] for target in unknown if target in table}
    if not writes and not table:
        return program
    for node in program.graph.nodes:
        if node.op == "call_function" and name_of(node) in DROPOUTS:
            options = bound(node)
            node.args = (node.args[0], name_of(node), float(options.get("p", 0.5)))
            node.kwargs, node.target = {}, torch.ops.lightning_baqe.dropped.default
    program = program.run_decompositions(table)
    changed = program.graph_signature.buffers_to_mutate
    if changed:
        raise UnsupportedModelError(
            f"{type(model).__name__} changes its buffer {sorted(changed.values())[0]!r} in eval mode: what it computes "
            "depends on what it has computed before; let forward leave buffers alone in eval mode"
        )
    return program


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_fresh(node: fx.Node) -> bool:
    """Whether an operator's output is memory of its own, that no view of shows anywhere else."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    name = name_of(node)
    if name == "by_chance":  # what it stands for returns its argument itself
        source = cast(fx.Node, node.args[0])
        return len(source.users) == 1 and _is_fresh(source)
    makes = is_pointwise(target) or name in LAYERS or name in NORMS or "pool" in KINDS.get(name, "") or name == "cat"
    return makes and not target.is_view


def _replace_plain_write(node: fx.Node) -> None:
    """Replace an in-place operator by the plain one where nothing shares its operand's memory."""
    if not _writes(node) or not isinstance(node.target, torch._ops.OpOverload):
        return
    name, source = node.target._schema.name.removeprefix("aten::"), node.args[0]
    packet = getattr(aten, name.removesuffix("_"), None)
    if not name.endswith("_") or packet is None or node.target._overloadname not in packet.overloads():
        return
    if not isinstance(source, fx.Node) or not _is_fresh(source):
        return
    order = {other: place for place, other in enumerate(node.graph.nodes)}
    before = [user for user in source.users if order[user] < order[node]]
    if not all(_is_fresh(user) for user in before):
        return
    node.target = getattr(packet, node.target._overloadname)
    for user in [user for user in source.users if order[user] > order[node]]:
        user.replace_input_with(source, node)


# -- where an operator comes from ---------------------------------------------------------------------------------


def scopes(node: fx.Node) -> list[tuple[str, str]]:
    """``(path, class)`` of the modules around a recorded operator, the innermost last."""
    stack = node.meta.get("nn_module_stack") or {}
    found = []
    for path, kind in stack.values():
        name = kind if isinstance(kind, str) else full_name(kind)
        if name != "_empty_nn_module_stack_from_metadata_hook":
            found.append((str(path).split("@")[0], name))
    return found


def scope(node: fx.Node) -> tuple[str, str]:
    """Path and class of the module whose forward called an operator."""
    return (scopes(node) or [("", "")])[-1]


def label_of(node: fx.Node) -> str:
    """The path of torch's own module that an operator is, or the path of the module around it and its name."""
    path, kind = scope(node)
    if path and kind.startswith("torch.nn.modules.") and not kind.startswith("torch.nn.modules.container"):
        return path
    short = name_of(node).removesuffix("_")
    return f"{path}.{short}" if path else short
