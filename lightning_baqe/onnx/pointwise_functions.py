"""Pointwise functions (:mod:`lightning_baqe.quantization.pointwise`) as standard ONNX operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.onnx.writer import Writer

Emit = Callable[[Writer, str, str, Sequence[float]], str]


def apply_function(writer: Writer, x: str, wish: str, name: str, parameters: Sequence[float]) -> str:
    """Add the operators of one function of the float32 ``x``; returns the result's name, which is ``wish`` if that is
    free. UnsupportedModelError for a function that this release has no ONNX operators for.
    """
    if name in _PLAIN:
        return writer.node(_PLAIN[name], [x], wish)
    if name in _BINARY:
        op, reverse = _BINARY[name]
        number = writer.scalar(f"{wish}.number", parameters[0])
        return writer.node(op, [number, x] if reverse else [x, number], wish)
    if name not in _OTHERS:
        raise UnsupportedModelError(
            f"{wish!r}: the function {name!r} has no ONNX operators here; known are "
            f"{', '.join(sorted({*_PLAIN, *_BINARY, *_OTHERS}))}"
        )
    return _OTHERS[name](writer, x, wish, parameters)


def clip(writer: Writer, x: str, wish: str, low: float, high: float) -> str:
    """Clip to a range either end of which may be infinite; a ReLU where it is one."""
    if low == 0 and high == math.inf:
        return writer.node("Relu", [x], wish)
    bounds = ["" if math.isinf(bound) else writer.scalar(f"{wish}.bound", bound) for bound in (low, high)]
    return writer.node("Clip", [x, *bounds], wish)


def _softplus(writer: Writer, x: str, wish: str, parameters: Sequence[float]) -> str:
    beta, threshold = parameters
    factor = writer.scalar(f"{wish}.beta", beta)
    scaled = writer.node("Mul", [x, factor], f"{wish}.scaled")
    smooth = writer.node("Div", [writer.node("Softplus", [scaled], f"{wish}.softplus"), factor], f"{wish}.smooth")
    above = writer.node("Greater", [scaled, writer.scalar(f"{wish}.threshold", threshold)], f"{wish}.above")
    return writer.node("Where", [above, x, smooth], wish)


_PLAIN = {
    "relu": "Relu",
    "hardswish": "HardSwish",
    "sigmoid": "Sigmoid",
    "mish": "Mish",
    "tanh": "Tanh",
    "neg": "Neg",
    "abs": "Abs",
    "exp": "Exp",
    "sqrt": "Sqrt",
}
_BINARY = {
    "add": ("Add", False),
    "sub": ("Sub", False),
    "mul": ("Mul", False),
    "div": ("Div", False),
    "rsub": ("Sub", True),
    "rdiv": ("Div", True),
    "pow": ("Pow", False),
}
_OTHERS: dict[str, Emit] = {
    "relu6": lambda writer, x, wish, _: clip(writer, x, wish, 0.0, 6.0),
    "clamp": lambda writer, x, wish, p: clip(writer, x, wish, p[0], p[1]),
    "hardsigmoid": lambda writer, x, wish, _: writer.node("HardSigmoid", [x], wish, alpha=1 / 6, beta=0.5),
    "leaky_relu": lambda writer, x, wish, p: writer.node("LeakyRelu", [x], wish, alpha=p[0]),
    "elu": lambda writer, x, wish, p: writer.node("Elu", [x], wish, alpha=p[0]),
    "gelu": lambda writer, x, wish, p: writer.node("Gelu", [x], wish, approximate="tanh" if p[0] else "none"),
    "silu": lambda writer, x, wish, _: writer.node("Mul", [x, writer.node("Sigmoid", [x], f"{wish}.gate")], wish),
    "softplus": _softplus,
}
