"""Lowering of operators without weights: sums, products, concatenation, functions, batch norms alone, pooling.

Each function adds what one operator needs to the graph under construction and returns the value that it makes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer import movement
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.dyadic import MULTIPLIER_BITS, Dyadic
from lightning_baqe.integer.folding import add_factors, requant
from lightning_baqe.integer.shapes import adaptive_sizes, as_image, pair, pool_windows, stride_of
from lightning_baqe.integer.values import Builder, Target, Value
from lightning_baqe.quantization.ops import Op
from lightning_baqe.quantization.pointwise import Expression, function

MAX_OFFSET_BITS = 60
MAX_WINDOW = 2**31 // 255


@dataclass(frozen=True)
class _Frame:
    """Operands of an elementwise operator, each of the shape of one of them or ``(channels, 1, 1)``.

    Args:
        values: without index maps.
        shape: of the result's base value.
        index: how the operator's result lies in it; None as it is.
    """

    values: tuple[Value, ...]
    shape: tuple[int, ...]
    index: movement.Index | None


def _frame(build: Builder, node: fx.Node, op: Op) -> _Frame:
    """The operands in the order of elements of the first that has the result's shape and lost or repeated none."""
    values = [build.values[source] for source in op.inputs]
    full = torch.Size(build.python.values[node].shape)
    shape = build.shape_of(node)
    if all(value.index is None and _spreads(value.shape, shape) for value in values) and len(shape) in (1, 3):
        return _Frame(tuple(values), shape, None)
    maps = [value.elements for value in values]
    leaders = [
        place
        for place, (value, found) in enumerate(zip(values, maps, strict=True))
        if found.shape == full and movement.is_bijection(found, value.type.shape)
    ]
    if leaders:
        leader = maps[leaders[0]]
        shape, index = values[leaders[0]].type.shape, values[leaders[0]].index
    else:
        shape = movement.stored(build.shape_of(node))
        leader, index = movement.start(shape).reshape(full), None
        index = None if len(full) - 1 == len(shape) and full[0] == 2 else leader
    framed = []
    for value, found in zip(values, maps, strict=True):
        inside = movement.in_frame(movement.spread(found, full), leader, shape)
        if (
            len(shape) == 3
            and math.prod(value.shape) < math.prod(shape)
            and torch.equal(inside, inside[:, :, :1, :1].expand(inside.shape))
        ):
            inside = inside[:, :, :1, :1]
        framed.append(build.in_place(replace(value, index=inside), node))
    return _Frame(tuple(framed), shape, index)


def _spreads(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether a value has the full shape, or 1 in its place."""
    return len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))


def _spread(build: Builder, value: Value, shape: tuple[int, ...], node: fx.Node) -> Value:
    """Repeat a value along the dimensions where it has one element."""
    if value.shape == shape:
        return value
    index = movement.start(value.shape).expand(2, *shape)
    return build.in_place(replace(value, index=index.contiguous()), node)


def _are_floats(build: Builder, node: fx.Node, values: list[Value]) -> bool:
    """Whether all values are floats; a mix is refused."""
    kinds = {value.type.is_integer for value in values}
    if len(kinds) > 1:
        raise build.refuse(node, "one operand is an integer tensor, the other is not")
    return kinds == {False}


def fuse_relu(build: Builder, node: fx.Node) -> bool:
    """Whether the only consumer is a ReLU; it is then taken to be fused."""
    consumers = build.reader.consumers[node]
    while len(consumers) == 1 and build.reader[consumers[0]].kind in ("identity", "dropout"):
        consumers = build.reader.consumers[consumers[0]]
    fused = len(consumers) == 1 and build.reader[consumers[0]].kind == "relu"
    if fused:
        build.done[consumers[0]] = None
    return fused


def add(build: Builder, node: fx.Node, op: Op) -> Value:
    """A sum or difference of two tensors, each at a dyadic scale of its own."""
    label, sign, frame = build.label(node), op.options["sign"], _frame(build, node, op)
    a, b = (_spread(build, value, frame.shape, node) for value in frame.values)
    if _are_floats(build, node, [a, b]):
        if sign < 0:
            b = _float_function(build, f"{label}.neg", b, function("neg"))
        kind = ir.TensorType(frame.shape)
        return build.emit(ir.FloatAdd, label, [a, b], kind, None, frame.index, relu=fuse_relu(build, node))
    target = build.need_target(node)
    ratios = a.type.scale / target.scale, sign * b.type.scale / target.scale
    multipliers, shift, offset = add_factors(ratios, (a.type, b.type), label)
    numbers = {"multipliers": multipliers, "shift": shift, "offset": offset}
    return build.emit(ir.Add, label, [a, b], target.type(frame.shape), target.grid, frame.index, **numbers)


def mul(build: Builder, node: fx.Node, op: Op) -> Value:
    """A product of two tensors; one may be spread over the other's pixels, as in squeeze-and-excite."""
    label, frame = build.label(node), _frame(build, node, op)
    a, b = frame.values
    if a.shape != frame.shape:
        a, b = b, a
    a = _spread(build, a, frame.shape, node)
    if _are_floats(build, node, [a, b]):
        return build.emit(ir.FloatMul, label, [a, b], ir.TensorType(frame.shape), None, frame.index)
    target = build.need_target(node)
    numbers = {
        "requant": requant(a.type.scale * b.type.scale / target.scale, label),
        "input_zero_points": (a.type.zero_point, b.type.zero_point),
    }
    return build.emit(ir.Mul, label, [a, b], target.type(frame.shape), target.grid, frame.index, **numbers)


def concat(build: Builder, node: fx.Node, op: Op) -> Value:
    """A concatenation, its parts rescaled to one grid; of other dimensions than channels as if these were channels."""
    label, dim = build.label(node), op.options["dim"]
    full = build.python.values[node].shape
    values = [build.values[source] for source in op.inputs if build.python.values[source].numel()]
    plain = dim == 1 and len(full) in (2, 4) and full[0] == 2
    if full[0] % 2:
        raise build.refuse(
            node, f"the batch must stay the outermost dimension of tensors, got {tuple(full)}: move it there"
        )
    if not plain:
        values = [replace(value, index=_channels_first(value.elements, dim)) for value in values]
    values = [build.in_place(value, node) for value in values]
    shape = (sum(value.shape[0] for value in values), *values[0].shape[1:])
    index = None if plain else _channels_back(shape, dim, full)
    if _are_floats(build, node, values):
        return build.emit(ir.Concat, label, values, ir.TensorType(shape), None, index)
    target = build.need_target(node)
    values = [
        v if v.grid is target.grid else build.requantize(v, target, f"{label}.{v.name}.requantize") for v in values
    ]
    lows, highs = zip(*(value.type.limits for value in values), strict=True)
    kind = replace(target.type(shape), low=min(lows), high=max(highs))
    return build.emit(ir.Concat, label, values, kind, target.grid, index)


def _channels_first(index: torch.Tensor, dim: int) -> torch.Tensor:
    """A map with one dimension brought to the front: ``(2, size of it, ..., ...)``; the batch may be merged with its
    first dimension.
    """
    moved = index.reshape(2, len(index) // 2, *index.shape[1:]).movedim(dim + 1, 1)
    size, rest = moved.shape[1], moved.shape[3:] if moved.shape[2] == 1 else moved.shape[2:]
    return moved.reshape(2, size, *(rest if len(rest) == 2 else (1, math.prod(rest))))


def _channels_back(shape: tuple[int, ...], dim: int, full: torch.Size) -> torch.Tensor:
    """The map of a base value whose channels are dimension ``dim`` of a tensor of the shape ``full``."""
    moved = [2, full[dim], full[0] // 2, *(size for place, size in enumerate(full) if place not in (0, dim))]
    return movement.start(shape).reshape(moved).movedim(1, dim + 1).reshape(full)


def pointwise(build: Builder, node: fx.Node, op: Op) -> Value:
    """An expression of one tensor: a table of all its inputs."""
    label, value, found = build.label(node), build.source(op), _expression(build, op)
    if not value.type.is_integer:
        return _float_function(build, label, value, found)
    target = build.need_target(node)
    kind, (low, high) = target.type(value.type.shape), value.type.limits
    integers = torch.arange(low, high + 1) - value.type.zero_point
    # As the fake-quantized network computes it, in float32, operation by operation.
    out = found(integers.to(torch.float32) * value.type.scale)
    if bool(torch.isnan(out).any()):
        raise build.refuse(
            node, f"{found} is no number for some of the values {low}..{high} of scale {value.type.scale:.3g} that its "
            "input can take; clamp the input to where it is defined"
        )  # fmt: skip
    rounding = ir.Quantize(name=label, inputs=(), type=kind, inverse_scale=target.inverse_scale)
    table, index = rounding.run(out), value.index
    return build.emit(ir.Table, label, [value], kind, target.grid, index, table=table, input_low=low, steps=found.steps)


def _expression(build: Builder, op: Op) -> Expression:
    """A function's expression, the network's constants in it as numbers."""

    def number(value: Any) -> Any:
        found = build.python.values[value] if isinstance(value, fx.Node) else value
        return found.item() if isinstance(found, torch.Tensor) else found

    return Expression(tuple((name, *map(number, arguments)) for name, *arguments in op.options["steps"]))


def _float_function(build: Builder, label: str, value: Value, found: Expression) -> Value:
    return build.emit(ir.FloatFunction, label, [value], value.type, None, value.index, steps=found.steps)


def affine(build: Builder, node: fx.Node, op: Op) -> Value:
    """Batch norms that follow no layer, and constants that scale and shift channels: all in a row as one."""
    value, last = build.source(op), node
    gain, shift, dim = build.gain_and_shift(node)
    while (
        dim == 1 and len(build.reader.consumers[last]) == 1 and build.reader.is_chained(build.reader.consumers[last][0])
    ):
        last = build.reader.consumers[last][0]
        factor, term, _ = build.gain_and_shift(last)
        gain, shift = gain * factor, shift * factor + term
        build.done[last] = None
    value, places = _by_base_channel(build, value, node, dim)
    gain, shift, label = gain[places], shift[places], build.label(node)
    if not value.type.is_integer:
        numbers = {"gain": gain.float(), "shift": shift.float()}
        return build.emit(ir.FloatAffine, label, [value], value.type, None, value.index, **numbers)
    target = build.need_target(last)
    factors, offset = affine_factors(gain * value.type.scale / target.scale, shift / target.scale, label)
    kind, zero_point = target.type(value.type.shape), value.type.zero_point
    constants = {"requant": factors, "offset": offset, "input_zero_point": zero_point}
    return build.emit(ir.Affine, label, [value], kind, target.grid, value.index, **constants)


def _by_base_channel(build: Builder, value: Value, node: fx.Node, dim: int) -> tuple[Value, torch.Tensor]:
    """The value with base channels that each lie at one place along dimension ``dim``, and these places."""
    full = build.python.values[node].shape
    count = full[dim]
    along = torch.arange(count, dtype=torch.float64).reshape([-1 if d == dim else 1 for d in range(len(full))])
    if value.index is None and dim == 1 and full[0] == 2:
        return value, torch.arange(count)
    if movement.is_bijection(value.elements, value.type.shape):
        places = movement.in_frame(along.expand(full), value.elements, value.type.shape)
        first = places[0].reshape(value.type.shape[0], -1)
        if torch.equal(first, first[:, :1].expand(first.shape)):
            return value, first[:, 0].to(torch.int64)
    arranged = build.in_place(replace(value, index=_channels_first(value.elements, dim)), node)
    return replace(arranged, index=_channels_back(arranged.type.shape, dim, full)), torch.arange(count)


def prelu(build: Builder, node: fx.Node, op: Op) -> Value:
    """Slopes by channel, or one, for what is negative."""
    label, slopes = build.label(node), build.python.values[op.options["weight"]].detach().double().flatten()
    value, places = _by_base_channel(build, build.source(op), node, 1)
    slopes = slopes[places] if len(slopes) > 1 else slopes.expand(value.type.shape[0])
    if not value.type.is_integer:
        return build.emit(ir.FloatPRelu, label, [value], value.type, None, value.index, slope=slopes.float())
    target = build.need_target(node)
    kind, ratio = target.type(value.type.shape), value.type.scale / target.scale
    factors = {"positive": requant(ratio, label), "negative": requant(slopes * ratio, label)}
    zero_point = value.type.zero_point
    return build.emit(ir.PRelu, label, [value], kind, target.grid, value.index, input_zero_point=zero_point, **factors)


def literal(build: Builder, node: fx.Node, op: Op) -> Value:
    """A constant that is an operand like any tensor; perhaps spread over the batch."""
    constant, alone = (found[node].detach().float() for found in (build.python.values, build.alone))
    if constant.shape != alone.shape:
        dim = build.batch_dim(node)
        if not torch.equal(constant, torch.cat([alone, alone], dim)):
            raise build.refuse(node, "it is a constant that differs from image to image; let all images have the same")
        if dim or len(alone) != 1:
            made = _literal(build, node, alone)
            return replace(made, index=torch.cat([*movement.start(made.type.shape).reshape(2, *alone.shape)], dim))
        constant = alone
    if constant.ndim == 0:
        constant = constant.reshape(1, 1)
    if constant.shape[0] != 1:
        constant = constant[None]  # it has no dimension for the batch
    made = _literal(build, node, constant[0])
    index = movement.start(made.type.shape).reshape(2, *constant.shape[1:])
    return made if made.type.shape == tuple(constant.shape[1:]) else replace(made, index=index)


def _literal(build: Builder, node: fx.Node, constant: torch.Tensor) -> Value:
    shape = movement.stored(tuple(constant.shape)) or (1,)
    return build.emit(ir.Literal, build.label(node), [], ir.TensorType(shape), value=constant.reshape(shape))


def relu(build: Builder, node: fx.Node, op: Op) -> Value:
    """A ReLU or ReLU6: the ends of a range."""
    value = build.source(op)
    if not value.type.is_integer:
        return _float_function(build, build.label(node), value, function(op.kind))
    assert value.grid is not None
    (low, high), (lowest, highest) = value.type.limits, Target(value.grid, (op.kind,)).type(()).limits
    kind = replace(value.type, low=max(low, lowest), high=min(high, highest))
    if kind == value.type:
        return value
    return build.emit(ir.Clip, build.label(node), [value], kind, value.grid, value.index)


def max_pool(build: Builder, node: fx.Node, op: Op) -> Value:
    """The largest value of each window."""
    label, shape = build.label(node), build.python.values[node].shape
    options = as_image(build.python.resolve(op.options), len(shape) == 3)
    if isinstance(build.source(op).index, torch.Tensor) and bool(build.source(op).elements.isneginf().any()):
        return _max_inside(build, node, op, options)
    value = _image(build, node, op)
    if op.kind == "adaptive_max_pool":
        full, wanted = value.type.shape[1:], adaptive_sizes(options, value.type.shape)
        if any(size % out for size, out in zip(full, wanted, strict=True)):
            rows, columns, _ = pool_windows("adaptive_avg_pool", options, value.type.shape, label)
            kind = replace(value.type, shape=(value.type.shape[0], len(rows), len(columns)))
            made = build.emit(ir.MaxWindows, label, [value], kind, value.grid, rows=rows, columns=columns)
            return _as_pooled(made, shape)
        options = {"kernel_size": (full[0] // wanted[0], full[1] // wanted[1])}
    kernel = pair(options["kernel_size"])
    made = build.emit(
        ir.MaxPool,
        label,
        [value],
        replace(value.type, shape=(value.type.shape[0], *_pooled_size(shape))),
        value.grid,
        kernel=kernel,
        stride=stride_of(options, kernel),
        padding=pair(options.get("padding", 0)),
        dilation=pair(options.get("dilation", 1)),
        ceil_mode=bool(options.get("ceil_mode", False)),
    )
    return _as_pooled(made, shape)


def _max_inside(build: Builder, node: fx.Node, op: Op, options: Mapping[str, Any]) -> Value:
    """Max pooling of an image in a frame of negative infinity, which no maximum is taken of."""
    value, shape = build.source(op), build.python.values[node].shape
    outside = value.elements[0, 0].isneginf()
    dilation, padding = pair(options.get("dilation", 1)), pair(options.get("padding", 0))
    kernel = pair(options["kernel_size"])
    steps, found, cut = stride_of(options, kernel), [], value.elements
    for dim in (0, 1):
        inside = (~outside).any(1 - dim).nonzero().flatten()
        first, size = int(inside[0]), len(inside)
        cut = cut.narrow(dim + 2, first, size)
        starts = [place * steps[dim] - padding[dim] - first for place in range(shape[dim + 2])]
        found.append([(max(start, 0), min(start + kernel[dim], size)) for start in starts])
    if len(shape) != 4 or dilation != (1, 1) or bool(cut.isneginf().any()) or any(a >= b for f in found for a, b in f):
        raise build.refuse(node, "its windows of negative infinity have no integer meaning; pad less")
    inner = build.in_place(replace(value, index=cut), node)
    kind = replace(inner.type, shape=(inner.type.shape[0], *_pooled_size(shape)))
    rows, columns = map(torch.tensor, found)
    return build.emit(ir.MaxWindows, build.label(node), [inner], kind, inner.grid, rows=rows, columns=columns)


def _image(build: Builder, node: fx.Node, op: Op) -> Value:
    """What a pooling or convolution reads, as an image; a signal of one dimension is an image of one row."""
    value = build.source(op)
    index = value.elements
    return build.in_place(value if index.ndim == 4 else replace(value, index=index.unsqueeze(-2)), node)


def _pooled_size(shape: torch.Size) -> tuple[int, int]:
    return (shape[2], shape[3]) if len(shape) == 4 else (1, shape[2])


def _as_pooled(value: Value, shape: torch.Size) -> Value:
    """An image of one row as the signal that the network has."""
    if value.type.shape == tuple(shape[1:]):
        return value
    return replace(value, index=movement.start(value.type.shape).reshape(shape))


def avg_pool(build: Builder, node: fx.Node, op: Op) -> Value:
    """The mean of each window: a sum, divided dyadically."""
    label, shape = build.label(node), build.python.values[node].shape
    value, options = _image(build, node, op), as_image(build.python.resolve(op.options), len(shape) == 3)
    rows, columns, divisors = pool_windows(op.kind, options, value.type.shape, label)
    return _as_pooled(_average(build, node, value, rows, columns, divisors), shape)


def reduce(build: Builder, node: fx.Node, op: Op) -> Value:
    """Mean, sum or largest value over some dimensions: those that stay become channels, the others an image."""
    value, full = build.source(op), build.python.values[op.inputs[0]].shape
    dims = list(op.options["dim"])
    kept = [dim for dim in range(1, len(full)) if dim not in dims]
    index = value.elements.permute(0, *kept, *dims)
    sizes = [full[dim] for dim in dims]
    image = sizes if len(sizes) == 2 else [1, math.prod(sizes)]
    channels = full[0] // 2 * math.prod(full[dim] for dim in kept)
    value = build.in_place(replace(value, index=index.reshape(2, channels, *image)), node)
    rows, columns = (torch.tensor([[0, size]]) for size in image)
    if op.kind == "amax":
        kind = replace(value.type, shape=(channels, 1, 1))
        made = build.emit(ir.MaxPool, build.label(node), [value], kind, value.grid, kernel=tuple(image),
            stride=tuple(image), padding=(0, 0), dilation=(1, 1), ceil_mode=False)  # fmt: skip
    else:
        count = math.prod(image) if op.kind == "mean" else 1
        made = _average(build, node, value, rows, columns, torch.tensor(count, dtype=torch.float64))
    shape = build.python.values[node].shape
    return made if tuple(shape[1:]) == made.type.shape else replace(
        made, index=movement.start(made.type.shape).reshape(shape)
    )  # fmt: skip


def _average(
    build: Builder, node: fx.Node, value: Value, rows: torch.Tensor, columns: torch.Tensor, divisors: torch.Tensor
) -> Value:
    label, shape = build.label(node), (value.type.shape[0], len(rows), len(columns))
    if not value.type.is_integer:
        factors, kind = (1.0 / divisors).float(), ir.TensorType(shape)
        return build.emit(ir.FloatAvgPool, label, [value], kind, rows=rows, columns=columns, factors=factors)
    largest = math.prod(int((ends[:, 1] - ends[:, 0]).max()) for ends in (rows, columns))
    if largest > MAX_WINDOW:
        raise build.refuse(node, f"the sum over a window of {largest} values can leave 32 bits; pool in two steps")
    target = build.need_target(node)
    return build.emit(
        ir.AvgPool,
        label,
        [value],
        target.type(shape),
        target.grid,
        rows=rows,
        columns=columns,
        requant=requant(value.type.scale / (target.scale * divisors), label),
        input_zero_point=value.type.zero_point,
    )


def resize(build: Builder, node: fx.Node, op: Op) -> Value:
    """Bilinear upsampling by a whole number: a nearest one, then a depthwise convolution with small integers."""
    value, shape = build.in_place(build.source(op), node), build.shape_of(node)
    before, after = value.type.shape[1:], shape[1:]
    factors = [out // size for size, out in zip(before, after, strict=True)]
    if op.options.get("align_corners") or [size * f for size, f in zip(before, factors, strict=True)] != list(after):
        raise build.refuse(node, f"bilinear resizing of {before} to {after} is no upsampling by a whole number without "
            "align_corners")  # fmt: skip
    kernels = [_bilinear_kernel(factor) for factor in factors]
    index = value.elements.repeat_interleave(factors[0], 2).repeat_interleave(factors[1], 3)
    halves = [len(kernel) // 2 for kernel in kernels]
    index = functional.pad(index, (halves[1], halves[1], halves[0], halves[0]), mode="replicate")
    value = build.in_place(replace(value, index=index), node)
    weight = torch.outer(*kernels).expand(shape[0], 1, -1, -1)
    divisor, label, zeros = 4 * factors[0] * factors[1], build.label(node), torch.zeros(shape[0])
    window = {"stride": (1, 1), "dilation": (1, 1), "padding": (0, 0, 0, 0), "groups": shape[0], "layer": label}
    if not value.type.is_integer:
        numbers = {"weight": (weight / divisor).float(), "bias": zeros, "relu": fuse_relu(build, node)}
        return build.emit(ir.FloatConv, label, [value], ir.TensorType(shape), **numbers, **window)
    target = build.need_target(node)
    integers = weight.to(torch.int64)
    return build.emit(
        ir.Conv,
        label,
        [value],
        target.type(shape),
        target.grid,
        weight=integers,
        weight_bits=8,
        activation_bits=8,
        bias=-value.type.zero_point * integers.flatten(1).sum(1),
        input_range=value.type.limits,
        requant=requant(torch.full((shape[0],), value.type.scale / (divisor * target.scale)).double(), label),
        fraction=torch.zeros(shape[0], dtype=torch.int64),
        pad_value=value.type.zero_point,
        **window,
    )


def _bilinear_kernel(factor: int) -> torch.Tensor:
    """What turns nearest upsampling by a factor into linear one, times twice the factor: whole numbers."""
    # Of the neighbour before it a pixel of the finer grid takes (factor - 1 - 2 r) / (2 factor), r its place.
    weights = [factor - 1 - 2 * place for place in range((factor + 1) // 2)] + [0]
    side = [a - b for a, b in itertools.pairwise(weights)]
    side = side[: factor // 2]
    return torch.tensor([*side[::-1], 2 * factor - 2 * sum(side), *side], dtype=torch.float64)


def affine_factors(gain: torch.Tensor, shift: torch.Tensor, name: str) -> tuple[Dyadic, torch.Tensor]:
    """The constants of :class:`~lightning_baqe.integer.nodes.Affine`, with as many bits as 64-bit sums allow.

    Args:
        gain: float64, ``(channels,)``, in steps of the output for each step of the input.
        shift: float64, ``(channels,)``, in steps of the output.

    Raises:
        UnsupportedModelError: a number is not finite or too large.
    """
    largest, farthest = float(gain.abs().max()), float(shift.abs().max())
    if not (math.isfinite(largest) and math.isfinite(farthest)) or max(largest, farthest) >= 2.0**30:
        raise UnsupportedModelError(
            f"{name}: a gain of {largest:.3g} and a shift of {farthest:.3g} steps of the output's grid are out of "
            "reach; calibrate with representative data"
        )
    bits = min(MULTIPLIER_BITS - math.frexp(largest)[1], MAX_OFFSET_BITS - math.frexp(farthest)[1])
    factors = Dyadic.rounded(gain, bits)
    return factors, torch.round(shift * 2.0**factors.shift).to(torch.int64)
