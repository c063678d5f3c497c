"""Pointwise expressions of one tensor, whatever they are made of: what one table can stand for.

An expression is a tuple of steps. A step is the name of an ATen operator (``"gelu"``, ``"add.Tensor"`` where it is no
default overload) and all of its arguments in the order of its schema: numbers, strings, None, or ``"%k"``, the result
of step k, ``"%0"`` being the tensor itself::

    x * torch.sigmoid(x)  is  (("sigmoid", "%0"), ("mul.Tensor", "%0", "%1"))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_baqe.errors import ConfigError

Step = tuple[Any, ...]
CLIPS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"})


@dataclass(frozen=True)
class Expression:
    """One expression.

    Args:
        steps: see the module's docstring.

    Raises:
        ConfigError: a step is no pointwise operator of PyTorch, or reads what comes after it.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        for place, (name, *arguments) in enumerate(self.steps):
            operator(name)
            numbers = [int(value[1:]) for value in arguments if is_reference(value)]
            if any(number > place for number in numbers):
                raise ConfigError(f"step {place} of {self.steps} reads a step that is not computed yet")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The expression's values; ``x`` is floating point, of any shape."""
        found = [x]
        for name, *arguments in self.steps:
            function = operator(name)
            values = [found[int(value[1:])] if is_reference(value) else value for value in arguments]
            schema = function._schema.arguments
            plain = [value for value, argument in zip(values, schema, strict=True) if not argument.kwarg_only]
            named = {a.name: value for value, a in zip(values, schema, strict=True) if a.kwarg_only}
            found.append(function(*plain, **named))
        return found[-1]

    def __str__(self) -> str:
        return " -> ".join(name.split(".")[0] for name, *_ in self.steps)

    @property
    def clip(self) -> tuple[float, float] | None:
        """The range that it clips to, if it does nothing else; either end may be infinite."""
        return clip_of(self.steps[0]) if len(self.steps) == 1 else None


def is_reference(value: Any) -> bool:
    """Whether an argument is the result of a step."""
    return isinstance(value, str) and value.startswith("%")


def operator(name: str) -> Any:
    """The ATen operator of a step's name; ConfigError where that is no pointwise operator without side effects."""
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload) or not is_pointwise(found):
        raise ConfigError(f"{name!r} is no pointwise operator of this PyTorch")
    return found


def is_pointwise(target: Any) -> bool:
    """Whether an operator maps each value to one value, whatever its neighbours, and changes nothing."""
    is_operator = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    return (
        is_operator
        and (torch.Tag.pointwise in target.tags or target.overloadpacket in _UNTAGGED)
        and (not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags)
    )


def step_name(target: Any) -> str:
    """How a step names an ATen operator."""
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    return name if overload == "default" else f"{name}.{overload}"


def function(name: str, *arguments: Any) -> Expression:
    """One operator of ``x`` and its further arguments; those that are not given have the schema's defaults."""
    schema = operator(name)._schema.arguments
    given = ["%0", *arguments]
    return Expression(((name, *given, *(argument.default_value for argument in schema[len(given) :])),))


def clip_of(step: Step) -> tuple[float, float] | None:
    """The range that a step clips to, None for any other operator."""
    name, *arguments = step
    name = name.split(".")[0]
    if name not in CLIPS:
        return None
    numbers = arguments[1:]
    if any(isinstance(value, torch.fx.Node) or is_reference(value) for value in numbers):
        return None
    low, high = _CLIP_LIMITS[name](*numbers)
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


_CLIP_LIMITS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "relu": lambda: (0.0, None),
    "relu6": lambda: (0.0, 6.0),
    "hardtanh": lambda low, high: (low, high),
    "clamp": lambda low, high: (low, high),
    "clamp_min": lambda low: (low, None),
    "clamp_max": lambda high: (None, high),
}
# Pointwise, though PyTorch does not say so.
_aten = torch.ops.aten
_UNTAGGED = frozenset({_aten.hardswish, _aten.log_sigmoid, _aten.where, _aten.rsub})
