"""Symbolic tracing of a float model into a graph whose operators can be told apart and that has no side effects."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.quantization.ops import STOCHASTIC, target_name
from lightning_baqe.quantization.plain import Padding, evaluating, has_fused_activation, make_plain

_IN_PLACE_FUNCTIONS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    **{getattr(torch, f"{name}_"): getattr(torch, name) for name in ("relu", "sigmoid", "tanh", "clamp", "neg", "exp")},
}
_MODE_FUNCTIONS: tuple[Any, ...] = (functional.batch_norm, torch.batch_norm, functional.instance_norm)
_EXAMPLE = "lightning_baqe.example"
_TRACING_ERRORS = (
    fx.proxy.TraceError, TypeError, RuntimeError, AttributeError, ValueError, NotImplementedError, AssertionError,
    IndexError, KeyError,
)  # fmt: skip


class _Tracer(fx.Tracer):
    """Traces through everything but torch's own modules and convs and linears whose forward is torch's."""

    def __init__(self, paddings: dict[str, Padding]) -> None:
        super().__init__()
        self.path = ""
        self.paddings = paddings

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        for base in (nn.Conv2d, nn.Linear):
            if isinstance(m, base):
                return type(m).forward is base.forward
        if type(m).__name__ in STOCHASTIC or isinstance(m, nn.BatchNorm2d):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before, self.path = self.path, self.path_of_module(m)
        padding = self.paddings.get(self.path)
        if padding is not None:
            args = (functional.pad(args[0], padding), *args[1:])
        out = super().call_module(m, forward, args, kwargs)
        if has_fused_activation(m):
            out = m.act(m.drop(out))  # type: ignore[operator]
        self.path = before  # after an error the path stays where it happened
        return out


class _Shaped(fx.Proxy):
    """A tensor whose sizes are numbers, but for the batch, which stays symbolic."""

    @property
    def shape(self) -> tuple[Any, ...]:
        example = self.node.meta[_EXAMPLE]
        if not isinstance(example, torch.Tensor):
            raise AttributeError(f"{self.node.name} is a {type(example).__name__} and has no shape")
        if example.ndim == 0:
            return ()
        symbolic = self.tracer.create_proxy("call_function", getattr, (self, "shape"), {})
        return (operator.getitem(symbolic, 0), *example.shape[1:])

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def ndim(self) -> int:
        return int(self.node.meta[_EXAMPLE].ndim)

    def dim(self) -> int:
        return self.ndim


class _ShapeTracer(_Tracer):
    """Executes the network on an example as it traces it, so that control flow may depend on sizes."""

    def __init__(self, paddings: dict[str, Padding], example_input: torch.Tensor) -> None:
        super().__init__(paddings)
        self.example_input = example_input
        self.is_executing = False  # fx hooks every module's call and attributes while it traces

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return forward(*args, **kwargs) if self.is_executing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.is_executing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Shaped(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: source.meta[_EXAMPLE])
        self.is_executing = True
        try:
            with torch.no_grad():
                node.meta[_EXAMPLE] = self._execute(node, *arguments)
        finally:
            self.is_executing = False
        return node

    def _execute(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "placeholder":
            return self.example_input
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root).clone()
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return args if node.op == "output" else node.target(*args, **kwargs)  # type: ignore[operator]


def trace(model: nn.Module, example_input: torch.Tensor | None = None) -> fx.Graph:
    """The model's graph in eval mode, free of in-place operators; dropout functions become modules, which follow train
    and eval, as does what drops branches by chance. Auxiliary classifiers that only training has are left out.

    ``model`` receives a submodule for each dropout function and loses the in-place flag of ReLUs; convolutions that
    compute their weights or their padding (see :mod:`lightning_baqe.quantization.plain`) become plain ones. Hand over
    a copy.

    Args:
        model: the float network.
        example_input: a batch of any size; needed by convolutions that compute their weights or their padding, and by
            control flow that depends on sizes.

    Raises:
        UnsupportedModelError: it cannot be traced; names the submodule and the reason.
    """
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise UnsupportedModelError(
                f"module {name!r} is parametrized; call torch.nn.utils.parametrize.remove_parametrizations on it first"
            )
    paddings = make_plain(model, example_input)
    with evaluating(model):
        graph = _trace(model, paddings, example_input)
    graph._tracer_cls = fx.Tracer  # what a pickled graph module is traced with again, every module being a leaf
    _remove_assertions(graph)
    _make_functional(graph, model)
    _make_dropout_modules(graph, model)
    graph.lint()
    return graph


def _trace(model: nn.Module, paddings: dict[str, Padding], example_input: torch.Tensor | None) -> fx.Graph:
    tracer = _Tracer(paddings)
    try:
        return tracer.trace(model)
    except _TRACING_ERRORS as error:
        if example_input is None:
            raise _untraceable(model, tracer, error, "; give example_input if it depends on sizes only") from error
    tracer = _ShapeTracer(paddings, example_input[:1])
    try:
        graph = tracer.trace(model)
    except _TRACING_ERRORS as error:
        raise _untraceable(model, tracer, error) from error
    for node in graph.nodes:
        del node.meta[_EXAMPLE]
    return graph


def _untraceable(model: nn.Module, tracer: _Tracer, error: Exception, more: str = "") -> UnsupportedModelError:
    where = f"submodule {tracer.path!r}" if tracer.path else "its forward"
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be traced: in {where}: {error}. Let forward be free of control flow that "
        f"depends on tensors, or move such code out of the model{more}"
    )


def _remove_assertions(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=torch._assert):
        graph.erase_node(node)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _writes(node))


def _writes(node: fx.Node) -> bool:
    """Whether a function or method changes a tensor in place, by its name or an option."""
    if node.op not in ("call_function", "call_method"):
        return False
    name, found = target_name(node), _in_place_option(node)
    in_place = found is not None and bool(found[1].get("inplace"))
    return in_place or node.target in _IN_PLACE_FUNCTIONS or (name.endswith("_") and not name.endswith("__"))


def _in_place_option(node: fx.Node) -> tuple[int, dict[str, Any]] | None:
    """Where a function of ``torch.nn.functional`` takes ``inplace``, and its arguments from there on, by name."""
    if node.op != "call_function" or getattr(node.target, "__module__", None) != functional.__name__:
        return None
    parameters = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    if "inplace" not in parameters:
        return None
    at = parameters.index("inplace")
    return at, dict(zip(parameters[at:], node.args[at:], strict=False)) | node.kwargs


def _make_functional(graph: fx.Graph, model: nn.Module) -> None:
    """Replace in-place operators: what reads their operand later reads their result instead."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target in _MODE_FUNCTIONS:
            raise UnsupportedModelError(
                f"{node.name}: a functional normalisation fixes train or eval mode when traced; use nn.BatchNorm2d"
            )
        in_place, found = _writes(node), _in_place_option(node)
        if node.op == "call_method" and in_place:
            node.target = node.target.rstrip("_")
        elif found is not None:
            at, options = found
            node.args, node.kwargs = node.args[:at], {key: options[key] for key in options if key != "inplace"}
        elif node.op == "call_function":
            node.target = _IN_PLACE_FUNCTIONS.get(node.target, node.target)
        elif node.op == "call_module":
            in_place = bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
        if in_place and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            for user in list(source.users):
                if order[user] > order[node]:
                    user.replace_input_with(source, node)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]


def _make_dropout_modules(graph: fx.Graph, model: nn.Module) -> None:
    """Turn each ``functional.dropout`` into an ``nn.Dropout``: its ``training`` argument was fixed by tracing."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not functional.dropout:
            continue
        options = dict(zip(("input", "p", "training"), node.args, strict=False)) | dict(node.kwargs)
        name = f"functional_{node.name}"
        dropout = nn.Dropout(options.get("p", 0.5))
        dropout.train(model.training)
        model.add_module(name, dropout)
        with graph.inserting_before(node):
            new = graph.call_module(name, (options["input"],))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
