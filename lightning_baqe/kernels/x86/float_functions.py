"""The steps of :mod:`lightning_baqe.quantization.pointwise` as expressions, within 1e-6 of torch's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from lightning_baqe.kernels.x86.emit import splat
from lightning_baqe.quantization.pointwise import Step, is_reference

# Of what turns a number into float32 in all lanes, and an ATen operator's arguments in the order of its schema.
_Function = Callable[..., Any]
_Numbers = Callable[[Any], Any]
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _libm(name: str, *values: Any) -> Any:
    return T.call_pure_extern("float32", name, *values)


def _sigmoid(n: _Numbers, x: Any) -> Any:
    return n(1) / (n(1) + T.exp(-x))


def _gate(n: _Numbers, x: Any) -> Any:
    return T.min(T.max(x + n(3), n(0)), n(6))


def _softplus(n: _Numbers, x: Any, beta: float, threshold: float) -> Any:
    return T.Select(x * n(beta) > n(threshold), x, T.log1p(T.exp(x * n(beta))) / n(beta))


def _mish(n: _Numbers, x: Any) -> Any:
    # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2); from 20 on it is 1 in float32.
    e = T.exp(T.min(x, n(20)))
    product = e * (e + n(2))
    return x * (product / (product + n(2)))


def _gelu(n: _Numbers, x: Any, approximate: str) -> Any:
    half = n(0.5) * x
    if approximate == "none":
        return half * (n(1) + T.erf(x * n(math.sqrt(0.5))))
    inner = n(math.sqrt(2 / math.pi)) * (x + n(0.044715) * x * x * x)
    return half * (n(1) + _libm("tanhf", inner))


def _elu(n: _Numbers, x: Any, alpha: float, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    below = n(alpha * scale) * _libm("expm1f", x * n(input_scale))
    return T.Select(x > n(0), x * n(scale), below)


def _clamp(n: _Numbers, x: Any, low: Any = None, high: Any = None) -> Any:
    x = x if low is None else T.max(x, n(low))
    return x if high is None else T.min(x, n(high))


def _sign(n: _Numbers, x: Any) -> Any:
    return T.Select(x > n(0), n(1), T.Select(x < n(0), n(-1), n(0)))


def _pow(n: _Numbers, x: Any, exponent: Any) -> Any:
    squares = {2: lambda: x * x, 3: lambda: x * x * x, 0.5: lambda: T.sqrt(x), 1: lambda: x}
    if isinstance(exponent, int | float) and exponent in squares:
        return squares[exponent]()
    return _libm("powf", n(x), n(exponent))


_VECTOR: dict[str, _Function] = {
    "relu": lambda n, x: T.max(x, n(0)),
    "relu6": lambda n, x: _clamp(n, x, 0, 6),
    "hardswish": lambda n, x: x * _gate(n, x) / n(6),
    "hardsigmoid": lambda n, x: _gate(n, x) / n(6),
    "leaky_relu": lambda n, x, slope: T.max(x, n(0)) + n(slope) * T.min(x, n(0)),
    "hardtanh": _clamp,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda n, x, high: _clamp(n, x, None, high),
    "add": lambda n, x, y, alpha=1: n(x) + (n(y) if alpha == 1 else n(alpha) * n(y)),
    "sub": lambda n, x, y, alpha=1: n(x) - (n(y) if alpha == 1 else n(alpha) * n(y)),
    "rsub": lambda n, x, y, alpha=1: n(y) - (n(x) if alpha == 1 else n(alpha) * n(x)),
    "mul": lambda n, x, y: n(x) * n(y),
    "maximum": lambda n, x, y: T.max(n(x), n(y)),
    "minimum": lambda n, x, y: T.min(n(x), n(y)),
    "neg": lambda n, x: -x,
    "abs": lambda n, x: T.max(x, -x),
    "sqrt": lambda n, x: T.sqrt(x),
    "square": lambda n, x: x * x,
    "reciprocal": lambda n, x: n(1) / x,
    "rsqrt": lambda n, x: n(1) / T.sqrt(x),
}
_SCALAR: dict[str, _Function] = {
    "div": lambda n, x, y, mode=None: {None: lambda q: q, "floor": T.floor, "trunc": T.trunc}[mode](n(x) / n(y)),
    "sigmoid": _sigmoid,
    "silu": lambda n, x: x / (n(1) + T.exp(-x)),
    "mish": _mish,
    "tanh": lambda n, x: _libm("tanhf", x),
    "elu": _elu,
    "celu": lambda n, x, alpha: _elu(n, x, alpha, 1.0, 1.0 / alpha),
    "selu": lambda n, x: _elu(n, x, SELU_ALPHA, SELU_SCALE),
    "softplus": _softplus,
    "log_sigmoid": lambda n, x: T.min(x, n(0)) - T.log1p(T.exp(-T.max(x, -x))),
    "gelu": _gelu,
    "hardshrink": lambda n, x, limit: T.Select(T.max(x, -x) > n(limit), x, n(0)),
    "softshrink": lambda n, x, limit: _sign(n, x) * T.max(T.max(x, -x) - n(limit), n(0)),
    "threshold": lambda n, x, limit, value: T.Select(x > n(limit), x, n(value)),
    "pow": _pow,
    "exp": lambda n, x: T.exp(x),
    "exp2": lambda n, x: _libm("exp2f", x),
    "expm1": lambda n, x: _libm("expm1f", x),
    "log": lambda n, x: _libm("logf", x),
    "log2": lambda n, x: _libm("log2f", x),
    "log10": lambda n, x: _libm("log10f", x),
    "log1p": lambda n, x: _libm("log1pf", x),
    "erf": lambda n, x: _libm("erff", x),
    "sin": lambda n, x: _libm("sinf", x),
    "cos": lambda n, x: _libm("cosf", x),
    "tan": lambda n, x: _libm("tanf", x),
    "atan": lambda n, x: _libm("atanf", x),
    "sign": _sign,
    "sgn": _sign,
    "floor": lambda n, x: T.floor(x),
    "ceil": lambda n, x: T.ceil(x),
    "round": lambda n, x, *_: T.nearbyint(x),
    "where": lambda n, condition, x, y: T.Select(condition, n(x), n(y)),
    "gt": lambda n, x, y: n(x) > n(y),
    "ge": lambda n, x, y: n(x) >= n(y),
    "lt": lambda n, x, y: n(x) < n(y),
    "le": lambda n, x, y: n(x) <= n(y),
    "eq": lambda n, x, y: T.Select(n(x) == n(y), T.bool(True), T.bool(False)),
}
NAMES = frozenset(_VECTOR) | frozenset(_SCALAR)


def _name(step: Step) -> str:
    return str(step[0]).split(".")[0]


def unknown(steps: tuple[Step, ...]) -> list[str]:
    """The operators among the steps that have no expression here."""
    return [_name(step) for step in steps if _name(step) not in NAMES]


def encode(steps: tuple[Step, ...]) -> str:
    """The steps as text, which identifies a kernel's code."""
    return json.dumps(steps)


def is_vector(function: str) -> bool:
    """Whether a function is one of vectors; all others come from the C library, one value at a time."""
    return all(_name(step) in _VECTOR for step in json.loads(function))


def apply(function: str, value: Any, lanes: int) -> Any:
    """The values of a function (:func:`encode`) for ``lanes`` float32 values, 1 for what is no function of vectors."""

    def number(operand: Any) -> Any:
        return splat(T.float32(operand), lanes) if isinstance(operand, int | float) else operand

    found = [value]
    for step in json.loads(function):
        operands = [found[int(operand[1:])] if is_reference(operand) else operand for operand in step[1:]]
        table = _VECTOR if _name(step) in _VECTOR else _SCALAR
        found.append(table[_name(step)](number, *operands))
    return found[-1]
