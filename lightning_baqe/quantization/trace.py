"""Symbolic tracing of a float model into a graph whose operators can be told apart and that has no side effects."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from lightning_baqe.errors import UnsupportedModelError

_IN_PLACE_METHODS = {"relu_": "relu", "add_": "add"}
_IN_PLACE_FUNCTIONS: dict[Any, Any] = {operator.iadd: operator.add, torch.relu_: torch.relu}
_MODE_FUNCTIONS: tuple[Any, ...] = (functional.batch_norm, torch.batch_norm, functional.instance_norm)


class _Tracer(fx.Tracer):
    """Traces through everything but torch's own modules and convs and linears whose forward is torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.path = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Conv2d):
            return type(m).forward is nn.Conv2d.forward
        if isinstance(m, nn.Linear):
            return type(m).forward is nn.Linear.forward
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        before, self.path = self.path, self.path_of_module(m)
        out = super().call_module(m, forward, args, kwargs)
        self.path = before  # after an error the path stays where it happened
        return out


def trace(model: nn.Module) -> fx.Graph:
    """The model's graph, free of in-place operators; dropout functions become modules, which follow train and eval.

    ``model`` receives a submodule for each dropout function and loses the in-place flag of ReLUs; hand over a copy.

    Raises:
        UnsupportedModelError: it cannot be traced, or the trace would fix its mode; names the reason.
    """
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise UnsupportedModelError(
                f"module {name!r} is parametrized; call torch.nn.utils.parametrize.remove_parametrizations on it first"
            )
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError, AttributeError, ValueError) as error:
        where = f"submodule {tracer.path!r}" if tracer.path else "its forward"
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be traced: in {where}: {error}. Let forward be free of control flow that "
            "depends on tensors, or move such code out of the model"
        ) from error
    _make_functional(graph, model)
    _make_dropout_modules(graph, model)
    graph.lint()
    return graph


def _make_functional(graph: fx.Graph, model: nn.Module) -> None:
    """Replace in-place operators: what reads their operand later reads their result instead."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target in _MODE_FUNCTIONS:
            raise UnsupportedModelError(
                f"{node.name}: a functional normalisation fixes train or eval mode when traced; use nn.BatchNorm2d"
            )
        in_place = False
        if node.op == "call_method" and node.target in _IN_PLACE_METHODS:
            node.target, in_place = _IN_PLACE_METHODS[node.target], True
        elif node.op == "call_function" and node.target in _IN_PLACE_FUNCTIONS:
            node.target, in_place = _IN_PLACE_FUNCTIONS[node.target], True
        elif node.op == "call_function" and node.target in (functional.relu, functional.relu6):
            in_place = bool(node.kwargs.get("inplace", len(node.args) > 1 and node.args[1]))
            node.args, node.kwargs = (node.kwargs.get("input", *node.args[:1]),), {}
        elif node.op == "call_module":
            module = model.get_submodule(str(node.target))
            in_place = bool(getattr(module, "inplace", False))
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
        options = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | dict(node.kwargs)
        name = f"functional_{node.name}"
        dropout = nn.Dropout(options.get("p", 0.5))
        dropout.train(model.training)
        model.add_module(name, dropout)
        with graph.inserting_before(node):
            new = graph.call_module(name, (options["input"],))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
