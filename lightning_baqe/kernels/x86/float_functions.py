"""The float functions of :mod:`lightning_baqe.quantization.pointwise` as expressions, within 1e-6 of torch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

_Function = Callable[[Any, Any, Any, Any], Any]


def _libm(name: str, value: Any) -> Any:
    return T.call_pure_extern("float32", name, value)


def _sigmoid(x: Any) -> Any:
    return T.float32(1) / (T.float32(1) + T.exp(-x))


def _gate(x: Any, n: Any) -> Any:
    return T.min(T.max(x + n(3), n(0)), n(6))


def _softplus(x: Any, beta: Any, threshold: Any) -> Any:
    return T.Select(x * beta > threshold, x, T.log1p(T.exp(x * beta)) / beta)


def _mish(x: Any) -> Any:
    # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2); from 20 on it is 1 in float32.
    e = T.exp(T.min(x, T.float32(20)))
    product = e * (e + T.float32(2))
    return x * (product / (product + T.float32(2)))


def _gelu(x: Any, approximate: Any) -> Any:
    half = T.float32(0.5) * x
    exact = half * (T.float32(1) + T.erf(x * T.float32(math.sqrt(0.5))))
    inner = T.float32(math.sqrt(2 / math.pi)) * (x + T.float32(0.044715) * x * x * x)
    return T.Select(approximate > T.float32(0), half * (T.float32(1) + _libm("tanhf", inner)), exact)


# (x, first parameter, second parameter, a constant in all lanes)
_VECTOR: dict[str, _Function] = {
    "relu": lambda x, a, b, n: T.max(x, n(0)),
    "relu6": lambda x, a, b, n: T.min(T.max(x, n(0)), n(6)),
    "hardswish": lambda x, a, b, n: x * _gate(x, n) / n(6),
    "hardsigmoid": lambda x, a, b, n: _gate(x, n) / n(6),
    "leaky_relu": lambda x, a, b, n: T.max(x, n(0)) + a * T.min(x, n(0)),
    "clamp": lambda x, a, b, n: T.min(T.max(x, a), b),
    "add": lambda x, a, b, n: x + a,
    "sub": lambda x, a, b, n: x - a,
    "mul": lambda x, a, b, n: x * a,
    "div": lambda x, a, b, n: x / a,
    "rsub": lambda x, a, b, n: a - x,
    "rdiv": lambda x, a, b, n: a / x,
    "neg": lambda x, a, b, n: -x,
    "abs": lambda x, a, b, n: T.max(x, -x),
    "sqrt": lambda x, a, b, n: T.sqrt(x),
}
_SCALAR: dict[str, _Function] = {
    "sigmoid": lambda x, a, b, n: _sigmoid(x),
    "silu": lambda x, a, b, n: x / (T.float32(1) + T.exp(-x)),
    "mish": lambda x, a, b, n: _mish(x),
    "tanh": lambda x, a, b, n: _libm("tanhf", x),
    "elu": lambda x, a, b, n: T.Select(x > T.float32(0), x, a * _libm("expm1f", x)),
    "softplus": lambda x, a, b, n: _softplus(x, a, b),
    "gelu": lambda x, a, b, n: _gelu(x, a),
    "pow": lambda x, a, b, n: T.pow(x, a),
    "exp": lambda x, a, b, n: T.exp(x),
}
NAMES = frozenset(_VECTOR) | frozenset(_SCALAR)


def is_vector(name: str) -> bool:
    """Whether the function is one of vectors; all others come from the C library, one value at a time."""
    return name in _VECTOR


def apply(name: str, value: Any, parameters: Any, lanes: int) -> Any:
    """The values of one of :data:`NAMES` for ``lanes`` float32 values (1 for what is no function of vectors);
    ``parameters`` is a float32 buffer of two numbers.
    """

    def wide(number: Any) -> Any:
        return T.broadcast(number, lanes) if lanes > 1 else number

    function = _VECTOR[name] if is_vector(name) else _SCALAR[name]
    return function(value, wide(parameters[0]), wide(parameters[1]), lambda number: wide(T.float32(number)))
