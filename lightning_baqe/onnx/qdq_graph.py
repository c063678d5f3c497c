"""The translation of an integer graph's operators; see :mod:`lightning_baqe.onnx.export`.

All scales of the model follow from the integer constants of the graph: a layer's weight scales from its requantization
factors, what an addition multiplies its operands with from its multipliers. Where those agree with the scales of the
tensors' types, as they do in every lowered graph, operators need no factors of their own.

| symbol | meaning |
| --- | --- |
| step | distance of neighbouring integers of a tensor, in real values: the scale of its type |
| reach | range of the real values that an operator can return |
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import helper

import lightning_baqe
from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.float_operators import FloatOperator
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.onnx.pointwise_functions import KNOWN, apply_steps, clip
from lightning_baqe.onnx.ranges import Reach, bounds_of, needs_clip, outer_bounds, span, step, storage_of
from lightning_baqe.onnx.weighted_layers import write_weights
from lightning_baqe.onnx.windows import average_pool, max_pool, max_windows, rearrange, select
from lightning_baqe.onnx.writer import Grid, Writer
from lightning_baqe.quantization.pointwise import Expression, clip_of

INPUT, OUTPUT = "input", "logits"
SAME = 2.0**-6  # steps of the output that a factor or a term may be worth and still be left out


def newest_opset() -> int:
    """The newest opset that the installed onnx knows."""
    return int(onnx.defs.onnx_opset_version())


def make_model(graph: IntegerGraph, opset: int, pack_int4: bool, signed_weights: bool) -> onnx.ModelProto:
    """The graph as a checked model; arguments and errors as for :func:`~lightning_baqe.onnx.export.export_onnx`."""
    exporter = Exporter(graph, pack_int4, signed_weights)
    exporter.export()
    shapes = {**exporter.inputs, OUTPUT: graph.output_shape}
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", *s]) for name, s in shapes.items()]
    writer = exporter.writer
    body = helper.make_graph(writer.nodes, "lightning_baqe", ends[:-1], ends[-1:], writer.initializers)
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        body,
        opset_imports=imports,
        producer_name="lightning-baqe",
        producer_version=lightning_baqe.__version__,
        ir_version=helper.find_min_ir_version_for(imports),
    )
    bits = {layer: list(pair) for layer, pair in graph.bits.items()}
    helper.set_model_props(
        model, {"lightning_baqe.bits": json.dumps(bits), "lightning_baqe.int4": json.dumps(exporter.int4)}
    )
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    onnx.checker.check_model(model, full_check=True)
    return model


class Exporter:
    """Adds a graph's operators to a writer; options as for :func:`~lightning_baqe.onnx.export.export_onnx`."""

    def __init__(self, graph: IntegerGraph, pack_int4: bool, signed_weights: bool) -> None:
        self.graph, self.pack_int4, self.signed_weights = graph, pack_int4, signed_weights
        first = graph.nodes[0]
        assert isinstance(first, ir.Input)
        names = [f"{INPUT}_{number}" if number else INPUT for number in range(max(1, len(first.parts)))]
        self.inputs = dict(zip(names, first.parts or (graph.input_shape,), strict=True))
        self.writer = Writer((*names, OUTPUT))
        self.reals: dict[str, str] = {}  # names of nodes' real values
        self.integers: dict[str, str] = {}  # names of the 8-bit integers that real values come from, by these
        self.scaled: set[str] = set()  # accumulators that already carry the scale of the Dequantize that reads them
        self.int4: list[str] = []
        self.literals: set[str] = set()  # nodes of no batch: what depends on literals alone
        self.nodes = {node.name: node for node in graph}
        self.readers = {name: [reader for reader in graph if name in reader.inputs] for name in self.nodes}

    def export(self) -> None:
        """Add all operators."""
        for node in self.graph:
            if node.inputs and self.literals.issuperset(node.inputs):
                self.literals.add(node.name)
            self._export(node)
        output = self.graph.output
        if output.type.is_integer:
            raise UnsupportedModelError(f"the graph ends in the integers of {output.name!r}; end it with a Dequantize")
        real = self._batched(output)
        if self.graph.output_shape != output.type.shape:
            real = self._reshaped(real, output.name, self.graph.output_shape)
        if real in self.inputs:
            real = self.writer.node("Identity", [real], output.name)
        self.writer.rename(real, OUTPUT)

    def _input(self, node: ir.Input) -> str:
        """All inputs in the shape that the graph has them in."""
        if not node.parts:
            return INPUT if node.given is None else self._reshaped(INPUT, node.name, node.type.shape)
        flat = [self.writer.node("Flatten", [name], f"{name}.flat", axis=1) for name in self.inputs]
        return self.writer.node("Concat", flat, f"{node.name}.all", axis=1)

    def _reshaped(self, real: str, wish: str, shape: tuple[int, ...]) -> str:
        sizes = self.writer.shape(f"{wish}.sizes", [0, *shape])  # 0: as many images as there are
        return self.writer.node("Reshape", [real, sizes], f"{wish}.reshaped")

    # -- tensors ------------------------------------------------------------------------------------------------------

    def _real(self, node: ir.Node, index: int = 0) -> str:
        return self.reals[node.inputs[index]]

    def _type(self, node: ir.Node, index: int = 0) -> ir.TensorType:
        return self.nodes[node.inputs[index]].type

    def _batched(self, node: ir.Node) -> str:
        """A node's real values for the whole batch."""
        if node.name not in self.literals:
            return self.reals[node.name]
        count = self.writer.node("Shape", [INPUT], f"{node.name}.count", start=0, end=1)
        ones = self.writer.shape(f"{node.name}.ones", [1] * len(node.type.shape))
        shape = self.writer.node("Concat", [count, ones], f"{node.name}.batch", axis=0)
        return self.writer.node("Expand", [self.reals[node.name], shape], f"{node.name}.batched")

    def _around(self, node: ir.Node, zero_point: int, index: int = 0) -> str:
        """An input's real values where ``zero_point`` stands for 0; it does so in its type, too, but in odd graphs."""
        kind = self._type(node, index)
        return self._plus(self._real(node, index), (kind.zero_point - zero_point) * step(kind), step(kind), node.name)

    def _times(self, real: str, factor: float, steps: float, wish: str) -> str:
        """A product with a factor, left out where it makes no difference on ``steps`` steps of the output."""
        if abs(factor - 1) * steps < SAME or abs(factor - 1) < 2.0**-24:
            return real
        return self.writer.node("Mul", [real, self.writer.scalar(f"{wish}.factor", factor)], f"{wish}.scaled")

    def _plus(self, real: str, term: float, output_step: float, wish: str) -> str:
        """A sum with a number, left out where it is no part of a step of the output."""
        if abs(term) < SAME * output_step:
            return real
        return self.writer.node("Add", [real, self.writer.scalar(f"{wish}.term", term)], f"{wish}.moved")

    def _store(self, node: ir.Node, real: str, reach: Reach | None = None, fused: bool = False) -> None:
        """Quantize an operator's result onto the grid of its type and dequantize it.

        Args:
            real: the result's name.
            reach: of the result; None: unknown.
            fused: engines fuse the operator with QuantizeLinear if nothing is in between.
        """
        kind, writer, wish = node.type, self.writer, node.name
        storage = storage_of(kind) if kind.is_integer else None
        if storage is None:
            bounds = outer_bounds(kind, reach) if kind.is_integer else (-math.inf, math.inf)
            clipped = real if bounds == (-math.inf, math.inf) else clip(writer, real, f"{wish}.clip", *bounds)
            self.reals[node.name] = clipped
            return
        grid = writer.grid(wish, kind.scale, kind.zero_point, storage)
        clips = needs_clip(kind, storage, reach)
        if clips and fused:
            real = writer.dequantize(writer.quantize(real, grid, f"{wish}.full"), grid, f"{wish}.full")
        if clips:
            real = clip(writer, real, f"{wish}.clip", *bounds_of(kind))
        self._dequantized(node, writer.quantize(real, grid, wish), grid)

    def _dequantized(self, node: ir.Node, integers: str, grid: Grid) -> None:
        self.reals[node.name] = real = self.writer.dequantize(integers, grid, node.name)
        self.integers[real] = integers

    def _moved(self, node: ir.Node, real: str) -> None:
        """What only moves, selects or joins elements of its inputs cannot leave their range."""
        if not self.scaled.isdisjoint(node.inputs):
            self.scaled.add(node.name)
        self._store(node, real, bounds_of(node.type) if node.type.is_integer else None)

    # -- operators ----------------------------------------------------------------------------------------------------

    def _export(self, node: ir.Node) -> None:
        writer, wish = self.writer, node.name
        reals = [self.reals[name] for name in node.inputs]
        relu = getattr(node, "relu", False)  # of float operators
        result = f"{wish}.out" if relu else wish
        match node:
            case ir.Input():
                self.reals[wish] = self._input(node)
            case ir.Literal():
                self._literal(node)
            case ir.Quantize():
                self._quantize(node)
            case ir.Dequantize():
                self._dequantize(node)
            case ir.Layer():
                self._layer(node)
            case ir.Add():
                self._add(node)
            case ir.Mul():
                self._mul(node)
            case ir.Affine():
                self._affine(node)
            case ir.PRelu():
                self._prelu(node)
            case ir.Table():
                self._table(node)
            case ir.Requantize():
                self._requantize(node)
            case ir.AvgPool():
                self._avg_pool(node)
            case ir.Clip():
                self._store(node, reals[0])
            case ir.MaxPool():
                self._moved(node, max_pool(writer, reals[0], wish, node, self._type(node).shape))
            case ir.MaxWindows():
                self._moved(node, max_windows(writer, reals[0], wish, self._type(node).shape, node.rows, node.columns))
            case ir.Concat():
                if node.name not in self.literals:
                    reals = [self._batched(self.nodes[name]) for name in node.inputs]
                self._moved(node, writer.node("Concat", reals, f"{wish}.joined", axis=1))
            case ir.Gather():
                indices = (node.channels, node.rows, node.columns)
                self._moved(node, select(writer, reals[0], wish, indices, self._type(node).shape))
            case ir.Move():
                self._moved(node, rearrange(writer, reals[0], wish, node.index, self._type(node).shape))
            case ir.Flatten() if len(node.type.shape) == 1:
                self._moved(node, writer.node("Flatten", reals, f"{wish}.flat", axis=1))
            case ir.Flatten():
                shape = writer.shape(f"{wish}.shape", [0, *node.type.shape])
                self._moved(node, writer.node("Reshape", [*reals, shape], f"{wish}.shaped"))
            case ir.FloatLayer():
                self.reals[wish] = self._float_layer(node, result)
            case ir.FloatAdd():
                self.reals[wish] = writer.node("Add", reals, result)
            case ir.FloatMul():
                self.reals[wish] = writer.node("Mul", reals, wish)
            case ir.FloatAffine():
                self.reals[wish] = self._gain_and_shift(node, node.gain, node.shift)
            case ir.FloatPRelu():
                slope = writer.constant(f"{wish}.slope", channels(node.slope, node.type.shape))
                self.reals[wish] = writer.node("PRelu", [reals[0], slope], wish)
            case ir.FloatFunction():
                self.reals[wish] = apply_steps(writer, reals[0], wish, node.steps)
            case ir.FloatAvgPool():
                image, factors = self._type(node).shape, node.factors.double().numpy()
                self.reals[wish] = average_pool(writer, reals[0], wish, image, node.rows, node.columns, factors)
            case FloatOperator():
                raise UnsupportedModelError(
                    f"{wish!r}: the float operator aten::{node.operator} is not exported to ONNX; build this graph "
                    "with TVM, or quantize the network without float operators (fallback='refuse')"
                )
            case _:
                raise UnsupportedModelError(f"{wish!r}: operators of kind {node.kind!r} have no ONNX form here")
        if relu:
            self.reals[wish] = writer.node("Relu", [self.reals[wish]], wish)

    def _literal(self, node: ir.Literal) -> None:
        kind, writer, values = node.type, self.writer, node.value[None]
        self.literals.add(node.name)
        storage = storage_of(kind) if kind.is_integer else None
        if storage is None:
            steps = (values - kind.zero_point).double() * step(kind) if kind.is_integer else values
            self.reals[node.name] = writer.constant(node.name, steps.to(torch.float32).numpy())
            return
        integers = writer.constant(f"{node.name}.quantized", values.numpy().astype(storage))
        self._dequantized(node, integers, writer.grid(node.name, kind.scale, kind.zero_point, storage))

    def _quantize(self, node: ir.Quantize) -> None:
        """Quantize; the network's input with the product that the integer graph has, not with a division.

        Normalised images hold 256 values a channel. Where they lie between two steps, the last bit of the scaled value
        decides for all of them. Round keeps OpenVINO from joining product and quantization.
        """
        kind, writer, wish = node.type, self.writer, node.name
        storage, is_image = storage_of(kind), isinstance(self.nodes[node.inputs[0]], ir.Input)
        if storage is None or not is_image:
            factor = 1.0 if is_image else node.inverse_scale * step(kind)
            self._store(node, self._times(self._real(node), factor, span(kind), wish))
            return
        inverse = writer.scalar(f"{wish}.inverse_scale", node.inverse_scale)
        product = writer.node("Mul", [self._real(node), inverse], f"{wish}.product")
        steps = writer.node("Round", [product], f"{wish}.steps")
        whole = replace(kind, scale=1.0)
        if needs_clip(whole, storage, None):
            steps = clip(writer, steps, f"{wish}.clip", *bounds_of(whole))
        integers = writer.quantize(steps, writer.grid(f"{wish}.whole", 1.0, kind.zero_point, storage), wish)
        self._dequantized(node, integers, writer.grid(wish, step(kind), kind.zero_point, storage))

    def _dequantize(self, node: ir.Dequantize) -> None:
        kind, real = self._type(node), self._real(node)
        if node.inputs[0] not in self.scaled:
            real = self._around(node, node.zero_point)
            factors = node.scale.double() / step(kind)
            if bool(((factors - 1).abs() > 2.0**-24).any()):
                numbers = channels(factors, node.type.shape)
                real = self.writer.node("Mul", [real, self.writer.constant(f"{node.name}.scale", numbers)], node.name)
        self.reals[node.name] = real

    def _scale_of_reader(self, node: ir.Layer) -> torch.Tensor | None:
        """The scales by channel of the one Dequantize that reads accumulators, perhaps flattened; else None."""
        readers = self.readers[node.name]
        while len(readers) == 1 and isinstance(readers[0], ir.Flatten):
            readers = self.readers[readers[0].name]
        if len(readers) != 1 or not isinstance(readers[0], ir.Dequantize) or readers[0].zero_point != 0:
            return None
        count = node.type.shape[0]
        scale = readers[0].scale.double()
        by_channel = (scale.expand(count) if scale.ndim == 0 else scale).reshape(count, -1)
        return by_channel[:, 0] if bool((by_channel == by_channel[:, :1]).all()) else None

    def _layer(self, node: ir.Layer) -> None:
        source = self._type(node)
        if isinstance(node, ir.Conv) and any(node.padding) and node.pad_value != source.zero_point:
            raise UnsupportedModelError(
                f"layer {node.layer!r} pads with {node.pad_value}, ONNX pads with what stands for 0, "
                f"{source.zero_point}; pad with that"
            )
        if node.requant is not None:
            scale = node.requant.real() * node.type.scale
        else:
            found = self._scale_of_reader(node)
            scale = torch.tensor(step(node.type), dtype=torch.float64) if found is None else found
            if found is not None:
                self.scaled.add(node.name)
        options = source, self.pack_int4, self.signed_weights
        constants, packed = write_weights(self.writer, node, scale.expand(node.type.shape[0]), *options)
        if packed:
            self.int4.append(node.layer)
        out = self._product(node, [self._real(node), *constants], f"{node.name}.out")
        if node.requant is None:
            self.reals[node.name] = out
        else:
            self._store(node, out, fused=True)

    def _add(self, node: ir.Add) -> None:
        parts, term = [], node.offset / 2.0**node.shift
        for index, multiplier in enumerate(node.multipliers):
            kind, factor = self._type(node, index), multiplier / 2.0**node.shift
            relative = factor * step(node.type) / step(kind)
            parts.append(self._times(self._real(node, index), relative, factor * span(kind), node.name))
            term += factor * kind.zero_point
        total = self.writer.node("Add", parts, f"{node.name}.sum")
        self._store(node, self._plus(total, term * step(node.type), step(node.type), node.name), fused=True)

    def _mul(self, node: ir.Mul) -> None:
        reals = [self._around(node, zero_point, i) for i, zero_point in enumerate(node.input_zero_points)]
        factor = float(node.requant.real())
        relative = factor * step(node.type) / (step(self._type(node, 0)) * step(self._type(node, 1)))
        product = self.writer.node("Mul", reals, f"{node.name}.product")
        steps = factor * span(self._type(node, 0)) * span(self._type(node, 1))
        self._store(node, self._times(product, relative, steps, node.name), fused=True)

    def _affine(self, node: ir.Affine) -> None:
        kind = self._type(node)
        gain = node.requant.real() * step(node.type) / step(kind)
        shift = node.offset.double() / 2.0**node.requant.shift * step(node.type)
        shift = shift + gain * step(kind) * (kind.zero_point - node.input_zero_point)
        self._store(node, self._gain_and_shift(node, gain, shift))

    def _prelu(self, node: ir.PRelu) -> None:
        """A PRelu of what the positive factors scale; where these are not positive, a choice between two products."""
        kind, writer, wish = self._type(node), self.writer, node.name
        real = self._around(node, node.input_zero_point)
        above, below = (part.real() * step(node.type) / step(kind) for part in (node.positive, node.negative))
        if bool((above > 0).all()):
            if bool(((above - 1).abs() * span(kind) * float(node.positive.real().max()) >= SAME).any()):
                factors = writer.constant(f"{wish}.factors", channels(above, node.type.shape))
                real = writer.node("Mul", [real, factors], f"{wish}.scaled")
            slope = writer.constant(f"{wish}.slope", channels(below / above, node.type.shape))
            self._store(node, writer.node("PRelu", [real, slope], f"{wish}.out"))
            return
        parts = []
        for name, part in (("below", below), ("above", above)):
            factors = writer.constant(f"{wish}.{name}.factors", channels(part, node.type.shape))
            parts.append(writer.node("Mul", [real, factors], f"{wish}.{name}"))
        is_below = writer.node("Less", [real, writer.scalar(f"{wish}.zero", 0.0)], f"{wish}.is_below")
        self._store(node, writer.node("Where", [is_below, *parts], f"{wish}.out"))

    def _gain_and_shift(self, node: ir.Node, gain: torch.Tensor, shift: torch.Tensor) -> str:
        wish, shape = node.name, node.type.shape
        factors = self.writer.constant(f"{wish}.gain", channels(gain, shape))
        scaled = self.writer.node("Mul", [self._real(node), factors], f"{wish}.scaled")
        terms = self.writer.constant(f"{wish}.shift", channels(shift, shape))
        return self.writer.node("Add", [scaled, terms], f"{wish}.moved")

    def _requantize(self, node: ir.Requantize) -> None:
        kind, factor = self._type(node), float(node.requant.real())
        relative = factor * step(node.type) / step(kind)
        real = self._times(self._around(node, node.input_zero_point), relative, factor * span(kind), node.name)
        self._store(node, real)  # the clip keeps ONNX Runtime from joining this rounding with the one before it

    def _avg_pool(self, node: ir.AvgPool) -> None:
        kind = self._type(node)
        factors = (node.requant.real() * step(node.type) / step(kind)).numpy()
        real = self._around(node, node.input_zero_point)
        low, high = bounds_of(kind)
        moved = (kind.zero_point - node.input_zero_point) * step(kind)
        low, high = min(low + moved, 0.0), max(high + moved, 0.0)
        count = int((node.rows[:, 1] - node.rows[:, 0]).max() * (node.columns[:, 1] - node.columns[:, 0]).max())
        most = float(factors.max()) * count
        pads = kind.zero_point == 0  # OpenVINO 2026.4 counts padding as the integer 0, whatever stands for 0
        pooled = average_pool(self.writer, real, node.name, kind.shape, node.rows, node.columns, factors, pads)
        self._store(node, pooled, (low * most, high * most), fused=True)

    def _table(self, node: ir.Table) -> None:
        kind, writer = self._type(node), self.writer
        integers = torch.arange(node.input_low, node.input_low + len(node.table))
        values = (integers - kind.zero_point).double() * step(kind)
        if node.steps:
            values = Expression(node.steps)(values)
        steps = values / step(node.type) + node.type.zero_point
        wanted = steps.clamp(node.type.low, node.type.high)
        known = all(str(name).split(".")[0] in KNOWN or clip_of((name, *rest)) for name, *rest in node.steps)
        if known and bool(values.isfinite().all()) and bool(((wanted - node.table).abs() < 0.501).all()):
            real = apply_steps(writer, self._real(node), f"{node.name}.function", node.steps)
            self._store(node, real, (float(values.min()), float(values.max())) if node.steps else None)
            return
        source, storage = self.integers.get(self._real(node)), storage_of(node.type)
        if source is None or storage is None:
            raise UnsupportedModelError(
                f"{node.name!r}: its table is not what {node.steps} gives, and ONNX looks up 8-bit integers only; "
                "lower it again with 8 bits or fewer"
            )
        index = writer.node("Cast", [source], f"{node.name}.index", to=onnx.TensorProto.INT32)
        if node.input_low:
            low = writer.constant(f"{node.name}.low", np.array(node.input_low, np.int32))
            index = writer.node("Sub", [index, low], f"{node.name}.place")
        table = writer.constant(f"{node.name}.table", node.table.numpy().astype(storage))
        found = writer.node("Gather", [table, index], f"{node.name}.quantized", axis=0)
        self._dequantized(node, found, writer.grid(node.name, node.type.scale, node.type.zero_point, storage))

    def _product(self, node: ir.Layer | ir.FloatLayer, inputs: list[str], wish: str) -> str:
        """A layer's operator, on real values."""
        if not isinstance(node, ir.Conv | ir.FloatConv):
            return self.writer.node("Gemm", inputs, wish, transB=1)
        top, bottom, left, right = node.padding
        return self.writer.node(
            "Conv",
            inputs,
            wish,
            kernel_shape=list(node.weight.shape[2:]),
            strides=node.stride,
            pads=[top, left, bottom, right],
            dilations=node.dilation,
            group=node.groups,
        )

    def _float_layer(self, node: ir.FloatLayer, wish: str) -> str:
        """A layer that is to stay float.

        Between integers its bias is a subtraction of its own: ONNX Runtime quantizes the weights of a float layer to
        int8 by itself, with one scale for all, where it finds it between a DequantizeLinear and a QuantizeLinear.
        """
        real, weight = self._real(node), self.writer.own_constant(f"{node.name}.weight", node.weight.numpy())
        if real not in self.integers:
            bias = self.writer.own_constant(f"{node.name}.bias", node.bias.numpy())
            return self._product(node, [real, weight, bias], wish)
        out = self._product(node, [real, weight], f"{node.name}.product")
        negative = self.writer.constant(f"{node.name}.negative_bias", channels(-node.bias, node.type.shape))
        return self.writer.node("Sub", [out, negative], wish)


def channels(values: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers by channel (or one for all) as float32 that broadcasts over ``(n, *shape)``."""
    numbers = values.to(torch.float32).numpy()
    return numbers if numbers.ndim == 0 else numbers.reshape(-1, *[1] * (len(shape) - 1))
