"""Pointwise functions of one tensor, by name: what a table can stand for.

Every function maps one value to one value, whatever its neighbours. Parameters are plain numbers, in the order of the
table below.

| name | parameters | value |
| --- | --- | --- |
| relu, relu6, hardswish, hardsigmoid, sigmoid, silu, mish, tanh | | as torch's |
| leaky_relu | slope | ``max(x, 0) + slope * min(x, 0)`` |
| elu | alpha | ``x`` above 0, else ``alpha * (exp(x) - 1)`` |
| softplus | beta, threshold | ``log(1 + exp(beta * x)) / beta``, ``x`` where ``beta * x > threshold`` |
| gelu | 0 or 1 | with ``erf``, or 1: its approximation by ``tanh`` |
| clamp | low, high | either may be infinite |
| add, sub, mul, div | number | ``x + number`` and so on |
| rsub, rdiv | number | ``number - x``, ``number / x`` |
| pow | exponent | ``x ** exponent`` |
| neg, abs, exp, sqrt | | |
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": torch.relu,
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "mish": functional.mish,
    "tanh": torch.tanh,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "softplus": functional.softplus,
    "gelu": lambda x, approximate: functional.gelu(x, approximate="tanh" if approximate else "none"),
    "clamp": lambda x, low, high: torch.clamp(x, low, high),
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "rsub": lambda x, number: number - x,
    "rdiv": lambda x, number: number / x,
    "pow": operator.pow,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
}


@dataclass(frozen=True)
class Pointwise:
    """One function with its parameters.

    Args:
        name: a key of :data:`FUNCTIONS`.
        parameters: see the module's docstring.
    """

    name: str
    parameters: tuple[float, ...] = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The function's values; ``x`` is floating point, of any shape."""
        return FUNCTIONS[self.name](x, *self.parameters)


def of_module(module: nn.Module) -> Pointwise | None:
    """The function of one of torch's activation modules, None for any other module."""
    plain = _PLAIN_MODULES.get(type(module))
    if plain is not None:
        return Pointwise(plain)
    match module:
        case nn.LeakyReLU():
            return Pointwise("leaky_relu", (module.negative_slope,))
        case nn.ELU():
            return Pointwise("elu", (module.alpha,))
        case nn.Softplus():
            return Pointwise("softplus", (module.beta, module.threshold))
        case nn.GELU():
            return Pointwise("gelu", (float(module.approximate == "tanh"),))
        case nn.Hardtanh():  # nn.ReLU6 is one, too
            return Pointwise("clamp", (module.min_val, module.max_val))
    return None


def of_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pointwise | None:
    """The function of a call on one tensor.

    Args:
        target: a torch function, an operator, or the name of a tensor's method.
        args: positional arguments, the tensor being ``None`` in its place; all others are numbers or flags.
        kwargs: likewise.

    Returns:
        None if the call is no pointwise function of that tensor.
    """
    name = target if isinstance(target, str) else _NAMES.get(target)
    if name is None:
        return None
    name = name.rstrip("_")
    arguments = [value for value in args if value is not None]
    options = {key: value for key, value in kwargs.items() if key not in ("inplace", "input") and value is not None}
    if name in _BINARY and len(arguments) + len(options) == 1:
        number = arguments[0] if arguments else next(iter(options.values()))
        if isinstance(number, bool) or not isinstance(number, int | float):
            return None
        reverse = bool(arguments) and args[0] is not None
        swapped = {"sub": "rsub", "div": "rdiv", "pow": None}.get(name, name) if reverse else name
        return None if swapped is None else Pointwise(swapped, (float(number),))
    if name in ("clamp", "clip", "hardtanh", "clamp_min", "clamp_max"):
        return _clamp(name, arguments, options)
    if name == "gelu":
        approximate = options.get("approximate", arguments[0] if arguments else "none")
        return Pointwise("gelu", (float(approximate == "tanh"),))
    if name in _DEFAULTS:
        keys = _PARAMETER_NAMES[name]
        numbers = tuple(
            float(options.get(key, arguments[i] if i < len(arguments) else default))
            for i, (key, default) in enumerate(zip(keys, _DEFAULTS[name], strict=True))
        )
        return Pointwise(name, numbers)
    return Pointwise(name) if name in _PLAIN else None


def _clamp(name: str, arguments: list[Any], options: dict[str, Any]) -> Pointwise:
    low = options.get("min", options.get("min_val", -1.0 if name == "hardtanh" else -math.inf))
    high = options.get("max", options.get("max_val", 1.0 if name == "hardtanh" else math.inf))
    if name == "clamp_max":
        high = arguments[0] if arguments else high
    elif arguments:
        low = arguments[0]
        high = arguments[1] if len(arguments) > 1 else high
    return Pointwise("clamp", (float(low), float(high)))


_BINARY = {"add", "sub", "mul", "div", "pow"}
_PLAIN = {
    "relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu", "mish", "tanh", "neg", "abs", "exp", "sqrt",
}  # fmt: skip
_PARAMETER_NAMES = {"leaky_relu": ("negative_slope",), "elu": ("alpha",), "softplus": ("beta", "threshold")}
_DEFAULTS = {"leaky_relu": (0.01,), "elu": (1.0,), "softplus": (1.0, 20.0)}
_PLAIN_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Tanh: "tanh",
}
_NAMES: dict[Any, str] = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div", operator.pow: "pow",
    operator.neg: "neg", operator.abs: "abs", abs: "abs",
    torch.add: "add", torch.sub: "sub", torch.mul: "mul", torch.div: "div", torch.pow: "pow",
    torch.clamp: "clamp", torch.clip: "clip", functional.hardtanh: "hardtanh",
    functional.gelu: "gelu", functional.leaky_relu: "leaky_relu", functional.elu: "elu",
    functional.softplus: "softplus",
    **{getattr(namespace, name): name for namespace in (torch, functional) for name in sorted(_PLAIN)
       if hasattr(namespace, name)},
}  # fmt: skip
