"""That a graph means what it says: shape, range and constants of every node follow from the values that it reads.

Compiled code trusts all of these. It reserves the memory that a type declares, reads where an index points, and looks
tables up without a look at the number; so nothing is compiled, run or kept that was not proven.

| what | is proven |
| --- | --- |
| shapes | computed from those of the operands; below 2^31 elements, padding included |
| indices and windows | within the value that they read |
| ranges | what is passed on, or looked up in a table, lies within the range of the type that says so |
| integers | accumulators within 32 bits, products and shifts within 64 |
| floats | weights, biases, factors and scales finite; other constants not NaN |
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lightning_baqe.errors import ConfigError
from lightning_baqe.integer.dyadic import MAX_SHIFT, MIN_SHIFT, MULTIPLIER_BITS, Dyadic
from lightning_baqe.integer.float_operators import FloatOperator
from lightning_baqe.integer.nodes import (
    Add,
    Affine,
    AvgPool,
    Clip,
    Concat,
    Conv,
    Dequantize,
    Flatten,
    FloatAdd,
    FloatAffine,
    FloatAvgPool,
    FloatConv,
    FloatFunction,
    FloatLayer,
    FloatLinear,
    FloatMul,
    FloatPRelu,
    Gather,
    Input,
    Layer,
    Linear,
    Literal,
    MaxPool,
    MaxWindows,
    Move,
    Mul,
    Node,
    PRelu,
    Quantize,
    Requantize,
    Table,
    TensorType,
)
from lightning_baqe.quantization.pointwise import Expression, Step

MAX_ELEMENTS = 2**31 - 1  # of one value: kernels index with 32 bits
_INT32 = (-(2**31), 2**31 - 1)
_PASSING = (MaxPool, MaxWindows, Concat, Gather, Flatten, Move)  # integers or floats, as they come
_NO_OPERANDS, _TWO_OPERANDS = (Input, Literal), (Add, Mul, FloatAdd, FloatMul)
_ANY_OPERANDS = (Concat, FloatOperator)  # one or more
_ELEMENTWISE = (
    *(Quantize, Dequantize, Requantize, Clip, Table, Affine, PRelu),
    *(FloatFunction, FloatAffine, FloatPRelu),
)


def prove(node: Node, kinds: Sequence[TensorType]) -> None:
    """Prove one node.

    Args:
        kinds: types of the values that it reads, which are proven.

    Raises:
        ConfigError: it is not what it says; names it, what it has and what is wanted.
    """
    _prove_type(node)
    _prove_operands(node, kinds)
    shape, wanted = node.type.shape, _shape(node, [kind.shape for kind in kinds])
    _want(node, shape == wanted, f"its type has the shape {shape}, what it reads gives {wanted}")
    _prove_numbers(node, kinds)


def prove_returned(output: Node, returned: tuple[int, ...] | None) -> None:
    """Prove that the output has as many elements as the shape in which the network returns it; raises as above."""
    if returned is not None:
        right = all(size > 0 for size in returned) and math.prod(returned) == math.prod(output.type.shape)
        _want(output, right, f"is of shape {output.type.shape}, which cannot be returned as {returned}")


def _want(node: Node, condition: bool, why: str) -> None:
    if not condition:
        raise ConfigError(
            f"node {node.name!r} ({node.kind}): {why}; take the graph as `lower` made it, or an undamaged file"
        )


def _prove_type(node: Node) -> None:
    kind = node.type
    right = len(kind.shape) in (1, 3) and all(size > 0 for size in kind.shape)
    _want(node, right, f"values are (channels, height, width) or (features,), 1 or more of each, not {kind.shape}")
    _want(node, math.prod(kind.shape) <= MAX_ELEMENTS, f"{math.prod(kind.shape)} elements, 2^31 is too many")
    _want(node, (kind.low is None) == (kind.high is None), f"its range is {kind.low}..{kind.high}: both or none")
    if kind.is_integer:
        low, high = kind.limits
        _want(node, _INT32[0] <= low <= high <= _INT32[1], f"its range {low}..{high} is none of 32-bit integers")
        _want(node, _INT32[0] <= kind.zero_point <= _INT32[1], f"its zero point {kind.zero_point} has no 32 bits")
    _want(
        node, math.isfinite(kind.scale) and kind.scale >= 0, f"its scale is {kind.scale}, finite and 0 or more wanted"
    )


def _prove_operands(node: Node, kinds: Sequence[TensorType]) -> None:
    """How many there are, and whether they are integers or floats."""
    given = len(kinds)
    if isinstance(node, _ANY_OPERANDS):
        _want(node, given > 0, "it reads nothing")
    else:
        wanted = 0 if isinstance(node, _NO_OPERANDS) else 2 if isinstance(node, _TWO_OPERANDS) else 1
        _want(node, given == wanted, f"it reads {given} values, wanted are {wanted}")
    if isinstance(node, _PASSING):
        reads = node.type.is_integer
    else:
        reads = not (node.is_float or isinstance(node, Quantize | Input | Literal))
        gives = not (node.is_float or isinstance(node, Dequantize | Input))
        if not isinstance(node, Literal):
            _want(node, node.type.is_integer == gives, f"its type is {_name(node.type)}, it gives {_word(gives)}")
    for name, kind in zip(node.inputs, kinds, strict=True):
        _want(node, kind.is_integer == reads, f"it reads {name!r}, {_name(kind)}, but wants {_word(reads)}")
    if isinstance(node, _PASSING) and reads:
        low, high = node.type.limits
        for name, kind in zip(node.inputs, kinds, strict=True):
            inside = low <= kind.limits[0] and kind.limits[1] <= high
            _want(node, inside, f"its range {low}..{high} does not hold {name!r}, {_name(kind)}, which it passes on")


def _name(kind: TensorType) -> str:
    return f"integers {kind.low}..{kind.high} of shape {kind.shape}" if kind.is_integer else f"floats of {kind.shape}"


def _word(are_integers: bool) -> str:
    return "integers" if are_integers else "floats"


# --- shapes -------------------------------------------------------------------------------------------------------


def _shape(node: Node, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that follows from those of the operands."""
    match node:
        case Conv() | FloatConv():
            return _of_conv(node, shapes[0])
        case Linear() | FloatLinear():
            weight = tuple(node.weight.shape)
            fits = len(weight) == 2 and shapes[0] == weight[1:]
            _want(node, fits, f"its weight of shape {weight} is not for values of shape {shapes[0]}")
            return weight[:1]
        case MaxPool():
            return _of_max_pool(node, shapes[0])
        case MaxWindows() | AvgPool() | FloatAvgPool():
            return _of_windows(node, shapes[0])
        case Concat():
            rest = {shape[1:] for shape in shapes}
            _want(node, len(rest) == 1, f"it joins the channels of {list(shapes)}, whose other sizes differ")
            return sum(shape[0] for shape in shapes), *shapes[0][1:]
        case Gather():
            return _of_gather(node, shapes[0])
        case Move():
            _want_inside(node, "index", node.index, -1, math.prod(shapes[0]))
            return tuple(node.index.shape)
        case Flatten():
            count = math.prod(shapes[0])
            same = math.prod(node.type.shape) == count
            _want(node, same, f"its shape is {node.type.shape}, which has not the {count} elements that it reads")
            return node.type.shape
        case Add() | Mul() | FloatAdd() | FloatMul():
            return _of_pair(node, shapes[0], shapes[1])
        case FloatOperator():
            return _of_operator(node, shapes)
        case Literal():
            return tuple(node.value.shape)
        case Input():
            return _of_input(node)
        case _ if isinstance(node, _ELEMENTWISE):
            return shapes[0]
    raise NotImplementedError(f"no rule for the shape of {node.kind}")


def _of_input(node: Input) -> tuple[int, ...]:
    count = math.prod(node.type.shape)
    if node.given is not None:
        right = all(size > 0 for size in node.given) and math.prod(node.given) == count
        _want(node, right, f"it is given as {node.given}, which is not of {count} elements")
    if node.parts:
        right = all(size > 0 for part in node.parts for size in part) and sum(map(math.prod, node.parts)) == count
        _want(node, right, f"its parts are {node.parts}, which are not of {count} elements together")
    return node.type.shape


def _of_conv(node: Conv | FloatConv, shape: tuple[int, ...]) -> tuple[int, ...]:
    weight, groups = tuple(node.weight.shape), node.groups
    right = len(weight) == 4 and all(size > 0 for size in weight) and len(shape) == 3 and groups >= 1
    right = right and weight[1] * groups == shape[0] and weight[0] % groups == 0
    _want(node, right, f"its weight of shape {weight} in {groups} groups is not for values of shape {shape}")
    top, bottom, left, right_side = node.padding
    pads = ((top, bottom), (left, right_side))
    out = _windows(node, shape, weight[2:], node.stride, pads, node.dilation)
    sizes = tuple(span // step + 1 for span, step in zip(out, node.stride, strict=True))
    _want_windows(node, sizes)
    return weight[0], *sizes


def _of_max_pool(node: MaxPool, shape: tuple[int, ...]) -> tuple[int, ...]:
    _want(node, len(shape) == 3, f"pooling wants (channels, height, width), not {shape}")
    half = all(2 * pad <= kernel for pad, kernel in zip(node.padding, node.kernel, strict=True))
    _want(node, half, f"its padding {node.padding} is more than half of its kernel {node.kernel}")
    pads = tuple((pad, pad) for pad in node.padding)
    spans = _windows(node, shape, node.kernel, node.stride, pads, node.dilation)
    sizes = []
    for span, step, size, pad in zip(spans, node.stride, shape[1:], node.padding, strict=True):
        out = (span + (step - 1 if node.ceil_mode else 0)) // step + 1
        sizes.append(out - 1 if node.ceil_mode and (out - 1) * step >= size + pad else out)  # as torch
    _want_windows(node, sizes)
    return shape[0], *sizes


def _windows(
    node: Node,
    shape: tuple[int, ...],
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> list[int]:
    """How far a window can move, in pixels, by dimension."""
    positive = min(*kernel, *stride, *dilation) >= 1 and min(min(pad) for pad in pads) >= 0
    _want(node, positive, f"kernel {tuple(kernel)}, stride {stride}, dilation {dilation}, padding {pads}")
    padded = [size + sum(pad) for size, pad in zip(shape[1:], pads, strict=True)]
    spans = [size - dil * (k - 1) - 1 for size, k, dil in zip(padded, kernel, dilation, strict=True)]
    _want(node, shape[0] * math.prod(padded) <= MAX_ELEMENTS, f"its padded input {(shape[0], *padded)} is too large")
    return spans


def _want_windows(node: Node, sizes: Sequence[int]) -> None:
    _want(node, min(sizes) >= 1, "its kernel is larger than the padded image")


def _of_windows(node: MaxWindows | AvgPool | FloatAvgPool, shape: tuple[int, ...]) -> tuple[int, ...]:
    _want(node, len(shape) == 3, f"pooling wants (channels, height, width), not {shape}")
    for name, windows, size in (("rows", node.rows, shape[1]), ("columns", node.columns, shape[2])):
        right = windows.dtype == torch.int64 and windows.ndim == 2 and windows.shape[1] == 2 and len(windows) > 0
        _want(node, right, f"its {name} are (first, one past the last) of each window, not {tuple(windows.shape)}")
        first, end = windows[:, 0], windows[:, 1]
        inside = bool((first >= 0).all() and (first < end).all() and (end <= size).all())
        _want(node, inside, f"one of its {name} lies outside 0..{size}")
    return shape[0], len(node.rows), len(node.columns)


def _of_gather(node: Gather, shape: tuple[int, ...]) -> tuple[int, ...]:
    found = list(shape)
    for dim, (name, index) in enumerate((("channels", node.channels), ("rows", node.rows), ("columns", node.columns))):
        if index is not None:
            fits = dim < len(shape) and index.ndim == 1
            _want(node, fits, f"its {name} of shape {tuple(index.shape)} are not for values of shape {shape}")
            _want_inside(node, name, index, -1, shape[dim])
            found[dim] = len(index)
    return tuple(found)


def _want_inside(node: Node, name: str, index: torch.Tensor, low: int, end: int) -> None:
    _want(
        node, index.dtype == torch.int64 and index.numel() > 0, f"its {name} are {index.dtype}, {index.numel()} of them"
    )
    first, last = (int(value) for value in index.aminmax())
    _want(node, low <= first and last < end, f"its {name} take {first}..{last} of 0..{end - 1} (-1 for the value 0)")


def _of_pair(node: Node, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    # torch would also align dimensions of another number, the batch with them.
    alike = len(a) == len(b) and all(1 in pair or pair[0] == pair[1] for pair in zip(a, b, strict=True))
    _want(node, alike, f"operands of shapes {a} and {b}: as many dimensions, each of the same size or 1")
    return tuple(map(max, zip(a, b, strict=True)))


def _of_operator(node: FloatOperator, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    for shape, true in zip(shapes, node.shapes, strict=True):
        same = math.prod(shape) == math.prod(true)
        _want(
            node, same, f"reads values of shape {shape}, its operator wants {true}: give the shape of the float network"
        )
    try:
        found = tuple(node.call(*(torch.empty(shape, device="meta") for shape in node.shapes)).shape)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        raise ConfigError(f"node {node.name!r} ({node.kind}): aten::{node.operator} cannot run: {error}") from error
    _want(node, found == node.shape, f"aten::{node.operator} gives the shape {found}, not {node.shape}")
    return node.type.shape  # its canonical shape, as its own check has it


# --- numbers ------------------------------------------------------------------------------------------------------


def _prove_numbers(node: Node, kinds: Sequence[TensorType]) -> None:
    match node:
        case Literal() if not node.type.is_integer:
            _want(node, not bool(node.value.isnan().any()), "its value holds NaN")
        case Quantize():
            _want_finite(node, "inverse_scale", torch.tensor(node.inverse_scale))
            _want(node, node.inverse_scale > 0, f"its inverse scale is {node.inverse_scale}, above 0 wanted")
        case Dequantize():
            _want_by_channel(node, "scale", node.scale)
            _want_finite(node, "scale", node.scale)
            _want_zero_point(node, node.zero_point, kinds[0])
        case Layer():
            _of_layer(node, kinds[0])
        case FloatLayer():
            _want(
                node, tuple(node.bias.shape) == node.type.shape[:1], f"its bias has the shape {tuple(node.bias.shape)}"
            )
            _want_finite(node, "weight", node.weight)
            _want_finite(node, "bias", node.bias)
        case FloatAffine():
            for name, values in (("gain", node.gain), ("shift", node.shift)):
                _want_by_channel(node, name, values)
                _want_finite(node, name, values)
        case FloatPRelu():
            _want_by_channel(node, "slope", node.slope)
            _want_finite(node, "slope", node.slope)
        case FloatAvgPool():
            _want_by_pixel(node, "factors", node.factors)
            _want_finite(node, "factors", node.factors)
        case FloatFunction():
            _want_steps(node, node.steps)
        case FloatOperator():
            for name, values in node.constants.items():
                _want(node, not bool(values.isnan().any()), f"its constant {name!r} holds NaN")
        case AvgPool():
            _want_by_pixel(node, "requant", node.requant.multiplier)
            (rows, columns), zero_point = (
                (windows.diff(dim=1).max() for windows in (node.rows, node.columns)),
                node.input_zero_point,
            )
            _want_within(node, "sum of a window", int(rows) * int(columns) * _farthest(kinds[0], zero_point), 31)
        case Add():
            _of_add(node, kinds)
        case Mul():
            _want_one(node, "requant", node.requant)
            farthest = [_farthest(kind, zero) for kind, zero in zip(kinds, node.input_zero_points, strict=True)]
            _want_within(node, "product", math.prod(farthest), 31)
        case Requantize():
            _want_one(node, "requant", node.requant)
            _want_zero_point(node, node.input_zero_point, kinds[0])
        case Table():
            _of_table(node, kinds[0])
        case Affine():
            _want_by_channel(node, "requant", node.requant.multiplier)
            _want_by_channel(node, "offset", node.offset)
            _want_within(node, "offset", _largest(node.offset), 61)
            _want_zero_point(node, node.input_zero_point, kinds[0])
        case PRelu():
            for name, factors in (("positive", node.positive), ("negative", node.negative)):
                _want_by_channel(node, name, factors.multiplier)
            _want_zero_point(node, node.input_zero_point, kinds[0])


def _of_layer(node: Layer, kind: TensorType) -> None:
    low, high = node.input_range
    inside = low <= kind.limits[0] and kind.limits[1] <= high
    _want(node, inside, f"it was made for values {low}..{high}, what it reads is {_name(kind)}")
    widths = node.weight_bits if isinstance(node.weight_bits, tuple) else (node.weight_bits,)
    _want(node, all(1 <= bits <= 32 for bits in widths), f"its weights have {node.weight_bits} bits")
    fits = len(widths) in (1, len(node.weight))
    _want(node, fits, f"it has {len(node.weight)} output channels, and bits for {len(widths)}")
    lowest, highest = node.weight.flatten(1).aminmax(dim=1)
    for bits in set(widths):
        channels = (torch.tensor(widths) == bits).expand(len(lowest))
        first, last, bound = int(lowest[channels].min()), int(highest[channels].max()), 1 << (bits - 1)
        _want(node, -bound <= first and last < bound, f"weights {first}..{last} have not {bits} bits")
    out = node.type.shape[:1]
    for name, values in (("bias", node.bias), ("fraction", node.fraction)):
        if values is not None:
            right = tuple(values.shape) == out and values.dtype == torch.int64
            _want(node, right, f"its {name} is {values.dtype} of shape {tuple(values.shape)}, int64 of {out} wanted")
    if node.fraction is not None:
        _want(node, node.requant is not None, "it has a fraction, and nothing that it is a fraction of")
        _want_within(node, "fraction", _largest(node.fraction), MULTIPLIER_BITS)
    if node.requant is None:
        _want(node, node.type.limits == _INT32, f"accumulators are of 32 bits, its type is {_name(node.type)}")
    else:
        _want_by_channel(node, "requant", node.requant.multiplier)
    if isinstance(node, Conv):
        _want(node, low <= node.pad_value <= high, f"it pads with {node.pad_value}, its input is within {low}..{high}")


def _of_add(node: Add, kinds: Sequence[TensorType]) -> None:
    _want(node, MIN_SHIFT <= node.shift <= MAX_SHIFT, f"its shift is {node.shift}, not {MIN_SHIFT}..{MAX_SHIFT}")
    _want_within(node, "multiplier", max(map(abs, node.multipliers)), MULTIPLIER_BITS)
    parts = [abs(m) * max(map(abs, kind.limits)) for m, kind in zip(node.multipliers, kinds, strict=True)]
    _want_within(node, "sum", sum(parts) + abs(node.offset) + (1 << (node.shift - 1)), 63)


def _of_table(node: Table, kind: TensorType) -> None:
    low, high = kind.limits
    right = node.table.dtype == torch.int64 and tuple(node.table.shape) == (high - low + 1,) and node.input_low == low
    _want(
        node,
        right,
        f"its {tuple(node.table.shape)} entries from {node.input_low} on are not one for each of {low}..{high}",
    )
    first, last = (int(value) for value in node.table.aminmax())
    inside = node.type.limits[0] <= first and last <= node.type.limits[1]
    _want(node, inside, f"its entries {first}..{last} are not all within {node.type.limits}")
    if node.steps:
        _want_steps(node, node.steps)


def _want_steps(node: Node, steps: tuple[Step, ...]) -> None:
    try:
        found = Expression(steps)(torch.zeros(1))
    except (ConfigError, RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"node {node.name!r} ({node.kind}): its function {steps} cannot be computed: {error}"
        ) from error
    _want(node, tuple(found.shape) == (1,), f"its function {steps} gives {tuple(found.shape)} values for one")


def _want_finite(node: Node, name: str, values: torch.Tensor) -> None:
    _want(node, values.is_floating_point() and bool(values.isfinite().all()), f"its {name} is not finite everywhere")


def _want_by_channel(node: Node, name: str, values: torch.Tensor) -> None:
    right = values.ndim == 0 or tuple(values.shape) == node.type.shape[:1]
    _want(
        node, right, f"its {name} has the shape {tuple(values.shape)}, one for all or for each of {node.type.shape[0]}"
    )


def _want_by_pixel(node: Node, name: str, values: torch.Tensor) -> None:
    right = values.ndim == 0 or tuple(values.shape) == (math.prod(node.type.shape[1:]),)
    _want(node, right, f"its {name} has the shape {tuple(values.shape)}, one for all or for each pixel wanted")


def _want_one(node: Node, name: str, factor: Dyadic) -> None:
    _want(node, factor.multiplier.ndim == 0, f"its {name} has the shape {tuple(factor.multiplier.shape)}, one wanted")


def _want_zero_point(node: Node, zero_point: int, kind: TensorType) -> None:
    # The range of accumulators is nominal; times 31 bits and rounded, what is left of the zero point fits 64 bits.
    farthest = _farthest(kind, zero_point)
    _want(node, farthest <= 2**31 + 2**16, f"{_name(kind)} less its zero point {zero_point} leave 32 bits")


def _farthest(kind: TensorType, zero_point: int) -> int:
    """How far a value can be from the zero point."""
    return max(abs(limit - zero_point) for limit in kind.limits)


def _largest(values: torch.Tensor) -> int:
    """In absolute value; that of -2^63 has no place in a tensor."""
    return max(abs(int(end)) for end in values.aminmax()) if values.numel() else 0


def _want_within(node: Node, name: str, largest: int, bits: int) -> None:
    _want(node, largest < 1 << bits, f"its {name} can reach {largest}, below 2^{bits} is wanted")
