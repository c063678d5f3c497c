"""Operators that have no integer meaning, kept in float: ``quantize(..., fallback="float")``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer import movement
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.float_operators import FloatOperator, canonical_shape, encode_arguments
from lightning_baqe.integer.values import Builder, Value
from lightning_baqe.quantization.ops import Op
from lightning_baqe.quantization.pointwise import step_name


def float_operator(build: Builder, node: fx.Node, op: Op) -> Value:
    """One ATen operator as it is, on the float values of what it reads.

    Raises:
        UnsupportedModelError: it has several outputs, or no float operator may be it.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(build.python.values[node], torch.Tensor):
        raise UnsupportedModelError("it is no operator of PyTorch with one output; replace it")
    alone = build.alone
    inputs: list[fx.Node] = []
    constants: dict[str, torch.Tensor] = {}

    def encode(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        kind = build.reader[value].kind
        if kind == "value":
            return alone[value]
        if kind in ("constant", "literal"):
            tensor = alone[value].detach().cpu()
            constants[value.name] = tensor.float() if tensor.is_floating_point() else tensor
            return f"@{value.name}"
        if value not in inputs:
            inputs.append(value)
        return f"%{inputs.index(value)}"

    name = step_name(node.target)
    name = name if "." in name else f"{name}.default"
    arguments = encode_arguments(name, node.args, node.kwargs, encode)
    values = [_image_by_image(build, source, node) for source in inputs]
    shape = tuple(alone[node].shape)
    kind = ir.TensorType(canonical_shape(shape))
    first, second = movement.start(kind.shape).reshape(2, *shape)
    return build.emit(
        FloatOperator,
        build.label(node),
        values,
        kind,
        None,
        torch.cat([first, second], build.batch_dim(node)),
        operator=name,
        arguments=arguments,
        constants=constants,
        shapes=tuple(tuple(alone[source].shape) for source in inputs),
        shape=shape,
    )


def _image_by_image(build: Builder, source: fx.Node, node: fx.Node) -> Value:
    """The float value that an operator reads, its elements in their order for one image."""
    value = build.values[source]
    if isinstance(value.index, torch.Tensor):
        images = torch.stack(value.index.chunk(2, build.batch_dim(source)))
        value = replace(value, index=images.reshape(2, *canonical_shape(images.shape[1:])))
    return build.in_place(build.as_float(value), node)
