"""Pointwise expressions in short: functions one after the other, each a name of ATen's and its further arguments."""

from __future__ import annotations

from typing import Any

from lightning_baqe.quantization.pointwise import Step, function

_OVERLOADS = {
    **{name: f"{name}.Tensor" for name in ("add", "sub", "mul", "div")},
    "rsub": "rsub.Scalar",
    "pow": "pow.Tensor_Scalar",
    **{name: f"{name}.Scalar" for name in ("gt", "ge", "lt", "le", "eq")},
}


def chain(*functions: tuple[Any, ...]) -> tuple[Step, ...]:
    """The steps of functions that each read the result of the one before: ``chain(("tanh",), ("mul", 0.5))``."""
    steps = []
    for place, (name, *arguments) in enumerate(functions):
        ((full, _, *rest),) = function(_OVERLOADS.get(name, name), *arguments).steps
        steps.append((full, f"%{place}", *rest))
    return tuple(steps)
