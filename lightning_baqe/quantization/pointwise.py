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
    if type(module) in _PLAIN_MODULES:
        return Pointwise(type(module).__name__.lower())
    if isinstance(module, nn.GELU):
        return Pointwise("gelu", (float(module.approximate == "tanh"),))
    for kind, (name, *attributes) in _MODULES.items():
        if isinstance(module, kind):
            return Pointwise(name, tuple(getattr(module, attribute) for attribute in attributes))
    return None


def of_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pointwise | None:
    """The function of a call on one tensor.

    Args:
        target: a torch function, an operator, or the name of a tensor's method.
        args: positional arguments, the tensor being ``None`` in its place; all others are numbers or flags.
        kwargs: likewise, without the tensor.

    Returns:
        None if the call is no pointwise function of that tensor.
    """
    name = (target if isinstance(target, str) else _NAMES.get(target, "")).rstrip("_")
    if name in _BINARY:
        return _binary(name, args, kwargs)
    if name not in _DEFAULTS:
        return None
    given = dict(zip(_DEFAULTS[name], args[1:], strict=False)) | kwargs
    options = {key: default if given.get(key) is None else given[key] for key, default in _DEFAULTS[name].items()}
    if name == "gelu":
        return Pointwise("gelu", (float(options["approximate"] == "tanh"),))
    if name.startswith(("clamp", "clip", "hardtanh")):
        low = options.get("min", options.get("min_val", -math.inf))
        high = options.get("max", options.get("max_val", math.inf))
        return Pointwise("clamp", (float(low), float(high)))
    return Pointwise(name, tuple(float(value) for value in options.values()))


def _binary(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pointwise | None:
    """A tensor and a number: None with anything else besides, such as a rounding mode."""
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    if len(given) != 1 or isinstance(given[0], bool) or not isinstance(given[0], int | float):
        return None
    if args and args[0] is not None:  # the number comes first
        swapped = {"sub": "rsub", "div": "rdiv", "pow": None}.get(name, name)
        return None if swapped is None else Pointwise(swapped, (float(given[0]),))
    return Pointwise(name, (float(given[0]),))


_BINARY = ("add", "sub", "mul", "div", "pow")
_PLAIN = (
    "relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu", "mish", "tanh", "neg", "abs", "exp", "sqrt",
)  # fmt: skip
# Parameters of torch's functions, in order, with their defaults.
_DEFAULTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN},
    "leaky_relu": {"negative_slope": 0.01},
    "elu": {"alpha": 1.0},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "gelu": {"approximate": "none"},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0},
    "clamp": {"min": -math.inf, "max": math.inf},
    "clip": {"min": -math.inf, "max": math.inf},
    "clamp_min": {"min": -math.inf},
    "clamp_max": {"max": math.inf},
}
_PLAIN_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.SiLU, nn.Mish, nn.Tanh)
# Each with the attributes that are its parameters.
_MODULES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.ELU: ("elu", "alpha"),
    nn.Softplus: ("softplus", "beta", "threshold"),
    nn.Hardtanh: ("clamp", "min_val", "max_val"),
}
_NAMES: dict[Any, str] = {operator.truediv: "div", abs: "abs"} | {
    getattr(namespace, name): name
    for namespace in (operator, torch, functional)
    for name in (*_BINARY, *_DEFAULTS)
    if hasattr(namespace, name)
}
