"""Operators that stay float inside an integer network: any ATen operator by name, on values of any rank.

Values of the integer graph have the shapes ``(channels, height, width)`` or ``(features,)``, but attention, layer norms
and matrix products work on others. So such an operator knows the *true* shapes of its inputs and its output, of one
image and with the batch dimension, for example ``(1, 196, 192)`` for tokens, or ``(64, 49, 96)`` where the batch is
part of the first dimension. A value of the graph holds the elements of the true shape in the same order, C order:
:func:`canonical_shape` is the graph's shape of a true one. Whatever changes the order of elements is an operator
(``permute.default``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch._ops import OpOverload

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer.nodes import Node

Shape = tuple[int, ...]

_NAME = re.compile(r"[a-z][a-z0-9_]*\.[A-Za-z][A-Za-z0-9_]*")
_PRIVATE = {"_softmax.default", "_log_softmax.default", "_unsafe_view.default", "_adaptive_avg_pool2d.default"}
# Memory that nobody wrote, or that is not the operand's.
_UNDEFINED = re.compile(r"(new_)?empty(_like|_strided|_permuted)?\.|as_strided|resize|set\.|from_file|lift")


def canonical_shape(shape: Sequence[int]) -> Shape:
    """The shape in the integer graph of a value whose true shape is given: the same elements in C order.

    One leading 1, the batch of one image, is dropped. What is left becomes ``(a,)``, of two dimensions ``(a, 1, b)``,
    of three ``(a, b, c)``; of more, the leading ones are merged. ``(1, 196, 192)`` is ``(196, 1, 192)``,
    ``(64, 49, 96)`` is itself, ``(1, 3, 49, 64)`` is ``(3, 49, 64)``, ``(1, 64, 3, 49, 49)`` is ``(192, 49, 49)``.
    """
    rest = tuple(shape[1:]) if shape and shape[0] == 1 else tuple(shape)
    match rest:
        case ():
            return (1,)
        case (a, b):
            return a, 1, b
        case (*leading, b, c) if len(leading) > 1:
            return math.prod(leading), b, c
    return rest


def find_operator(name: str) -> OpOverload[..., Any]:
    """An ATen operator by its overload's name, such as ``"layer_norm.default"``.

    Only those are found that compute one tensor from tensors and nothing else: they neither write into their operands
    nor draw random numbers, touch files or return memory that nobody wrote.

    Raises:
        UnsupportedModelError: it is none of these, or this torch has no such operator.
    """
    allowed = (_NAME.fullmatch(name) and not _UNDEFINED.match(name)) or name in _PRIVATE
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet, None), overload, None) if allowed else None
    if not isinstance(operator, OpOverload):
        raise UnsupportedModelError(
            f"{name!r} is no ATen operator that a float operator may be: give the name of an overload such as "
            "'layer_norm.default' that computes one tensor from others"
        )
    schema = operator._schema
    returns_tensor = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
    takes_tensor = any("Tensor" in str(argument.type) for argument in schema.arguments)
    draws = torch.Tag.nondeterministic_seeded in operator.tags and not _has_dropout(operator)
    if schema.is_mutable or draws or torch.Tag.data_dependent_output in operator.tags:
        raise UnsupportedModelError(
            f"aten::{name} writes into its operands, draws random numbers or depends on values outside of tensors; a "
            "float operator must be a function of its inputs: use the form of it that is one"
        )
    if not (returns_tensor and takes_tensor):
        raise UnsupportedModelError(
            f"aten::{name} does not compute one tensor from tensors; take one that does, one operator for each result"
        )
    return operator


def _has_dropout(operator: OpOverload[..., Any]) -> bool:
    """Whether nothing but its dropout, which can be 0, is random: scaled_dot_product_attention."""
    return any(argument.name == "dropout_p" for argument in operator._schema.arguments)


def encode_arguments(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], encode: Callable[[Any], Any] = lambda value: value
) -> tuple[Any, ...]:
    """All arguments of an operator in the order of its schema, as :class:`FloatOperator` holds them.

    Args:
        name: of the operator.
        args, kwargs: as it is called; what is missing takes its default.
        encode: what stands for a value that is no JSON value, ``"%k"`` or ``"@name"``; it is called with every leaf but
            None. Types, devices and layouts become strings such as ``"torch.float32"`` by themselves.

    Raises:
        UnsupportedModelError: an argument is missing, or one too many, or still no JSON value.
    """
    schema = find_operator(name)._schema
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    unknown = set(kwargs) - {argument.name for argument in schema.arguments}
    if len(args) > len(positional) or unknown:
        raise UnsupportedModelError(f"aten::{name} is called with {len(args)} arguments and {sorted(kwargs)}: {schema}")
    given = dict(zip((argument.name for argument in positional), args, strict=False)) | dict(kwargs)
    found = []
    for argument in schema.arguments:
        if argument.name not in given and not argument.has_default_value():
            raise UnsupportedModelError(f"aten::{name} lacks its argument {argument.name!r}: {schema}")
        value = given.get(argument.name, argument.default_value)
        found.append(_mapped(value, lambda leaf: _json_value(name, encode(leaf))))
    return tuple(found)


def _json_value(name: str, value: Any) -> Any:
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return str(value)
    if isinstance(value, torch.device):
        return None  # the network's own
    if isinstance(value, bool | int | float | str):
        return value
    raise UnsupportedModelError(
        f"aten::{name} has the argument {value!r} of type {type(value).__name__}; numbers, text, types and lists of "
        "them can be kept, tensors as inputs or constants"
    )


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A nested argument with the function of every leaf but None; lists become tuples."""
    if isinstance(value, list | tuple):
        return tuple(_mapped(part, function) for part in value)
    return None if value is None else function(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


_TRUTHS = {("aten::where", "condition"), ("aten::masked_fill", "mask")}


def call_operator(name: str, arguments: Sequence[Any], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Apply an operator; truth values are 0 and 1.

    Args:
        name: of the operator.
        arguments: in the order of its schema, as :class:`FloatOperator` holds them.
        tensors: by ``"%k"`` and ``"@name"``.
    """
    operator = find_operator(name)

    def decode(leaf: Any) -> Any:
        if not isinstance(leaf, str):
            return leaf
        if leaf.startswith("torch."):
            return getattr(torch, leaf.removeprefix("torch."))
        return tensors[leaf] if leaf[:1] in ("%", "@") else leaf

    args, kwargs = [], {}
    for argument, value in zip(operator._schema.arguments, arguments, strict=True):
        decoded = _mapped(value, decode)
        decoded = list(decoded) if isinstance(decoded, tuple) else decoded
        if (operator._schema.name, argument.name) in _TRUTHS and isinstance(decoded, torch.Tensor):
            # Values between operators are float32, constants may be bool.
            decoded = decoded if decoded.dtype == torch.bool else decoded != 0
        if argument.kwarg_only:
            kwargs[argument.name] = decoded
        else:
            args.append(decoded)
    result: torch.Tensor = operator(*args, **kwargs)
    return result.float() if result.dtype == torch.bool else result


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatOperator(Node):
    """An ATen operator in float32 on the true shapes of its inputs, image by image.

    Args:
        operator: name of the overload, as for :func:`find_operator`: ``"layer_norm.default"``.
        arguments: one for each of the operator's schema, in its order, see :func:`encode_arguments`: numbers, text,
            None and tuples of them. ``"%k"`` stands for the k-th input, ``"@name"`` for a constant,
            ``"torch.float32"`` for a type.
        constants: by name; float32, int64 or bool, in the shapes that the operator wants.
        shapes: true shapes of the inputs.
        shape: true shape of the output; ``type.shape`` is its :func:`canonical_shape`.

    Raises:
        UnsupportedModelError: an operator that may not be called, or fields that do not fit each other.
    """

    operator: str
    arguments: tuple[Any, ...]
    constants: Mapping[str, torch.Tensor]
    shapes: tuple[Shape, ...]
    shape: Shape

    def __post_init__(self) -> None:
        schema = find_operator(self.operator)._schema
        if len(self.arguments) != len(schema.arguments):
            self._refuse(f"has {len(self.arguments)} arguments, wanted are all of {schema}")
        references = {leaf for leaf in _leaves(self.arguments) if isinstance(leaf, str) and leaf[:1] in ("%", "@")}
        wanted = {f"%{k}" for k in range(len(self.inputs))} | {f"@{name}" for name in self.constants}
        if references != wanted or not self.inputs or len(self.shapes) != len(self.inputs):
            self._refuse(
                f"has {len(self.inputs)} inputs, {len(self.shapes)} shapes and the constants {sorted(self.constants)}, "
                f"and its arguments refer to {sorted(references)}: give each input a shape and use each once or more"
            )
        for leaf in _leaves(self.arguments):
            if isinstance(leaf, str) and leaf.startswith("torch."):
                found = getattr(torch, leaf.removeprefix("torch."), None)
                if not isinstance(found, torch.dtype | torch.memory_format | torch.layout):
                    self._refuse(f"has the argument {leaf!r}, which is no type, memory format or layout of torch")
        if self.type.is_integer or self.type.shape != canonical_shape(self.shape):
            self._refuse(f"gives floats of shape {canonical_shape(self.shape)} in the graph, its type is {self.type}")
        for name, constant in self.constants.items():
            if constant.dtype not in (torch.float32, torch.int64, torch.bool):
                self._refuse(f"has the constant {name!r} of {constant.dtype}; float32, int64 and bool can be kept")
        if any(constant.dtype == torch.int64 for constant in self.constants.values()):
            self._check_indices()
        for argument, value in zip(schema.arguments, self.arguments, strict=True):
            if argument.name == "dropout_p" and value:
                self._refuse(f"drops values at random (dropout_p={value}); trace the network in eval mode")

    def _check_indices(self) -> None:
        """Compiled code trusts indices: they count from the front, and lie within their dimension."""
        if any(bool((value < 0).any()) for value in self.constants.values() if value.dtype == torch.int64):
            self._refuse("has negative indices; add the size of the dimension to them")
        try:
            self.call(*(torch.zeros(shape) for shape in self.shapes))
        except (IndexError, RuntimeError) as error:
            raise UnsupportedModelError(f"{self.name!r}: aten::{self.operator} cannot run: {error}") from error

    def _refuse(self, why: str) -> None:
        raise UnsupportedModelError(f"{self.name!r}: aten::{self.operator} {why}")

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        """The operator of each image by itself: it may mix the batch with what lies in the first dimension."""
        images = []
        for index in range(len(values[0])):
            operands = [value[index].to(torch.float32) for value in values]
            image = self.call(*(one.reshape(shape) for one, shape in zip(operands, self.shapes, strict=True)))
            if image.dtype != torch.float32 or tuple(image.shape) != self.shape:
                self._refuse(f"gives {image.dtype} of shape {tuple(image.shape)}, wanted is float32 of {self.shape}")
            images.append(image.reshape(self.type.shape))
        return torch.stack(images) if images else torch.empty(0, *self.type.shape)

    def call(self, *operands: torch.Tensor) -> torch.Tensor:
        """The operator of one image: operands and result in their true shapes."""
        tensors = {f"%{k}": value for k, value in enumerate(operands)}
        constants = {f"@{name}": value.to(operands[0].device) for name, value in self.constants.items()}
        return call_operator(self.operator, self.arguments, tensors | constants)

    @property
    def size_bytes(self) -> int:
        """Bytes of its constants as they are kept."""
        return sum(value.numel() * value.element_size() for value in self.constants.values())

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates for one image, of matrix products and convolutions as torch counts them."""
        from torch.utils.flop_counter import FlopCounterMode  # slow to import; most graphs do without

        with FlopCounterMode(display=False) as counter:
            self.call(*(torch.zeros(shape, device="meta") for shape in self.shapes))
        return int(counter.get_total_flops()) // 2
