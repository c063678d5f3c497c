"""The steps of pointwise expressions (:mod:`lightning_baqe.quantization.pointwise`) as standard ONNX operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.onnx.writer import Writer
from lightning_baqe.quantization.pointwise import Step, clip_of, is_reference

# Of the writer, the operands by name or as numbers, and the wished name; returns the result's name.
_Emit = Callable[..., str]


def apply_steps(writer: Writer, x: str, wish: str, steps: Sequence[Step]) -> str:
    """Add the operators of an expression of the float32 ``x``; returns the result's name, which is ``wish`` if that is
    free. UnsupportedModelError for a step that this release has no ONNX operators for.
    """
    found = [x]
    for place, step in enumerate(steps, 1):
        name = str(step[0]).split(".")[0]
        here = wish if place == len(steps) else f"{wish}.{name}"
        operands = [found[int(value[1:])] if is_reference(value) else value for value in step[1:]]
        clip_limits = clip_of(step)
        if clip_limits is not None:
            found.append(clip(writer, operands[0], here, *clip_limits))
        elif name in _PLAIN:
            found.append(writer.node(_PLAIN[name], [operands[0]], here))
        elif name in _BINARY:
            found.append(_binary(writer, here, name, operands))
        elif name in _OTHERS:
            found.append(_OTHERS[name](writer, here, *operands))
        else:
            raise UnsupportedModelError(
                f"{wish!r}: the function {name!r} has no ONNX operators here; known are {', '.join(sorted(KNOWN))}"
            )
    return found[-1] if steps else x


def clip(writer: Writer, x: str, wish: str, low: float, high: float) -> str:
    """Clip to a range either end of which may be infinite; a ReLU where it is one."""
    if low == 0 and high == math.inf:
        return writer.node("Relu", [x], wish)
    bounds = ["" if math.isinf(bound) else writer.scalar(f"{wish}.bound", bound) for bound in (low, high)]
    return writer.node("Clip", [x, *bounds], wish)


def _named(writer: Writer, wish: str, operand: Any) -> str:
    return operand if isinstance(operand, str) else writer.scalar(f"{wish}.number", float(operand))


def _binary(writer: Writer, wish: str, name: str, operands: Sequence[Any]) -> str:
    op, turned = _BINARY[name]
    first, second = operands[0], operands[1]
    if len(operands) > 2 and operands[2] not in (1, None):  # alpha of sums; a rounding mode of quotients
        if name == "div":
            raise UnsupportedModelError(f"{wish!r}: a quotient with a rounding mode has no ONNX operator")
        factor = [first, operands[2]] if turned else [second, operands[2]]
        scaled = _binary(writer, f"{wish}.scaled", "mul", factor)
        first, second = (scaled, second) if turned else (first, scaled)
    pair = [_named(writer, wish, operand) for operand in ((second, first) if turned else (first, second))]
    return writer.node(op, pair, wish)


def _softplus(writer: Writer, wish: str, x: str, beta: float, threshold: float) -> str:
    factor = writer.scalar(f"{wish}.beta", beta)
    scaled = writer.node("Mul", [x, factor], f"{wish}.scaled")
    smooth = writer.node("Div", [writer.node("Softplus", [scaled], f"{wish}.softplus"), factor], f"{wish}.smooth")
    above = writer.node("Greater", [scaled, writer.scalar(f"{wish}.threshold", threshold)], f"{wish}.above")
    return writer.node("Where", [above, x, smooth], wish)


def _elu(writer: Writer, wish: str, x: str, alpha: float, scale: float, input_scale: float) -> str:
    if input_scale != 1:
        raise UnsupportedModelError(f"{wish!r}: an ELU with input_scale {input_scale} has no ONNX operator")
    if scale == 1:
        return writer.node("Elu", [x], wish, alpha=float(alpha))
    return writer.node("Selu", [x], wish, alpha=float(alpha), gamma=float(scale))


def _where(writer: Writer, wish: str, condition: str, x: Any, y: Any) -> str:
    return writer.node("Where", [condition, _named(writer, wish, x), _named(writer, wish, y)], wish)


def _threshold(writer: Writer, wish: str, x: str, limit: float, value: float) -> str:
    above = writer.node("Greater", [x, writer.scalar(f"{wish}.limit", limit)], f"{wish}.above")
    return writer.node("Where", [above, x, writer.scalar(f"{wish}.value", value)], wish)


_PLAIN = {
    "hardswish": "HardSwish",
    "sigmoid": "Sigmoid",
    "mish": "Mish",
    "tanh": "Tanh",
    "neg": "Neg",
    "abs": "Abs",
    "exp": "Exp",
    "sqrt": "Sqrt",
    "log": "Log",
    "sin": "Sin",
    "cos": "Cos",
    "tan": "Tan",
    "atan": "Atan",
    "erf": "Erf",
    "sign": "Sign",
    "sgn": "Sign",
    "floor": "Floor",
    "ceil": "Ceil",
    "round": "Round",
    "reciprocal": "Reciprocal",
    "selu": "Selu",
}
_BINARY = {
    "add": ("Add", False),
    "sub": ("Sub", False),
    "rsub": ("Sub", True),
    "mul": ("Mul", False),
    "div": ("Div", False),
    "pow": ("Pow", False),
    "maximum": ("Max", False),
    "minimum": ("Min", False),
    "gt": ("Greater", False),
    "ge": ("GreaterOrEqual", False),
    "lt": ("Less", False),
    "le": ("LessOrEqual", False),
    "eq": ("Equal", False),
}
_OTHERS: dict[str, _Emit] = {
    "hardsigmoid": lambda w, wish, x: w.node("HardSigmoid", [x], wish, alpha=1 / 6, beta=0.5),
    "leaky_relu": lambda w, wish, x, slope: w.node("LeakyRelu", [x], wish, alpha=float(slope)),
    "elu": _elu,
    "celu": lambda w, wish, x, alpha: w.node("Celu", [x], wish, alpha=float(alpha)),
    "gelu": lambda w, wish, x, approximate: w.node("Gelu", [x], wish, approximate=approximate),
    "silu": lambda w, wish, x: w.node("Mul", [x, w.node("Sigmoid", [x], f"{wish}.gate")], wish),
    "softplus": _softplus,
    "square": lambda w, wish, x: w.node("Mul", [x, x], wish),
    "rsqrt": lambda w, wish, x: w.node("Reciprocal", [w.node("Sqrt", [x], f"{wish}.root")], wish),
    "log1p": lambda w, wish, x: w.node("Log", [w.node("Add", [x, w.scalar(f"{wish}.one", 1.0)], f"{wish}.sum")], wish),
    "log_sigmoid": lambda w, wish, x: w.node("Log", [w.node("Sigmoid", [x], f"{wish}.sigmoid")], wish),
    "hardshrink": lambda w, wish, x, limit: w.node("Shrink", [x], wish, bias=0.0, lambd=float(limit)),
    "softshrink": lambda w, wish, x, limit: w.node("Shrink", [x], wish, bias=float(limit), lambd=float(limit)),
    "threshold": _threshold,
    "where": _where,
}
KNOWN = frozenset({*_PLAIN, *_BINARY, *_OTHERS})
