"""Operators that have no integer meaning, kept in float: ``quantize(..., fallback="float")``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer import movement
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.float_operators import FloatOperator, canonical_shape, encode_arguments
from lightning_baqe.integer.shapes import GraphValues
from lightning_baqe.integer.values import Builder, Value
from lightning_baqe.quantization.ops import Op
from lightning_baqe.quantization.pointwise import step_name


def float_operator(build: Builder, node: fx.Node, op: Op) -> Value:
    """One ATen operator as it is, on the float values of what it reads.

    Raises:
        UnsupportedModelError: it has several outputs, or no float operator may be it.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(build.python.values[node], torch.Tensor):
        raise build.refuse(
            node, "it is no operator of PyTorch with one output: it cannot stay float either; replace it"
        )
    alone = _for_one(build)
    inputs: list[fx.Node] = []
    constants: dict[str, torch.Tensor] = {}

    def encode(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        kind = build.reader[value].kind
        if kind == "value":
            return alone[value]
        if kind in ("constant", "literal"):
            tensor = build.python.values[value].detach().cpu()
            constants[value.name] = tensor.float() if tensor.is_floating_point() else tensor
            return f"@{value.name}"
        if value not in inputs:
            inputs.append(value)
        return f"%{inputs.index(value)}"

    name = step_name(node.target)
    name = name if "." in name else f"{name}.default"
    arguments = encode_arguments(name, node.args, node.kwargs, encode)
    values = [build.in_place(build.as_float(build.values[source]), node) for source in inputs]
    shape, full = _of_one(build, node), build.python.values[node].shape
    kind = ir.TensorType(canonical_shape(shape))
    return build.emit(
        FloatOperator,
        build.label(node),
        values,
        kind,
        None,
        movement.start(kind.shape).reshape(full),
        operator=name,
        arguments=arguments,
        constants=constants,
        shapes=tuple(_of_one(build, source) for source in inputs),
        shape=shape,
    )


def _of_one(build: Builder, node: fx.Node) -> tuple[int, ...]:
    """The shape of a tensor for a batch of one image."""
    first, *rest = build.python.values[node].shape
    if first % 2:
        raise UnsupportedModelError(f"{build.label(node)!r}: the batch must stay the outermost dimension")
    return (first // 2, *rest)


def _for_one(build: Builder) -> dict[fx.Node, Any]:
    """The Python values of the network for a batch of one image."""
    if not build.for_one:
        build.for_one = GraphValues(build.model, build.shapes, (), 1).values
    return build.for_one
