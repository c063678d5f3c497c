"""Functions whose values are bounded as polynomials, which LLVM makes vectors of; the C library's take one value at a
time. Within 1e-6 of torch's, relative to the largest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import relax, te, topi


def _sigmoid(x: te.Tensor) -> te.Tensor:
    return te.compute(x.shape, lambda *i: 1.0 / (1.0 + topi.fast_exp(topi.negative(x))(*i)))


def _legalized(function: Callable[..., te.Tensor], *names: str) -> Callable[[relax.BlockBuilder, relax.Call], Any]:
    """How Relax legalizes an operator of one float32 operand with such a function of it and of these attributes."""

    def legalize(builder: relax.BlockBuilder, call: relax.Call) -> Any:
        return builder.call_te(function, call.args[0], *(getattr(call.attrs, name) for name in names))

    return legalize


VECTOR_FUNCTIONS = {
    "relax.erf": _legalized(topi.fast_erf),
    "relax.tanh": _legalized(topi.fast_tanh),
    "relax.sigmoid": _legalized(_sigmoid),
    "relax.nn.silu": _legalized(lambda x: x * _sigmoid(x)),
    "relax.nn.gelu": _legalized(lambda x: x * (0.5 + 0.5 * topi.fast_erf(x * math.sqrt(0.5)))),
    "relax.nn.softmax": _legalized(lambda x, axis: topi.nn.fast_softmax(x, int(axis)), "axis"),
}  # exp itself is unbounded: beyond the polynomial's range it must be infinite
