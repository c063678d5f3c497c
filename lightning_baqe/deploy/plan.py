"""From an integer graph to kernel calls: storage types, layouts, fusion, the arithmetic and the knobs of every kernel.

A plan is a pure function of (graph, target, schedules, threads): an artifact stores those and makes its plan again when
it is loaded, so that weights are kept once, packed to their bits.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lightning_baqe.deploy.conv_template import (
    ConvSpec,
    check_knobs,
    default_knobs,
    pack_weights,
    weight_quads,
)
from lightning_baqe.deploy.dot import choose_dot
from lightning_baqe.deploy.kernels import Call, Plan, Spec
from lightning_baqe.deploy.layout import VECTOR, Layout, storage_dtype, stored_channels
from lightning_baqe.deploy.pixel_templates import PAD, PIXEL_PARAMS, GroupedSpec, PixelSpec
from lightning_baqe.deploy.target import CpuTarget
from lightning_baqe.errors import BuildError, ConfigError
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.graph import IntegerGraph

INT32_MAX = 2**31 - 1
Schedules = Mapping[str, Mapping[str, Any]]
BestKnobs = Callable[[ConvSpec], Mapping[str, Any] | None]


def make_plan(
    graph: IntegerGraph,
    target: CpuTarget,
    schedules: Schedules | None = None,
    threads: int = 1,
    best: BestKnobs | None = None,
    fuse: bool = True,
) -> Plan:
    """Plan all kernels of a graph.

    Args:
        graph: what is compiled.
        target: for which CPU.
        schedules: ``{layer: {knob: value}}``; what is missing comes from ``best``, then from the template's default.
        threads: of every convolution.
        best: looks up the best known knobs of a kernel.
        fuse: False keeps every node's value (for debugging).

    Raises:
        ConfigError: a schedule names an unknown layer or knob.
        BuildError: an operator that no template covers.
    """
    schedules = schedules or {}
    layers = [node.layer for node in graph if isinstance(node, ir.Conv | ir.Linear | ir.FloatConv | ir.FloatLinear)]
    for name in schedules:
        if name not in layers:
            near = difflib.get_close_matches(name, layers, 3)
            raise ConfigError(
                f"schedules name the layer {name!r}, which the graph does not have; near: {near or layers}"
            )
    return _Planner(graph, target, schedules, threads, best, fuse).plan()


class _Planner:
    def __init__(
        self,
        graph: IntegerGraph,
        target: CpuTarget,
        schedules: Schedules,
        threads: int,
        best: BestKnobs | None,
        fuse: bool,
    ) -> None:
        self.graph, self.target, self.threads = graph, target, threads
        self.schedules, self.best = schedules, best
        self.alias: dict[str, str] = {}
        self.readers: dict[str, list[ir.Node]] = {node.name: [] for node in graph}
        for node in graph:
            if isinstance(node, ir.Flatten):
                self.alias[node.name] = self.root(node.inputs[0])
            for name in node.inputs:
                self.readers[name].append(node)
        self.fused = self._fused_adds() if fuse else {}
        self.layouts: dict[str, Layout] = {}
        self.pads: dict[str, int] = {}
        self.calls: list[Call] = []
        self.resolved: dict[str, dict[str, Any]] = {}

    def root(self, name: str) -> str:
        return self.alias.get(name, name)

    def all_readers(self, name: str) -> list[ir.Node]:
        """Readers of a value, through flattens."""
        found: list[ir.Node] = []
        for node in self.readers[name]:
            found.extend(self.all_readers(node.name) if isinstance(node, ir.Flatten) else [node])
        return found

    def _fused_adds(self) -> dict[str, str]:
        """``{convolution: residual sum that its kernel ends with}``: of two candidates the one computed later."""
        order = {node.name: index for index, node in enumerate(self.graph)}
        fused: dict[str, str] = {}
        for node in self.graph:
            if not isinstance(node, ir.Add):
                continue
            candidates = [
                name
                for name in node.inputs
                if isinstance(conv := self.graph[name], ir.Conv)
                and conv.requant is not None
                and conv.groups == 1
                and len(self.readers[name]) == 1
                and node.inputs[0] != node.inputs[1]
            ]
            if candidates:
                fused[max(candidates, key=order.__getitem__)] = node.name
        return fused

    def plan(self) -> Plan:
        fused_into = {add: conv for conv, add in self.fused.items()}
        for node in self.graph:
            if isinstance(node, ir.Input | ir.Flatten) or node.name in self.fused:
                continue
            if isinstance(node, ir.Dequantize) and node is self.graph.output:
                break
            self._layout(node)
            if isinstance(node, ir.Add) and node.name in fused_into:
                self._conv(self.graph[fused_into[node.name]], node)
            else:
                self._emit(node)
        self._output()
        return Plan(tuple(self.calls), self.layouts, self.resolved, self.target, self.threads)

    # -- layouts ------------------------------------------------------------------------------------------------------

    def _layout(self, node: ir.Node) -> None:
        shape = node.type.shape
        channels, height, width = shape if len(shape) == 3 else (shape[0], 1, 1)
        low, high = node.type.low, node.type.high
        dtype = "float32" if low is None or high is None else storage_dtype(low, high)
        if getattr(node, "requant", 0) is None:
            dtype = "int32"
        halo, pads = 0, set()
        readers = self.all_readers(node.name)
        for reader in readers:
            if isinstance(reader, ir.Conv | ir.FloatConv):
                halo = max(halo, *reader.padding)
                if any(reader.padding):
                    pads.add(reader.pad_value if isinstance(reader, ir.Conv) else 0)
        if len(pads) > 1:
            raise BuildError(f"{node.name!r} is read by convolutions that pad with different values {sorted(pads)}")
        dense = all(isinstance(r, ir.Conv | ir.FloatConv) and r.groups == 1 for r in readers)
        from_input = all(isinstance(self.graph[name], ir.Input) for name in node.inputs)
        stored = channels if dense and from_input and channels < VECTOR else stored_channels(channels)
        self.layouts[node.name] = Layout(channels, height, width, stored, halo, dtype)
        self.pads[node.name] = pads.pop() if pads else 0

    def _packed_input(self, reader: ir.Node) -> str:
        """The network's float input in our layout, for a reader that takes it as it is."""
        name = f"{self.graph.nodes[0].name}.packed"
        if name in self.layouts:
            return name
        shape = self.graph.input_shape
        if len(shape) != 3:
            raise BuildError(f"networks take images (channels, height, width), got an input of shape {shape}")
        readers = [r for r in self.all_readers(self.graph.nodes[0].name) if not isinstance(r, ir.Quantize)]
        halo = max((max(r.padding) for r in readers if isinstance(r, ir.FloatConv)), default=0)
        dense = all(isinstance(r, ir.FloatConv) and r.groups == 1 for r in readers)
        stored = shape[0] if dense and shape[0] < VECTOR else stored_channels(shape[0])
        layout = Layout(shape[0], shape[1], shape[2], stored, halo, "float32")
        self.layouts[name], self.pads[name] = layout, 0
        self._add((name,), None, PixelSpec("pack", layout, layout), {}, (self.graph.nodes[0].name, *_numbers()))
        return name

    def _value(self, name: str, reader: ir.Node) -> str:
        root = self.root(name)
        return self._packed_input(reader) if isinstance(self.graph[root], ir.Input) else root

    # -- kernels ------------------------------------------------------------------------------------------------------

    def _add(
        self, nodes: tuple[str, ...], layer: str | None, spec: Spec, knobs: Mapping[str, Any], arguments: Any
    ) -> None:
        self.calls.append(Call(nodes, layer, spec, knobs, tuple(arguments)))

    def _emit(self, node: ir.Node) -> None:
        params: tuple[Any, ...]
        match node:
            case ir.Conv() | ir.Linear() | ir.FloatConv() | ir.FloatLinear():
                if getattr(node, "groups", 1) > 1:
                    self._grouped(node)
                else:
                    self._conv(node, None)
            case ir.Quantize() if isinstance(self.graph[self.root(node.inputs[0])], ir.Input):
                layout = self.layouts[node.name]
                params = (node.type.zero_point, node.type.low, node.type.high)
                numbers = self._numbers(node, params, node.inverse_scale)
                arguments = (self.graph.nodes[0].name, *numbers)
                self._add((node.name,), None, PixelSpec("pack", layout, layout), {}, arguments)
            case ir.Quantize():
                params = (node.type.zero_point, node.type.low, node.type.high)
                self._pointwise("quantize", node, params, node.inverse_scale)
            case ir.Dequantize():
                if node.scale.ndim:
                    raise BuildError(f"{node.name!r}: only the network's output may have a scale by channel")
                self._pointwise("dequantize", node, (node.zero_point,), float(node.scale))
            case ir.Requantize():
                self._requantize(node)
            case ir.Add():
                kind = node.type
                params = (*node.multipliers, node.offset, node.shift, kind.zero_point, kind.low, kind.high)
                self._pointwise("add", node, params, narrow=_narrow_add(node, self.graph))
            case ir.Clip():
                self._pointwise("clip", node, (node.type.low, node.type.high))
            case ir.FloatAdd():
                self._pointwise("float_add", node, (), relu=node.relu)
            case ir.FloatRelu():
                self._pointwise("float_relu", node, ())
            case ir.MaxPool():
                if node.dilation != (1, 1):
                    raise BuildError(f"{node.name!r}: max pooling with dilation {node.dilation} has no kernel")
                self._pool("max_pool", node, node.kernel, node.stride, node.padding, ())
            case ir.AvgPool():
                m, shift = int(node.requant.multiplier), node.requant.shift
                params = (node.input_zero_point, m, shift, node.type.zero_point, node.type.low, node.type.high)
                self._pool("avg_pool", node, node.kernel, node.stride, (0, 0), params)
            case ir.FloatAvgPool():
                window = 1.0 / (node.kernel[0] * node.kernel[1])
                self._pool("float_avg_pool", node, node.kernel, node.stride, (0, 0), (), window)
            case _:
                raise BuildError(f"no kernel computes {node.name!r} ({node.kind})")

    def _numbers(self, node: ir.Node, params: tuple[Any, ...], factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        return _numbers(params, factor, self.pads[node.name])

    def _pointwise(
        self,
        op: str,
        node: ir.Node,
        params: tuple[Any, ...],
        factor: float = 1.0,
        narrow: bool = True,
        relu: bool = False,
    ) -> None:
        names = [self._value(name, node) for name in node.inputs]
        names = names if len(names) == 2 else names * 2
        layout = self.layouts[node.name]
        source, other = (self.layouts[name] for name in names)
        spec = PixelSpec(op, source, layout, other, narrow=narrow, relu=relu)
        self._add((node.name,), None, spec, {}, (*names, *self._numbers(node, params, factor)))

    def _requantize(self, node: ir.Requantize) -> None:
        m, shift = int(node.requant.multiplier), node.requant.shift
        source = self.graph[node.inputs[0]].type
        reach = max(abs((source.low or 0) - node.input_zero_point), abs((source.high or 0) - node.input_zero_point))
        narrow = reach * abs(m) + (1 << (shift - 1)) <= INT32_MAX and shift < 31
        params = (node.input_zero_point, m, shift, node.type.zero_point, node.type.low, node.type.high)
        self._pointwise("requantize", node, params, narrow=narrow)

    def _pool(
        self,
        op: str,
        node: ir.Node,
        kernel: Any,
        stride: Any,
        padding: Any,
        params: tuple[Any, ...],
        factor: float = 1.0,
    ) -> None:
        name = self._value(node.inputs[0], node)
        spec = PixelSpec(op, self.layouts[name], self.layouts[node.name], None, kernel, stride, padding)
        self._add((node.name,), None, spec, {}, (name, name, *self._numbers(node, params, factor)))

    def _conv(self, node: Any, add: ir.Add | None) -> None:
        result = (add or node).name
        name = self._value(node.inputs[0], node)
        source, layout = self.layouts[name], self.layouts[result]
        weight = node.weight.numpy()
        is_float = isinstance(node, ir.FloatConv | ir.FloatLinear)
        if weight.ndim == 2:  # a matrix product is a convolution whose kernel covers the whole input
            shape = (weight.shape[0], source.channels, source.height, source.width)
            weight = weight.reshape(shape)
        if not is_float:
            weight = weight.astype(np.int8)
        geometry: dict[str, Any] = {
            "kernel": weight.shape[2:],
            "stride": getattr(node, "stride", (1, 1)),
            "dilation": getattr(node, "dilation", (1, 1)),
            "top": getattr(node, "padding", (0,) * 4)[0],
            "left": getattr(node, "padding", (0,) * 4)[2],
        }
        spec = ConvSpec(
            "fma" if is_float else "vnni", 1, self.target.lanes, self.target.registers, source, layout, **geometry,
            epilogue="acc", weight_bits=32 if is_float else 4 if node.weight_bits <= 4 else 8, threads=self.threads,
        )  # fmt: skip
        residual = None
        if is_float:
            spec = dataclasses.replace(spec, epilogue="float_relu" if node.relu else "float")
        else:
            if source.dtype != "uint8":
                raise BuildError(
                    f"layer {node.layer!r} reads {source.dtype} values ({name!r}, {node.input_range[0]}.."
                    f"{node.input_range[1]}); its kernels want unsigned 8 bit: quantize its input to 0..255 or less"
                )
            dot, chain = choose_dot(self.target, weight_quads(spec, weight), int(node.input_range[1]))
            spec = dataclasses.replace(spec, dot=dot, chain=chain)
            if node.requant is not None:
                spec = dataclasses.replace(spec, epilogue="requant", narrow=_narrow_requant(node))
            if add is not None:
                other = node.name == add.inputs[0]
                residual = self._value(add.inputs[int(other)], add)
                other_layout, narrow = self.layouts[residual], _narrow_add(add, self.graph)
                spec = dataclasses.replace(spec, epilogue="requant_add", residual=other_layout, narrow_add=narrow)
        knobs = self._knobs(node.layer, spec)
        bias = np.zeros(layout.stored, np.float32 if is_float else np.int32)
        bias[: layout.channels] = node.bias.numpy()
        numbers = np.zeros((2, layout.stored), np.int32)
        params = np.zeros(12, np.int64)
        params[11] = self.pads[result]
        if not is_float and node.requant is not None:
            numbers[:, : layout.channels] = _requant_numbers(node)
            params[:4] = node.requant.shift, node.type.zero_point, node.type.low, node.type.high
        if add is not None:
            first = add.inputs[0] == node.name
            m = add.multipliers if first else add.multipliers[::-1]
            assert add.type.low is not None
            assert add.type.high is not None
            params[4:11] = *m, add.shift, add.offset, add.type.zero_point, add.type.low, add.type.high
        nodes = (node.name, add.name) if add is not None else (node.name,)
        packed = pack_weights(spec, knobs, weight)
        self._add(nodes, node.layer, spec, knobs, (name, packed, bias, numbers.ravel(), params, residual or name))

    def _knobs(self, layer: str, spec: ConvSpec) -> dict[str, Any]:
        chosen = self.schedules.get(layer)
        known = self.best(spec) if chosen is None and self.best is not None else None
        knobs = check_knobs(spec, chosen or known or default_knobs(spec))
        self.resolved[layer] = knobs
        return knobs

    def _grouped(self, node: Any) -> None:
        name = self._value(node.inputs[0], node)
        layout = self.layouts[node.name]
        is_float = isinstance(node, ir.FloatConv)
        if is_float:
            epilogue = "float_relu" if node.relu else "float"
        else:
            epilogue = "acc" if node.requant is None else "requant"
        top, left = node.padding[0], node.padding[2]
        weight = node.weight.numpy()
        spec = GroupedSpec(
            self.layouts[name], layout, weight.shape[2:], node.stride, node.dilation, top, left, node.groups, epilogue
        )
        kind = np.float32 if is_float else np.int32
        bias, numbers = np.zeros(layout.stored, kind), np.zeros((2, layout.stored), np.int32)
        bias[: layout.channels] = node.bias.numpy()
        params = np.zeros(PIXEL_PARAMS, np.int64)
        params[PAD] = self.pads[node.name]
        if epilogue == "requant":
            numbers[:, : layout.channels] = _requant_numbers(node)
            params[:4] = node.requant.shift, node.type.zero_point, node.type.low, node.type.high
        weight = weight.astype(np.float32 if is_float else np.int8)
        self._add((node.name,), None, spec, {}, (name, weight, bias, numbers.ravel(), params))

    def _output(self) -> None:
        last = self.graph.output
        value = self.root(last.inputs[0]) if isinstance(last, ir.Dequantize) else self.root(last.name)
        layout = self.layouts[value]
        factors, zero_point = np.ones(layout.channels, np.float32), 0
        op = "unpack"
        if isinstance(last, ir.Dequantize):
            op = "logits"
            zero_point = last.zero_point
            factors[:] = last.scale.numpy()
        elif layout.dtype != "float32":
            raise BuildError(f"the network ends in the integers of {last.name!r}; end it with a Dequantize")
        params = _numbers((zero_point,))[1]
        name = last.name if isinstance(last, ir.Dequantize) else f"{last.name}.output"
        self._add((name,), None, PixelSpec(op, layout, layout), {}, (value, factors, params))


def _numbers(params: tuple[Any, ...] = (), factor: float = 1.0, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Factors and params of a pixel kernel."""
    full = np.zeros(PIXEL_PARAMS, np.int64)
    full[: len(params)] = params
    full[PAD] = pad
    return np.array([factor], np.float32), full


def _requant_numbers(node: ir.Conv | ir.Linear) -> np.ndarray:
    """Multipliers and fractions by channel, shape ``(2, channels)``."""
    assert node.requant is not None
    multipliers = node.requant.multiplier.expand(len(node.bias)).numpy()
    fractions = np.zeros_like(multipliers) if node.fraction is None else node.fraction.numpy()
    return np.stack([multipliers, fractions])


def _narrow_requant(node: Any) -> bool:
    """Whether the requantized value fits 32 bits before it is clipped."""
    low, high = node.input_range
    flat = node.weight.reshape(node.weight.shape[0], -1)
    factors, offset = node.requant.real().abs(), abs(node.type.zero_point) + 1
    bound = flat.abs().sum(1) * max(abs(low), abs(high)) + node.bias.abs() + 1  # quick; usually enough
    if float((bound.double() * factors).max()) + offset < INT32_MAX:
        return True
    positive, negative = flat.clamp(min=0).sum(1), flat.clamp(max=0).sum(1)
    reach = (positive * high - negative * high + max(0, -low) * flat.abs().sum(1) + node.bias.abs()).double()
    return float(((reach + 1) * factors).max()) + offset < INT32_MAX


def _narrow_add(node: ir.Add, graph: IntegerGraph) -> bool:
    """Whether the sum, its offset and the rounding constant fit 32 bits."""
    if node.shift >= 31:
        return False
    reach = abs(node.offset) + (1 << (node.shift - 1)) + abs(node.type.zero_point)
    for name, m in zip(node.inputs, node.multipliers, strict=True):
        kind = graph[name].type
        reach += max(abs(kind.low or 0), abs(kind.high or 0)) * abs(m)
    return reach <= INT32_MAX
