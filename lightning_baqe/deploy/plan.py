"""From an integer graph to kernel calls: storage types, layouts, fusion, the arithmetic and the knobs of every kernel.

A plan is a pure function of (graph, options, schedules): an artifact stores those and makes its plan again when
it is loaded, so that weights are kept once, packed to their bits.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from lightning_baqe.deploy.calls import Call, Constants, Maker, Plan
from lightning_baqe.deploy.in_place import find_slices
from lightning_baqe.deploy.placement import Slice, Values, pad_of
from lightning_baqe.deploy.plan_islands import Island, find_islands, results
from lightning_baqe.deploy.plan_pixels import (
    INT32_MAX,
    Kernel,
    by_channel,
    copy_kernel,
    narrow_add,
    pack_kernel,
    pixel_kernel,
    unpack_kernel,
)
from lightning_baqe.errors import BuildError, ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.float_operators import FloatOperator
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.islands import make_island
from lightning_baqe.kernels.specs import Spec, TunableSpec, alone, packed_weights
from lightning_baqe.kernels.tunable import template_of
from lightning_baqe.kernels.x86.arithmetic import ARITHMETICS, TileProducts, arithmetics, choose_dot
from lightning_baqe.kernels.x86.conv_epilogue import PARAMS
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.conv_weights import weight_quads
from lightning_baqe.kernels.x86.depthwise import DEPTHWISE_PARAMS, DepthwiseSpec, pack_depthwise
from lightning_baqe.kernels.x86.layout import Layout, as_image
from lightning_baqe.kernels.x86.requantize import requant_numbers
from lightning_baqe.kernels.x86.tile_spec import TileSpec

Schedules = Mapping[str, Mapping[str, Any]]
BestKnobs = Callable[[TunableSpec], Mapping[str, Any] | None]


def make_plan(
    graph: IntegerGraph,
    options: BuildOptions,
    schedules: Schedules | None = None,
    best: BestKnobs | None = None,
    fuse: bool = True,
) -> Plan:
    """Plan all kernels of a graph.

    Args:
        schedules: ``{layer: {knob: value}}``; what is missing comes from ``best``, then from the template's default.
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
    return _Planner(graph, options, schedules, best, fuse).plan()


class _Planner:
    def __init__(
        self, graph: IntegerGraph, options: BuildOptions, schedules: Schedules, best: BestKnobs | None, fuse: bool
    ) -> None:
        self.graph, self.options, self.target = graph, options, options.target
        self.schedules, self.best = schedules, best
        self.values = Values(graph)
        self.fused = self._fused_adds() if fuse and options.fuse_residual else {}
        if fuse:
            self.values.share(*find_slices(self.values, self.target.vbmi))
        self.buffers = {name: place.owner for name, place in self.values.places.items()}
        self.order, self.islands = find_islands(graph)
        self.plain: dict[str, int] = {}
        self.calls: list[Call] = []
        self.makers: dict[str, Maker] = {}
        self.resolved: dict[str, dict[str, Any]] = {}

    def _fused_adds(self) -> dict[str, str]:
        """``{residual sum: convolution whose kernel ends with it}``: of two candidates the one computed later."""
        order = {node.name: index for index, node in enumerate(self.graph)}
        fused: dict[str, str] = {}
        for node in self.graph:
            if not isinstance(node, ir.Add):
                continue
            candidates = [
                name
                for name in node.inputs
                if isinstance(conv := self.values.by_name[name], ir.Conv)
                and conv.requant is not None
                and conv.groups == 1
                and len(self.values.direct_readers[name]) == 1
                and node.inputs[0] != node.inputs[1]
                and all(self.values.by_name[value].type.shape == node.type.shape for value in node.inputs)
            ]
            if candidates:
                fused[node.name] = max(candidates, key=order.__getitem__)
        return fused

    def plan(self) -> Plan:
        inside = set(self.fused.values())
        for node in self.order:
            if isinstance(node, ir.Input) or self.values.is_alias(node) or node.name in inside:
                continue
            if isinstance(node, ir.Dequantize) and node is self.graph.output:
                continue
            if isinstance(node, FloatOperator):
                if node.name in self.islands:
                    self._island(self.islands[node.name])
                continue
            if isinstance(node, ir.Dequantize) and self.values.is_plain(node.name):
                self._unpack(node.name, self._value(node.inputs[0], node), node)
                continue
            self.values.place(node)
            if isinstance(node, ir.Literal):
                self._literal(node.name, node)
            elif isinstance(node, ir.Add) and node.name in self.fused:
                self._conv(self.values.by_name[self.fused[node.name]], node)
            else:
                self._emit(node)
        output = self._output()
        return Plan(
            tuple(self.calls),
            output,
            self.values.layouts,
            self.plain,
            self.buffers,
            self.resolved,
            self.options,
            Constants(self.makers),
        )

    def _value(self, name: str, reader: ir.Node) -> str:
        """The value that a node reads: packed, or copied with another halo, before its first reader."""
        root = self.values.root(name)
        layouts = self.values.layouts
        if self.values.is_input(name):
            packed = f"{root}.packed"
            if packed not in layouts:
                self.values.place_input(packed)
                self._pixels(packed, pack_kernel(layouts[packed], None), [root])
            return packed
        if root in self.plain:
            packed = f"{root}.packed"
            if packed not in layouts:
                self.values.place_packed(packed, root)
                self._pixels(packed, pack_kernel(layouts[packed], None, flat=True), [root])
            return packed
        pad = pad_of(reader)
        if pad is None or pad == self.values.pads[root]:
            return root
        copy = f"{root}.padded{pad}"
        if copy not in layouts:
            self.values.place_copy(copy, root, pad)
            value = self.values.by_name[root]
            if isinstance(value, ir.Literal):
                self._literal(copy, value)
                return copy
            self._pixels(copy, copy_kernel(layouts[root], layouts[copy]), [root])
        return copy

    def _plain(self, name: str) -> str:
        """The row-major value that an island reads."""
        root = self.values.root(name)
        if self.values.is_input(name) or root in self.plain:
            return root
        copy = f"{root}.plain"
        if copy not in self.plain:
            self._unpack(copy, root, None)
        return copy

    # -- kernels ------------------------------------------------------------------------------------------------------

    def _add(
        self,
        nodes: tuple[str, ...],
        layer: str | None,
        spec: Spec,
        knobs: Mapping[str, Any],
        arguments: Iterable[Any],
        written: tuple[str, ...] = (),
    ) -> None:
        """Add a call; of its arguments, those that are no names are what makes constants."""
        names = []
        for index, argument in enumerate(arguments):
            names.append(argument if isinstance(argument, str) else f"{nodes[-1]}/{index}")
            if not isinstance(argument, str):
                self.makers[names[-1]] = argument
        self.calls.append(Call(nodes, layer, spec, knobs, tuple(names), written))

    def _literal(self, name: str, node: ir.Literal) -> None:
        """A value that is a constant: no kernel computes it."""
        layout, pad = self.values.layouts[name], self.values.pads[name]
        values = node.value.numpy().reshape(layout.channels, layout.height, layout.width)
        self.makers[name] = partial(layout.pack, values, pad)

    def _pixels(self, name: str, kernel: Kernel, values: list[str]) -> None:
        pad = self.values.pads.get(name, 0)
        self._add((name,), None, kernel.spec, {}, (*values, *kernel.arguments(pad)))

    def _unpack(self, name: str, value: str, node: ir.Dequantize | None) -> None:
        """Write a value row-major under a name, dequantized by a node or as it is."""
        layout = self.values.layouts[value]
        self.plain[name] = layout.channels * layout.height * layout.width
        self._pixels(name, unpack_kernel(layout, node), [value])

    def _island(self, nodes: Island) -> None:
        """A run of float operators."""
        wanted = results(self.graph, nodes)
        if not wanted:  # nobody reads them
            return
        image = self.graph.nodes[0].name
        buffers: dict[str, tuple[int, ...]] = {
            name: (1, *as_image(self.graph.input_shape))
            for node in nodes
            for name in node.inputs
            if self.values.root(name) == image
        }
        island = make_island(nodes, wanted, buffers, self.target.lanes, self.options.threads)
        values = [self._plain(name) for name in island.sources]
        constants = [constant.numpy for constant in island.constants]
        self.plain |= {node.name: math.prod(node.shape) for node in nodes if node.name in island.results}
        names = tuple(node.name for node in nodes)
        self._add(names, None, island.spec, {}, (*values, *constants), island.results)

    def _emit(self, node: ir.Node) -> None:
        result = self.values.layouts[node.name]
        match node:
            case ir.Conv() | ir.Linear() | ir.FloatConv() | ir.FloatLinear():
                if isinstance(node, ir.Conv | ir.FloatConv) and _is_depthwise(node):
                    self._depthwise(node)
                else:
                    self._conv(node, None)
            case ir.Quantize() if self.values.is_input(node.inputs[0]):
                self._pixels(node.name, pack_kernel(result, node), [self.graph.nodes[0].name])
            case ir.Quantize() if self.values.is_plain(node.inputs[0]):
                self._pixels(node.name, pack_kernel(result, node, flat=True), [self.values.root(node.inputs[0])])
            case ir.Concat() if (parts := self.values.parts(node)) is not None:
                self._fill(node, parts)
            case _:
                names = [self._value(name, node) for name in node.inputs]
                kinds = [self.values.by_name[name].type for name in node.inputs]
                sources = [self.values.layouts[name] for name in names]
                self._pixels(node.name, pixel_kernel(node, sources, kinds, result, self.target), names)

    def _fill(self, node: ir.Concat, parts: list[Slice]) -> None:
        """Copy what does not lie in a concatenation's buffer yet."""
        for index, (name, part) in enumerate(zip(node.inputs, parts, strict=True)):
            if self.values.places.get(name) != part:
                source, copy = self._value(name, node), f"{node.name}.part{index}"
                layout = self.values.place_slice(copy, part, self.values.by_name[name].type.shape[0])
                self.buffers[copy] = part.owner
                self._pixels(copy, copy_kernel(self.values.layouts[source], layout), [source])

    def _window(self, node: Any, source: Layout, result: Layout, weight: np.ndarray) -> dict[str, Any]:
        """What the specs of dense and depthwise convolutions have in common."""
        padding, is_float = getattr(node, "padding", (0,) * 4), _is_float(node)
        narrow, high = (True, False) if is_float else _requant_width(node)
        float_epilogue = "float_relu" if is_float and node.relu else "float"
        return {
            "lanes": self.target.lanes, "registers": self.target.registers, "source": source, "result": result,
            "kernel": weight.shape[2:], "stride": getattr(node, "stride", (1, 1)),
            "dilation": getattr(node, "dilation", (1, 1)), "top": padding[0], "left": padding[2],
            "epilogue": float_epilogue if is_float else "acc" if node.requant is None else "requant",
            "narrow": narrow, "high": high, "threads": self.options.threads,
        }  # fmt: skip

    def _conv(self, node: Any, add: ir.Add | None) -> None:
        result, name, is_float = (add or node).name, self._value(node.inputs[0], node), _is_float(node)
        source, layout = self.values.layouts[name], self.values.layouts[result]
        if not is_float and source.dtype != "uint8":
            raise BuildError(
                f"layer {node.layer!r} reads {source.dtype} values ({name!r}, {node.input_range[0]}.."
                f"{node.input_range[1]}); its kernels want unsigned 8 bit: quantize its input to 0..255 or less"
            )
        weight = node.weight.numpy().astype(np.float32 if is_float else np.int8, copy=False)
        if weight.ndim == 2:  # a matrix product is a convolution whose kernel covers the whole input
            weight = weight.reshape(weight.shape[0], source.channels, source.height, source.width)
        fields = self._window(node, source, layout, weight) | {
            "groups": getattr(node, "groups", 1),
            "weight_bits": 32 if is_float else 4 if node.widest_weight_bits <= 4 else 8,
        }
        params: dict[str, Any] = {"pad": self.values.pads[result]}
        residual = name
        if add is not None:
            kinds = [self.values.by_name[value].type for value in add.inputs]
            turn = 1 if add.inputs[0] == node.name else -1
            residual = self._value(add.inputs[::turn][1], add)
            fields |= {"epilogue": "requant_add", "residual": self.values.layouts[residual]}
            fields["narrow_add"] = narrow_add(add, kinds)
            params |= zip(("m_conv", "m_residual"), add.multipliers[::turn], strict=True)
            params |= {"add_shift": add.shift, "add_offset": add.offset, "add_zero_point": add.type.zero_point}
            params |= {"add_low": add.type.low, "add_high": add.type.high}
        largest = 0 if is_float else int(node.input_range[1])
        dot, chain = choose_dot(
            self.target, lambda dot: weight_quads(ConvSpec(dot, chain=1, **fields), weight), largest, is_float
        )
        on_tiles = isinstance(ARITHMETICS[dot], TileProducts)
        spec = (TileSpec if on_tiles else ConvSpec)(dot, chain=chain, **fields)
        knobs = self._knobs(node.layer, spec)
        bias, numbers, filled = self._constants(node, spec, PARAMS, params)
        arguments = (name, partial(packed_weights, spec, knobs, weight), bias, numbers, filled, residual)
        nodes = (node.name, add.name) if add is not None else (node.name,)
        self._add(nodes, node.layer, spec, knobs, arguments)

    def _knobs(self, layer: str, spec: TunableSpec) -> dict[str, Any]:
        chosen = self.schedules.get(layer)
        known = self.best(alone(spec)) if chosen is None and self.best is not None else None
        self.resolved[layer] = template_of(spec).check_knobs(spec, chosen or known or {})
        return self.resolved[layer]

    def _constants(
        self, node: Any, spec: TunableSpec, names: tuple[str, ...], params: dict[str, Any]
    ) -> tuple[Maker, Maker, Maker]:
        """What makes the bias by stored channel, the numbers of requantization (0 where there is none), and the params,
        0 for those that the kernel does not use.
        """
        numbers = partial(np.zeros, 2 * spec.result.stored, np.int64)
        if spec.requantizes:
            kind, numbers = node.type, partial(_requant_numbers, node, spec)
            params |= {"shift": node.requant.shift, "zero_point": kind.zero_point, "low": kind.low, "high": kind.high}
        bias = partial(by_channel, node.bias, spec.result, spec.arithmetic.dtype)
        return bias, numbers, partial(np.array, [params.get(name, 0) for name in names], np.int64)

    def _depthwise(self, node: ir.Conv | ir.FloatConv) -> None:
        name = self._value(node.inputs[0], node)
        source, layout = self.values.layouts[name], self.values.layouts[node.name]
        weight, signed = node.weight.numpy(), source.dtype != "uint8"
        usable = (a for a in arithmetics(self.target, _is_float(node)) if a.taps and (a.plain or not signed))
        arithmetic = next(usable)
        spec = DepthwiseSpec(
            arithmetic.name,
            **self._window(node, source, layout, weight),
            vbmi=self.target.vbmi and arithmetic.taps == 4,  # one permutation puts four rows of bytes together
        )
        knobs = self._knobs(node.layer, spec)
        bias, numbers, filled = self._constants(node, spec, DEPTHWISE_PARAMS, {"pad": self.values.pads[node.name]})
        constants = [partial(pack_depthwise, spec, knobs, weight), bias, *[numbers] * spec.requantizes, filled]
        self._add((node.name,), node.layer, spec, knobs, (name, *constants))

    def _output(self) -> str:
        """The value that is the network's output, row-major."""
        last = self.graph.output
        end = last if isinstance(last, ir.Dequantize) else None
        value = self.values.root(last.name if end is None else end.inputs[0])
        if value in self.plain:
            return value
        layout = self.values.layouts[value]
        if end is None and layout.dtype != "float32":
            raise BuildError(f"the network ends in the integers of {last.name!r}; end it with a Dequantize")
        name = f"{last.name}.output" if end is None else last.name
        self._unpack(name, value, end)
        return name


def _is_float(node: ir.Node) -> bool:
    return isinstance(node, ir.FloatConv | ir.FloatLinear)


def _requant_numbers(node: Any, spec: TunableSpec) -> np.ndarray:
    """Multipliers, fractions and rounding as the kernels read them."""
    multipliers = node.requant.multiplier.expand(len(node.bias)).numpy()
    fractions = np.zeros_like(multipliers) if node.fraction is None else node.fraction.numpy()
    return requant_numbers(multipliers, fractions, node.requant.shift, spec.result.stored, spec.lanes)


def _is_depthwise(node: ir.Node) -> bool:
    """Whether each channel is convolved alone; a convolution of one channel is dense."""
    return (
        isinstance(node, ir.Conv | ir.FloatConv) and 1 < node.groups == len(node.weight) and node.weight.shape[1] == 1
    )


def _requant_width(node: ir.Conv | ir.Linear) -> tuple[bool, bool]:
    """Whether the requantized value fits 32 bits before it is clipped, and whether its shift is 32 or more."""
    if node.requant is None:
        return True, False
    if node.requant.shift >= 32:  # |acc * m| < 2^62, so that no more than 30 bits and a sign are left
        return True, True
    low, high = node.input_range
    flat = node.weight.reshape(node.weight.shape[0], -1)
    factors, offset = node.requant.real().abs(), abs(node.type.zero_point) + 1
    bound = flat.abs().sum(1) * max(abs(low), abs(high)) + node.bias.abs() + 1  # quick; usually enough
    if float((bound.double() * factors).max()) + offset < INT32_MAX:
        return True, False
    positive, negative = flat.clamp(min=0).sum(1), flat.clamp(max=0).sum(1)
    reach = (positive * high - negative * high + max(0, -low) * flat.abs().sum(1) + node.bias.abs()).double()
    return float(((reach + 1) * factors).max()) + offset < INT32_MAX, False
