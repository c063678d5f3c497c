"""Lowering of operators without weights: sums, products, concatenation, functions, batch norms alone, pooling."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer import movement
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.dyadic import MAX_SHIFT, MULTIPLIER_BITS, Dyadic
from lightning_baqe.integer.folding import add_factors, batch_norm_affine, requant
from lightning_baqe.integer.shapes import Windows, pair, pool_windows
from lightning_baqe.integer.values import Builder, Target, Value, clip_target
from lightning_baqe.quantization.ops import Op
from lightning_baqe.quantization.pointwise import Pointwise

MAX_OFFSET_BITS = 60
MAX_WINDOW = 2**31 // 255


class Operators(Builder):
    """Lowers one operator at a time; each method returns the value that the operator makes."""

    def operands(self, node: fx.Node, op: Op) -> list[Value]:
        """Both operands of a sum or product at the output's shape, but for ``(channels, 1, 1)`` ones."""
        shape = self.shape_of(node)
        found = []
        for source in op.inputs:
            value = self.in_place(self.values[source], node)
            if value.shape not in (shape, (shape[0], *[1] * (len(shape) - 1))):
                ones = value.shape if len(value.shape) == len(shape) else ()
                if any(size not in (1, full) for size, full in zip(ones, shape, strict=False)) or not ones:
                    raise self.refuse(node, f"an operand of shape {value.shape} for an output of shape {shape}")
                value = self.spread(value, shape, node)
            found.append(value)
        return found

    def spread(self, value: Value, shape: tuple[int, ...], node: fx.Node) -> Value:
        """Repeat a value along the dimensions where it has one element."""
        index = movement.start(value.shape).expand(2, *shape)
        return self.in_place(replace(value, index=index.contiguous()), node)

    def are_floats(self, node: fx.Node, values: list[Value]) -> bool:
        """Whether all values are floats; a mix is refused."""
        kinds = {value.type.is_integer for value in values}
        if len(kinds) > 1:
            raise self.refuse(node, "one operand is an integer tensor, the other is not")
        return kinds == {False}

    def fused_relu(self, node: fx.Node) -> bool:
        """Whether the only consumer is a ReLU; it is then taken to be fused."""
        consumers = self.reader.consumers[node]
        while len(consumers) == 1 and self.reader[consumers[0]].kind in ("identity", "dropout"):
            consumers = self.reader.consumers[consumers[0]]
        fused = len(consumers) == 1 and self.reader[consumers[0]].kind == "relu"
        if fused:
            self.done.add(consumers[0])
        return fused

    def add(self, node: fx.Node, op: Op) -> Value:
        label, sign, shape = self.label(node), op.options["sign"], self.shape_of(node)
        a, b = (v if v.shape == shape else self.spread(v, shape, node) for v in self.operands(node, op))
        name = self.name(label)
        if self.are_floats(node, [a, b]):
            if sign < 0:
                negated = ir.FloatFunction(
                    name=self.name(f"{label}.neg"), inputs=(b.name,), type=b.type, function="neg", parameters=()
                )
                b = self.emit(negated)
            relu = self.fused_relu(node)
            return self.emit(ir.FloatAdd(name=name, inputs=(a.name, b.name), type=ir.TensorType(shape), relu=relu))
        target = self.need_target(node)
        factors = add_factors(
            (a.type.scale / target.scale, sign * b.type.scale / target.scale),
            (a.limits, b.limits),
            (a.type.zero_point, b.type.zero_point),
            label,
        )
        return self.emit(
            ir.Add(
                name=name,
                inputs=(a.name, b.name),
                type=target.type(shape),
                multipliers=factors.multipliers,
                shift=factors.shift,
                offset=factors.offset,
            ),
            target.grid,
        )

    def mul(self, node: fx.Node, op: Op) -> Value:
        label, shape = self.label(node), self.shape_of(node)
        a, b = self.operands(node, op)
        if a.shape != shape:
            a, b = b, a
        if a.shape != shape:
            a = self.spread(a, shape, node)
        name = self.name(label)
        if self.are_floats(node, [a, b]):
            return self.emit(ir.FloatMul(name=name, inputs=(a.name, b.name), type=ir.TensorType(shape)))
        target = self.need_target(node)
        return self.emit(
            ir.Mul(
                name=name,
                inputs=(a.name, b.name),
                type=target.type(shape),
                requant=requant(a.type.scale * b.type.scale / target.scale, label),
                input_zero_points=(a.type.zero_point, b.type.zero_point),
            ),
            target.grid,
        )

    def concat(self, node: fx.Node, op: Op) -> Value:
        label, shape = self.label(node), self.shape_of(node)
        values = [self.in_place(self.values[source], node) for source in op.inputs]
        if self.are_floats(node, values):
            names = tuple(value.name for value in values)
            return self.emit(ir.Concat(name=self.name(label), inputs=names, type=ir.TensorType(shape)))
        target = self.need_target(node)
        on_grid = [
            v if v.grid is target.grid else self.requantize(v, target, f"{label}.{v.name}.requantize") for v in values
        ]
        kind = replace(
            target.type(shape), low=min(v.limits[0] for v in on_grid), high=max(v.limits[1] for v in on_grid)
        )
        names = tuple(value.name for value in on_grid)
        return self.emit(ir.Concat(name=self.name(label), inputs=names, type=kind), target.grid)

    def function(self, node: fx.Node, op: Op, value: Value) -> Value:
        label, found = self.label(node), op.options["pointwise"]
        assert isinstance(found, Pointwise)
        if not value.type.is_integer:
            node_ = ir.FloatFunction(
                name=self.name(label),
                inputs=(value.name,),
                type=value.type,
                function=found.name,
                parameters=found.parameters,
            )
            return replace(self.emit(node_), index=value.index)
        functions = (*value.pending, found)
        if self.reader.is_composed(node):
            return replace(value, pending=functions)
        target = self.need_target(node)
        low, high = value.limits
        integers = torch.arange(low, high + 1) - value.type.zero_point
        # As the fake-quantized network computes it, in float32, operation by operation.
        out = integers.to(torch.float32) * value.type.scale
        for function in functions:
            out = function(out)
        if not bool(torch.isfinite(out).all()):
            raise self.refuse(
                node, f"{found.name} is not finite on values {low}..{high} of scale {value.type.scale:.3g}"
            )
        table = quantize_floats(out, target)
        made = ir.Table(
            name=self.name(label),
            inputs=(value.name,),
            type=target.type(value.type.shape),
            table=table,
            input_low=low,
            functions=tuple((f.name, *f.parameters) for f in functions),
        )
        return replace(self.emit(made, target.grid), index=value.index)

    def batch_norm(self, node: fx.Node, op: Op, value: Value) -> Value:
        """A batch norm that belongs to no layer."""
        assert isinstance(op.module, nn.BatchNorm1d | nn.BatchNorm2d)
        affine = batch_norm_affine(op.module, self.label(node))
        return self._affine(node, value, affine.gain, affine.shift)

    def constant_affine(self, node: fx.Node, op: Op, value: Value) -> Value:
        """A sum or product with a constant of the network, one number or one by channel."""
        channels = value.shape[0]
        constant = self.python.value(op.options["constant"]).detach().double()
        rank = len(value.shape)
        by_channel = constant.numel() == 1 or (
            constant.numel() == channels and constant.ndim >= rank and constant.shape[constant.ndim - rank] == channels
        )
        if not by_channel:
            raise self.refuse(
                node, f"a constant of shape {tuple(constant.shape)} for values of shape {value.shape}: only one "
                "number, or one by channel, lowers"
            )  # fmt: skip
        number = constant.flatten().expand(channels)
        ones, zeros = torch.ones_like(number), torch.zeros_like(number)
        is_reversed = op.options["reversed"]
        match op.options["operation"]:
            case "add":
                gain, shift = ones, number
            case "sub":
                gain, shift = (-ones, number) if is_reversed else (ones, -number)
            case "mul":
                gain, shift = number, zeros
            case _:
                gain, shift = 1.0 / number, zeros
        return self._affine(node, value, gain, shift)

    def _affine(self, node: fx.Node, value: Value, gain: torch.Tensor, shift: torch.Tensor) -> Value:
        value, label = self.in_place(value, node), self.label(node)
        if not value.type.is_integer:
            return self.emit(
                ir.FloatAffine(
                    name=self.name(label), inputs=(value.name,), type=value.type, gain=gain.float(), shift=shift.float()
                )
            )
        target = self.need_target(node)
        factors, offset = affine_factors(gain * value.type.scale / target.scale, shift / target.scale, label)
        return self.emit(
            ir.Affine(
                name=self.name(label),
                inputs=(value.name,),
                type=target.type(value.shape),
                requant=factors,
                offset=offset,
                input_zero_point=value.type.zero_point,
            ),
            target.grid,
        )

    def relu(self, node: fx.Node, op: Op, value: Value) -> Value:
        kind = value.type
        if not kind.is_integer:
            made = ir.FloatFunction(
                name=self.name(self.label(node)), inputs=(value.name,), type=kind, function=op.kind, parameters=()
            )
            return replace(self.emit(made), index=value.index)
        assert value.grid is not None
        target = clip_target(value.grid, [op.kind])
        low, high = max(value.limits[0], target.low), min(value.limits[1], target.high)
        if (low, high) == value.limits:
            return value
        clip = ir.Clip(name=self.name(self.label(node)), inputs=(value.name,), type=replace(kind, low=low, high=high))
        return replace(self.emit(clip, value.grid), index=value.index)

    def max_pool(self, node: fx.Node, op: Op, value: Value) -> Value:
        value = self.in_place(value, node)
        options = self.python.resolve(op.options)
        if op.kind == "adaptive_max_pool":
            sizes = options["output_size"]
            sizes = sizes if isinstance(sizes, tuple | list) else (sizes, sizes)
            full = value.type.shape[1:]
            wanted = [size if out is None else out for size, out in zip(full, sizes, strict=True)]
            if any(size % out for size, out in zip(full, wanted, strict=True)):
                raise self.refuse(node, f"adaptive max pooling of {full} to {wanted} has windows of different sizes")
            kernel = (full[0] // wanted[0], full[1] // wanted[1])
            options = {"kernel_size": kernel, "stride": kernel}
        kernel = pair(options["kernel_size"])
        stride = options.get("stride")
        return self.emit(
            ir.MaxPool(
                name=self.name(self.label(node)),
                inputs=(value.name,),
                type=replace(value.type, shape=self.shape_of(node)),
                kernel=kernel,
                stride=kernel if stride is None or stride == [] else pair(stride),
                padding=pair(options.get("padding", 0)),
                dilation=pair(options.get("dilation", 1)),
                ceil_mode=bool(options.get("ceil_mode", False)),
            ),
            value.grid,
        )

    def avg_pool(self, node: fx.Node, op: Op, value: Value) -> Value:
        value, label = self.in_place(value, node), self.label(node)
        found = pool_windows(op.kind, self.python.resolve(op.options), value.type.shape, label)
        shape = (value.type.shape[0], len(found.rows), len(found.columns))
        common: dict[str, Any] = {
            "name": self.name(label), "inputs": (value.name,), "rows": found.rows, "columns": found.columns
        }  # fmt: skip
        if value.type.is_integer:
            _check_windows(found, label)
            target = self.need_target(node)
            factors = requant(value.type.scale / (target.scale * found.divisors), label)
            zero_point = value.type.zero_point
            pooled = self.emit(
                ir.AvgPool(**common, type=target.type(shape), requant=factors, input_zero_point=zero_point),
                target.grid,
            )
        else:
            kind = ir.TensorType(shape)
            pooled = self.emit(ir.FloatAvgPool(**common, type=kind, factors=(1.0 / found.divisors).float()))
        if self.shape_of(node) == shape:
            return pooled
        return replace(pooled, index=movement.start(shape).reshape(2, *self.shape_of(node)))  # a mean without keepdim


def quantize_floats(values: torch.Tensor, target: Target) -> torch.Tensor:
    """float32 values as integers of a grid, rounded as the quantizer does: int64, same shape."""
    inverse = float(np.float32(1.0) / np.float32(target.scale))
    zero_point = target.zero_point
    rounded = torch.round(values * inverse).clamp(target.low - zero_point, target.high - zero_point)
    return rounded.to(torch.int64) + zero_point


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
    bits = min(MULTIPLIER_BITS - math.frexp(largest)[1], MAX_OFFSET_BITS - math.frexp(farthest)[1], MAX_SHIFT)
    multiplier = torch.round(gain * 2.0**bits).to(torch.int64)
    if int(multiplier.abs().max()) >= 2**MULTIPLIER_BITS:  # rounded up to the next power of two
        bits -= 1
        multiplier = torch.round(gain * 2.0**bits).to(torch.int64)
    return Dyadic(multiplier, bits), torch.round(shift * 2.0**bits).to(torch.int64)


def _check_windows(found: Windows, label: str) -> None:
    largest = int((found.rows[:, 1] - found.rows[:, 0]).max() * (found.columns[:, 1] - found.columns[:, 0]).max())
    if largest > MAX_WINDOW:
        raise UnsupportedModelError(
            f"{label!r}: the sum over a window of {largest} values can leave 32 bits; pool in two steps"
        )
