"""Lowering of operators without weights: sums, products, concatenation, functions, batch norms alone, pooling.

Each function adds what one operator needs to the graph under construction and returns the value that it makes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import fx, nn

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer import movement
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.dyadic import MULTIPLIER_BITS, Dyadic
from lightning_baqe.integer.folding import add_factors, requant
from lightning_baqe.integer.shapes import adaptive_sizes, pair, pool_windows, stride_of
from lightning_baqe.integer.values import Builder, Target, Value
from lightning_baqe.quantization.batch_norm import gain_and_shift
from lightning_baqe.quantization.ops import Op
from lightning_baqe.quantization.pointwise import Pointwise

MAX_OFFSET_BITS = 60
MAX_WINDOW = 2**31 // 255


def _operands(build: Builder, node: fx.Node, op: Op) -> list[Value]:
    """Both operands of a sum or product at the output's shape, but for ``(channels, 1, 1)`` ones."""
    shape = build.shape_of(node)
    found = []
    for source in op.inputs:
        value = build.in_place(build.values[source], node)
        if value.shape not in (shape, (shape[0], *[1] * (len(shape) - 1))):
            fits = len(value.shape) == len(shape)
            if not fits or any(size not in (1, full) for size, full in zip(value.shape, shape, strict=True)):
                raise build.refuse(node, f"an operand of shape {value.shape} for an output of shape {shape}")
            value = _spread(build, value, shape, node)
        found.append(value)
    return found


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
        build.done.add(consumers[0])
    return fused


def add(build: Builder, node: fx.Node, op: Op) -> Value:
    """A sum or difference of two tensors, each at a dyadic scale of its own."""
    label, sign, shape = build.label(node), op.options["sign"], build.shape_of(node)
    a, b = (_spread(build, value, shape, node) for value in _operands(build, node, op))
    if _are_floats(build, node, [a, b]):
        if sign < 0:
            b = build.emit(ir.FloatFunction, f"{label}.neg", [b], b.type, function="neg", parameters=())
        return build.emit(ir.FloatAdd, label, [a, b], ir.TensorType(shape), relu=fuse_relu(build, node))
    target = build.need_target(node)
    ratios = a.type.scale / target.scale, sign * b.type.scale / target.scale
    multipliers, shift, offset = add_factors(ratios, (a.type, b.type), label)
    return build.emit(
        ir.Add, label, [a, b], target.type(shape), target.grid, multipliers=multipliers, shift=shift, offset=offset
    )


def mul(build: Builder, node: fx.Node, op: Op) -> Value:
    """A product of two tensors; one may be spread over the other's pixels, as in squeeze-and-excite."""
    label, shape = build.label(node), build.shape_of(node)
    a, b = _operands(build, node, op)
    if a.shape != shape:
        a, b = b, a
    a = _spread(build, a, shape, node)
    if _are_floats(build, node, [a, b]):
        return build.emit(ir.FloatMul, label, [a, b], ir.TensorType(shape))
    target = build.need_target(node)
    factor = requant(a.type.scale * b.type.scale / target.scale, label)
    return build.emit(
        ir.Mul,
        label,
        [a, b],
        target.type(shape),
        target.grid,
        requant=factor,
        input_zero_points=(a.type.zero_point, b.type.zero_point),
    )


def concat(build: Builder, node: fx.Node, op: Op) -> Value:
    """A concatenation over channels, its parts rescaled to one grid."""
    label, shape = build.label(node), build.shape_of(node)
    values = [build.in_place(build.values[source], node) for source in op.inputs]
    if _are_floats(build, node, values):
        return build.emit(ir.Concat, label, values, ir.TensorType(shape))
    target = build.need_target(node)
    values = [
        v if v.grid is target.grid else build.requantize(v, target, f"{label}.{v.name}.requantize") for v in values
    ]
    lows, highs = zip(*(value.type.limits for value in values), strict=True)
    kind = replace(target.type(shape), low=min(lows), high=max(highs))
    return build.emit(ir.Concat, label, values, kind, target.grid)


def function(build: Builder, node: fx.Node, op: Op) -> Value:
    """A pointwise function of one tensor: a table of all its inputs."""
    label, value, found = build.label(node), build.source(op), op.options["pointwise"]
    assert isinstance(found, Pointwise)
    if not value.type.is_integer:
        return _float_function(build, node, value, found)
    functions = (*value.pending, found)
    if build.reader.is_composed(node):
        return replace(value, pending=functions)
    target = build.need_target(node)
    kind, (low, high) = target.type(value.type.shape), value.type.limits
    integers = torch.arange(low, high + 1) - value.type.zero_point
    # As the fake-quantized network computes it, in float32, operation by operation.
    out = integers.to(torch.float32) * value.type.scale
    for one in functions:
        out = one(out)
    if not bool(torch.isfinite(out).all()):
        raise build.refuse(node, f"{found.name} is not finite on values {low}..{high} of scale {value.type.scale:.3g}")
    rounding = ir.Quantize(name=label, inputs=(), type=kind, inverse_scale=target.inverse_scale)
    table, names = rounding.run(out), tuple((one.name, *one.parameters) for one in functions)
    return build.emit(
        ir.Table, label, [value], kind, target.grid, value.index, table=table, input_low=low, functions=names
    )


def _float_function(build: Builder, node: fx.Node, value: Value, found: Pointwise) -> Value:
    return build.emit(
        ir.FloatFunction,
        build.label(node),
        [value],
        value.type,
        None,
        value.index,
        function=found.name,
        parameters=found.parameters,
    )


def batch_norm(build: Builder, node: fx.Node, op: Op) -> Value:
    """A batch norm that no layer takes in: a gain and a shift by channel."""
    if build.reader.is_attached(node):  # the layer has it
        return build.source(op)
    assert isinstance(op.module, nn.BatchNorm1d | nn.BatchNorm2d)
    return _affine(build, node, build.source(op), *gain_and_shift(op.module, build.label(node)))


def constant_affine(build: Builder, node: fx.Node, op: Op) -> Value:
    """A sum or product with a constant of the network, one number or one by channel."""
    value = build.source(op)
    channels, rank = value.shape[0], len(value.shape)
    constant = build.python.values[op.options["constant"]].detach().double()
    by_channel = constant.numel() == 1 or (
        constant.numel() == channels and constant.ndim >= rank and constant.shape[constant.ndim - rank] == channels
    )
    if not by_channel:
        raise build.refuse(
            node, f"a constant of shape {tuple(constant.shape)} for values of shape {value.shape}: only one "
            "number, or one by channel, lowers"
        )  # fmt: skip
    number = constant.flatten().expand(channels)
    ones, zeros = torch.ones_like(number), torch.zeros_like(number)
    gain, shift = {
        "add": (ones, number),
        "sub": (-ones, number) if op.options["reversed"] else (ones, -number),
        "mul": (number, zeros),
        "div": (1.0 / number, zeros),
    }[op.options["operation"]]
    return _affine(build, node, value, gain, shift)


def _affine(build: Builder, node: fx.Node, value: Value, gain: torch.Tensor, shift: torch.Tensor) -> Value:
    value, label = build.in_place(value, node), build.label(node)
    if not value.type.is_integer:
        return build.emit(ir.FloatAffine, label, [value], value.type, gain=gain.float(), shift=shift.float())
    target = build.need_target(node)
    factors, offset = affine_factors(gain * value.type.scale / target.scale, shift / target.scale, label)
    kind, zero_point = target.type(value.shape), value.type.zero_point
    return build.emit(
        ir.Affine, label, [value], kind, target.grid, requant=factors, offset=offset, input_zero_point=zero_point
    )


def relu(build: Builder, node: fx.Node, op: Op) -> Value:
    """A ReLU or ReLU6: the ends of a range."""
    value = build.source(op)
    if node in build.done:
        return value
    if not value.type.is_integer:
        return _float_function(build, node, value, Pointwise(op.kind))
    assert value.grid is not None
    (low, high), (lowest, highest) = value.type.limits, Target(value.grid, (op.kind,)).type(()).limits
    kind = replace(value.type, low=max(low, lowest), high=min(high, highest))
    if kind == value.type:
        return value
    return build.emit(ir.Clip, build.label(node), [value], kind, value.grid, value.index)


def max_pool(build: Builder, node: fx.Node, op: Op) -> Value:
    """The largest value of each window."""
    value = build.in_place(build.source(op), node)
    options = build.python.resolve(op.options)
    if op.kind == "adaptive_max_pool":
        full, wanted = value.type.shape[1:], adaptive_sizes(options, value.type.shape)
        if any(size % out for size, out in zip(full, wanted, strict=True)):
            raise build.refuse(node, f"adaptive max pooling of {full} to {wanted} has windows of different sizes")
        options = {"kernel_size": (full[0] // wanted[0], full[1] // wanted[1])}
    kernel = pair(options["kernel_size"])
    return build.emit(
        ir.MaxPool,
        build.label(node),
        [value],
        replace(value.type, shape=build.shape_of(node)),
        value.grid,
        kernel=kernel,
        stride=stride_of(options, kernel),
        padding=pair(options.get("padding", 0)),
        dilation=pair(options.get("dilation", 1)),
        ceil_mode=bool(options.get("ceil_mode", False)),
    )


def avg_pool(build: Builder, node: fx.Node, op: Op) -> Value:
    """The mean of each window: a sum, divided dyadically."""
    value, label = build.in_place(build.source(op), node), build.label(node)
    rows, columns, divisors = pool_windows(op.kind, build.python.resolve(op.options), value.type.shape, label)
    shape = (value.type.shape[0], len(rows), len(columns))
    if not value.type.is_integer:
        factors, kind = (1.0 / divisors).float(), ir.TensorType(shape)
        pooled = build.emit(ir.FloatAvgPool, label, [value], kind, rows=rows, columns=columns, factors=factors)
    else:
        largest = math.prod(int((ends[:, 1] - ends[:, 0]).max()) for ends in (rows, columns))
        if largest > MAX_WINDOW:
            raise UnsupportedModelError(
                f"{label!r}: the sum over a window of {largest} values can leave 32 bits; pool in two steps"
            )
        target = build.need_target(node)
        pooled = build.emit(
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
    if build.shape_of(node) == shape:
        return pooled
    return replace(pooled, index=movement.start(shape).reshape(2, *build.shape_of(node)))  # a mean without keepdim


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
