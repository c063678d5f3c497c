"""Hand-made integer graphs with random numbers, and the check that compiled code equals the interpreter."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torchvision
from expressions import chain

import lightning_baqe as baqe
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.compiler import compile_plan
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.deploy.verify import recomputed, verify
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, can_run
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.dyadic import Dyadic
from lightning_baqe.integer.float_operators import FloatOperator, call_operator, canonical_shape, encode_arguments
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.tunable import template_of

FLOAT_TOLERANCE = 1e-5  # two float convolutions never agree to the last bit; more than this is a wrong kernel
UINT8, INT8, WIDE = (0, 255), (-128, 127), (-40000, 40000)
TILE_PATHS = ("amx", "amx_vnni", "amx_plain")  # the last two stand for the first, where there is no AMX
TILES = next(path for path in (*TILE_PATHS, "portable") if can_run(path))  # what this CPU runs of them


class Maker:
    """Adds operators with random constants, one after the other.

    Args:
        channels, size: of the input image, which is quantized to ``activation_bits`` with zero point ``zero_point``;
            without a size it is a vector.
        seed: of all numbers.
    """

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, int] | None,
        activation_bits: int = 8,
        zero_point: int = 3,
        seed: int = 0,
    ) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        sizes = () if size is None else (size, size) if isinstance(size, int) else size
        image = ir.TensorType((channels, *sizes))
        self.nodes: list[ir.Node] = [ir.Input(name="input", inputs=(), type=image)]
        self.activation_bits = activation_bits
        kind = ir.TensorType(image.shape, 0, 2**activation_bits - 1, 0.1, zero_point)
        self.nodes.append(ir.Quantize(name="x", inputs=("input",), type=kind, inverse_scale=2.0**activation_bits / 4))
        self.bits: dict[str, tuple[int, int]] = {}

    def __getitem__(self, name: str) -> ir.Node:
        return next(node for node in self.nodes if node.name == name)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=self.rng)

    def number(self, low: int, high: int) -> int:
        return int(self.integers(low, high, 1))

    def _add(self, node: ir.Node) -> str:
        self.nodes.append(node)
        return node.name

    def _requant(self, flat: torch.Tensor, source: ir.TensorType, limits: tuple[int, int]) -> Dyadic:
        """Factors of both signs that use the range and clip at its ends now and then."""
        assert source.high is not None
        reach = flat.abs().sum(1).clamp(min=1).double() * max(source.high, 1) / 4
        signs = self.integers(0, 1, len(flat)) * 2 - 1
        return Dyadic.from_real(signs * (limits[1] - limits[0]) / reach)

    def _fraction(self, requant: Dyadic | None) -> torch.Tensor | None:
        """What rounding took from a bias: up to half a step of the accumulator."""
        if requant is None:
            return None
        part = torch.rand(requant.multiplier.shape, generator=self.rng, dtype=torch.float64) - 0.5
        return (requant.multiplier * part).to(torch.int64)

    def conv(
        self,
        source: str = "x",
        out: int = 16,
        kernel: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int, int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        weight_bits: int = 8,
        limits: tuple[int, int] | None = UINT8,
        weight: int | None = None,
        name: str | None = None,
        pad_value: int | None = None,
    ) -> str:
        """A convolution; ``limits`` None leaves its accumulators, ``weight`` is every weight's value."""
        read = self[source].type
        kernel, stride, dilation = ((v, v) if isinstance(v, int) else v for v in (kernel, stride, dilation))
        padding = (padding,) * 4 if isinstance(padding, int) else padding
        low, high = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
        shape = (out, read.shape[0] // groups, *kernel)
        values = self.integers(low, high, *shape) if weight is None else torch.full(shape, weight)
        sizes = [
            (extent + before + after - step * (k - 1) - 1) // s + 1
            for extent, before, after, k, s, step in zip(
                read.shape[1:], padding[::2], padding[1::2], kernel, stride, dilation, strict=True
            )
        ]
        kind = ir.TensorType((out, *sizes), *(limits or (-(2**31), 2**31 - 1)), 1.0, 0 if limits is None else 5)
        name = name or f"conv{len(self.nodes)}"
        self.bits[name] = (weight_bits, self.activation_bits)
        requant = None if limits is None else self._requant(values.flatten(1), read, limits)
        return self._add(
            ir.Conv(
                name=name, inputs=(source,), type=kind, layer=name, weight=values, weight_bits=weight_bits,
                activation_bits=self.activation_bits, bias=self.integers(-999, 999, out), stride=stride,
                padding=padding, dilation=dilation, groups=groups,
                pad_value=read.zero_point if pad_value is None else pad_value,
                input_range=(read.low or 0, read.high or 0),
                requant=requant, fraction=self._fraction(requant),
            )
        )  # fmt: skip

    def linear(self, source: str, out: int, limits: tuple[int, int] | None = None, weight_bits: int = 8) -> str:
        """A matrix product."""
        read = self[source].type
        values = self.integers(-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1, out, read.shape[0])
        kind = ir.TensorType((out,), *(limits or (-(2**31), 2**31 - 1)), 1.0, 0)
        name = f"linear{len(self.nodes)}"
        self.bits[name] = (weight_bits, 8)
        requant = None if limits is None else self._requant(values, read, limits)
        return self._add(
            ir.Linear(
                name=name, inputs=(source,), type=kind, layer=name, weight=values, weight_bits=weight_bits,
                activation_bits=8, bias=self.integers(-999, 999, out), input_range=(read.low or 0, read.high or 0),
                requant=requant, fraction=self._fraction(requant),
            )
        )  # fmt: skip

    def add(self, a: str, b: str, limits: tuple[int, int] = UINT8, multiplier: int = 2**14) -> str:
        """A residual sum; large multipliers need 64 bits. Operands may be one row, column or channel for all."""
        shift = multiplier.bit_length()
        multipliers = (self.number(1, multiplier), self.number(1, multiplier))
        kind = ir.TensorType(self.joint_shape(a, b), *limits, 1.0, 5)
        name = f"add{len(self.nodes)}"
        return self._add(
            ir.Add(name=name, inputs=(a, b), type=kind, multipliers=multipliers, shift=shift, offset=-multiplier // 3)
        )

    def joint_shape(self, *names: str) -> tuple[int, ...]:
        """What operands become together."""
        return tuple(torch.broadcast_shapes(*(self[name].type.shape for name in names)))

    def literal(self, shape: tuple[int, ...], limits: tuple[int, int] = UINT8) -> str:
        """Random integers."""
        kind = ir.TensorType(shape, *limits, 1.0, limits[0] + 6)
        value = self.integers(*limits, *shape)
        return self._add(ir.Literal(name=f"literal{len(self.nodes)}", inputs=(), type=kind, value=value))

    def float_literal(self, *shape: int) -> str:
        name = f"literal{len(self.nodes)}"
        return self._add(ir.Literal(name=name, inputs=(), type=ir.TensorType(shape), value=self.floats(*shape)))

    def move(self, source: str, index: torch.Tensor) -> str:
        """Any rearrangement."""
        kind = dataclasses.replace(self[source].type, shape=tuple(index.shape))
        return self._add(ir.Move(name=f"move{len(self.nodes)}", inputs=(source,), type=kind, index=index))

    def prelu(
        self,
        source: str,
        limits: tuple[int, int] = UINT8,
        by_channel: tuple[bool, bool] = (False, True),
        size: float = 1.0,
    ) -> str:
        """Factors of about ``size`` times what uses the range, of both signs, each for all or by channel."""
        read = self[source].type
        span = size * (limits[1] - limits[0]) / ((read.high or 0) - (read.low or 0) + 1)
        positive, negative = (
            Dyadic.from_real(
                torch.randn(read.shape[0] if many else (), generator=self.rng, dtype=torch.float64) * span * part
            )
            for many, part in zip(by_channel, (1.5, 0.3), strict=True)
        )
        return self._add(
            ir.PRelu(
                name=f"prelu{len(self.nodes)}", inputs=(source,), positive=positive, negative=negative,
                type=ir.TensorType(read.shape, *limits, 1.0, (limits[0] + limits[1]) // 2),
                input_zero_point=((read.low or 0) + (read.high or 0)) // 2,
            )
        )  # fmt: skip

    def requantize(self, source: str, limits: tuple[int, int], factor: float = 0.7) -> str:
        kind = ir.TensorType(self[source].type.shape, *limits, 1.0, limits[0] + 2)
        name = f"requantize{len(self.nodes)}"
        requant = Dyadic.from_real(factor)
        return self._add(ir.Requantize(name=name, inputs=(source,), type=kind, requant=requant, input_zero_point=4))

    def clip(self, source: str, limits: tuple[int, int]) -> str:
        kind = ir.TensorType(self[source].type.shape, *limits, 1.0, self[source].type.zero_point)
        return self._add(ir.Clip(name=f"clip{len(self.nodes)}", inputs=(source,), type=kind))

    def mul(self, a: str, b: str, limits: tuple[int, int] = UINT8) -> str:
        """A product; operands may be one row, column or channel for all."""
        kind = ir.TensorType(self.joint_shape(a, b), *limits, 1.0, limits[0] + 4)
        reach = max(abs(v) for n in (a, b) for v in (self[n].type.low or 0, self[n].type.high or 0))
        points = (self[a].type.zero_point, self[b].type.zero_point)
        return self._add(
            ir.Mul(
                name=f"mul{len(self.nodes)}", inputs=(a, b), type=kind, input_zero_points=points,
                requant=Dyadic.from_real(3.0 * (limits[1] - limits[0]) / reach**2),
            )
        )  # fmt: skip

    def affine(self, source: str, limits: tuple[int, int] = UINT8) -> str:
        """A factor and a term by channel, of both signs."""
        read = self[source].type
        span = limits[1] - limits[0]
        channels = read.shape[0]
        factors = torch.randn(channels, generator=self.rng, dtype=torch.float64) * span / ((read.high or 0) + 1)
        requant = Dyadic.from_real(factors)
        offset = torch.randn(channels, generator=self.rng, dtype=torch.float64) * span / 2 * 2.0**requant.shift
        return self._add(
            ir.Affine(
                name=f"affine{len(self.nodes)}", inputs=(source,), requant=requant, input_zero_point=read.zero_point,
                type=ir.TensorType(read.shape, *limits, 1.0, limits[0] + 1),
                offset=offset.clamp(-(2.0**60), 2.0**60).to(torch.int64),
            )
        )  # fmt: skip

    def table(self, source: str, limits: tuple[int, int] = UINT8) -> str:
        """Random entries for the whole range of the input."""
        read = self[source].type
        assert read.low is not None
        assert read.high is not None
        return self._add(
            ir.Table(
                name=f"table{len(self.nodes)}", inputs=(source,),
                type=ir.TensorType(read.shape, *limits, 1.0, limits[0] + 1),
                table=self.integers(*limits, read.high - read.low + 1), input_low=read.low,
                steps=chain(("hardswish",), ("mul", 0.5)),
            )
        )  # fmt: skip

    def max_pool(
        self,
        source: str,
        kernel: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int],
        ceil_mode: bool = False,
        dilation: int | tuple[int, int] = 1,
    ) -> str:
        read = self[source].type
        pairs = [(v, v) if isinstance(v, int) else v for v in (kernel, stride, padding, dilation)]
        node = ir.MaxPool(
            name=f"max_pool{len(self.nodes)}", inputs=(source,), type=read, kernel=pairs[0], stride=pairs[1],
            padding=pairs[2], dilation=pairs[3], ceil_mode=ceil_mode,
        )  # fmt: skip
        shape = tuple(node.run(torch.zeros(1, *read.shape, dtype=torch.int64)).shape[1:])
        return self._add(dataclasses.replace(node, type=dataclasses.replace(read, shape=shape)))

    def max_windows(self, source: str, rows: Sequence[tuple[int, int]], columns: Sequence[tuple[int, int]]) -> str:
        """Any windows."""
        kind = dataclasses.replace(self[source].type, shape=(self[source].type.shape[0], len(rows), len(columns)))
        return self._add(
            ir.MaxWindows(
                name=f"max_windows{len(self.nodes)}", inputs=(source,), type=kind, rows=torch.tensor(rows),
                columns=torch.tensor(columns),
            )
        )  # fmt: skip

    def avg_pool(self, source: str, kernel: int, stride: int, limits: tuple[int, int] = UINT8) -> str:
        """Windows of one size, as torch places them."""
        rows, columns = (
            [(first, first + kernel) for first in range(0, size - kernel + 1, stride)]
            for size in self[source].type.shape[1:]
        )
        return self.avg_windows(source, rows, columns, limits, by_pixel=False)

    def avg_windows(
        self,
        source: str,
        rows: Sequence[tuple[int, int]],
        columns: Sequence[tuple[int, int]],
        limits: tuple[int, int] = UINT8,
        by_pixel: bool = True,
    ) -> str:
        """Any windows; ``by_pixel`` gives each its own factor."""
        read = self[source].type
        counts = torch.tensor([[(b - a) * (d - c) for c, d in columns] for a, b in rows], dtype=torch.float64).ravel()
        factors = 1.3 / counts if by_pixel else 1.3 / counts.max()
        kind = ir.TensorType((read.shape[0], len(rows), len(columns)), *limits, 1.0, 7)
        return self._add(
            ir.AvgPool(
                name=f"avg_pool{len(self.nodes)}", inputs=(source,), type=kind, rows=torch.tensor(rows),
                columns=torch.tensor(columns), requant=Dyadic.from_real(factors), input_zero_point=2,
            )
        )  # fmt: skip

    def concat(self, *sources: str) -> str:
        """All channels; the range is the smallest that holds all inputs'."""
        kinds = [self[name].type for name in sources]
        shape = (sum(kind.shape[0] for kind in kinds), *kinds[0].shape[1:])
        low, high = (f([getattr(kind, end) for kind in kinds]) for f, end in ((min, "low"), (max, "high")))
        kind = dataclasses.replace(kinds[0], shape=shape, low=low, high=high)
        return self._add(ir.Concat(name=f"concat{len(self.nodes)}", inputs=sources, type=kind))

    def gather(
        self,
        source: str,
        channels: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
    ) -> str:
        """A selection by index; -1 stands for the zero point."""
        read = self[source].type
        indices = [None if index is None else torch.tensor(index) for index in (channels, rows, columns)]
        picked = zip(read.shape, indices, strict=False)
        shape = tuple(size if index is None else len(index) for size, index in picked)
        return self._add(
            ir.Gather(
                name=f"gather{len(self.nodes)}", inputs=(source,), type=dataclasses.replace(read, shape=shape),
                channels=indices[0], rows=indices[1], columns=indices[2],
            )
        )  # fmt: skip

    def flatten(self, source: str) -> str:
        """``(c, h, w)`` to ``(c * h * w,)``, and ``(c,)`` to ``(c, 1, 1)``."""
        read = self[source].type
        shape = (math.prod(read.shape),) if len(read.shape) == 3 else (*read.shape, 1, 1)
        kind = dataclasses.replace(read, shape=shape)
        return self._add(ir.Flatten(name=f"flatten{len(self.nodes)}", inputs=(source,), type=kind))

    # -- floats -------------------------------------------------------------------------------------------------------

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.rng)

    def dequantize(self, source: str, scale: float | torch.Tensor = 0.05) -> str:
        node, kind = self[source], ir.TensorType(self[source].type.shape)
        name, zero_point = f"dequantize{len(self.nodes)}", node.type.zero_point
        factor = torch.as_tensor(scale)
        return self._add(ir.Dequantize(name=name, inputs=(source,), type=kind, scale=factor, zero_point=zero_point))

    def quantize(self, source: str, inverse_scale: float = 20.0, zero_point: int = 90) -> str:
        kind = ir.TensorType(self[source].type.shape, *UINT8, 1.0, zero_point)
        name = f"quantize{len(self.nodes)}"
        return self._add(ir.Quantize(name=name, inputs=(source,), type=kind, inverse_scale=inverse_scale))

    def float_node(self, cls: type[ir.Node], *sources: str, **fields: Any) -> str:
        """Any float operator; its type is what it computes from zeros."""
        name = f"{cls.kind}{len(self.nodes)}"
        node = cls(name=name, inputs=sources, type=self[sources[0]].type, **fields)
        out = node.run(*(torch.zeros(1, *self[name].type.shape) for name in sources))
        return self._add(dataclasses.replace(node, type=ir.TensorType(tuple(out.shape[1:]))))

    def float_conv(
        self, source: str, out: int, kernel: int = 3, padding: int = 0, groups: int = 1, **fields: Any
    ) -> str:
        weight = self.floats(out, self[source].type.shape[0] // groups, kernel, kernel)
        given = {"stride": (1, 1), "dilation": (1, 1), "relu": False, **fields}
        name = f"float{len(self.nodes)}"
        self.bits[name] = (32, 32)
        return self.float_node(
            ir.FloatConv, source, layer=name, weight=weight, bias=self.floats(out), padding=(padding,) * 4,
            groups=groups, **given,
        )  # fmt: skip

    def float_linear(self, source: str, out: int) -> str:
        name = f"float{len(self.nodes)}"
        self.bits[name] = (32, 32)
        weight = self.floats(out, self[source].type.shape[0])
        return self.float_node(ir.FloatLinear, source, layer=name, weight=weight, bias=self.floats(out), relu=False)

    def operator(
        self,
        name: str,
        sources: Sequence[str],
        *args: Any,
        constants: Mapping[str, torch.Tensor] | None = None,
        shapes: Sequence[tuple[int, ...]] | None = None,
        **kwargs: Any,
    ) -> str:
        """An ATen operator in float; true shapes are by default those of the operators that it reads, else of a batch
        of one image.
        """
        nodes = [self[source] for source in sources]
        known = [node.shape if isinstance(node, FloatOperator) else (1, *node.type.shape) for node in nodes]
        true = tuple(known if shapes is None else shapes)
        arguments, constants = encode_arguments(name, args, kwargs), dict(constants or {})
        tensors = {f"%{k}": torch.zeros(shape) for k, shape in enumerate(true)}
        tensors |= {f"@{key}": constant for key, constant in constants.items()}
        shape = tuple(call_operator(name, arguments, tensors).shape)
        return self._add(
            FloatOperator(
                name=f"{name.partition('.')[0]}{len(self.nodes)}", inputs=tuple(sources),
                type=ir.TensorType(canonical_shape(shape)), operator=name, arguments=arguments, constants=constants,
                shapes=true, shape=shape,
            )
        )  # fmt: skip

    def graph(self) -> IntegerGraph:
        """The graph, ended by the last value, dequantized if it is an integer."""
        last = self.nodes[-1]
        if not last.type.is_integer:
            return IntegerGraph(tuple(self.nodes), self.bits)
        scale = torch.tensor(0.01)
        kind = ir.TensorType(last.type.shape)
        end = ir.Dequantize(name="output", inputs=(last.name,), type=kind, scale=scale, zero_point=last.type.zero_point)
        return IntegerGraph((*self.nodes, end), self.bits)


def images(graph: IntegerGraph, count: int = 1, seed: int = 0) -> torch.Tensor:
    """Normal images, ``(count, *input_shape)``, some values far outside the quantized range."""
    return torch.randn(count, *graph.input_shape, generator=torch.Generator().manual_seed(seed)) * 2


def random_schedules(graph: IntegerGraph, target: CpuTarget, seed: int) -> dict[str, dict[str, Any]]:
    """Random knobs for every tunable layer, any tile that fits."""
    rng = random.Random(seed)
    found = {}
    for layer, spec in make_plan(graph, BuildOptions(target)).tunable().items():
        space = template_of(spec).knob_space(spec)
        found[layer] = {name: rng.choice(values) for name, values in space.items()}
    return found


def compiled(
    graph: IntegerGraph,
    target: CpuTarget,
    schedules: Mapping[str, Mapping[str, Any]] | None = None,
    fuse: bool = True,
    threads: int = 1,
) -> Artifact:
    """An artifact without a look into the records."""
    plan = make_plan(graph, BuildOptions(target, threads), schedules, fuse=fuse)
    return Artifact(graph, plan, compile_plan(plan, graph.input_shape))


def float_errors(artifact: Artifact, x: torch.Tensor) -> dict[str, float]:
    """Largest error of every float node relative to its largest value, given the artifact's own inputs."""
    values, errors = artifact.run_all(x), {}
    for node in artifact.graph:
        if node.is_float:
            got, want = recomputed(node, artifact, values, x)
            errors[node.name] = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    return errors


def assert_exact(artifact: Artifact, x: torch.Tensor, also: Sequence[str] = ()) -> None:
    """Every integer node and the output equal the interpreter's; skips the test where this CPU cannot run the code."""
    if not can_run(artifact.target.path):
        pytest.skip(f"this CPU does not run {artifact.target.path} code: it was compiled only")
    wrong = verify(artifact, x)
    assert not {name: count for name, count in wrong.items() if count}
    assert set(also) <= set(wrong)
    errors = float_errors(artifact, x)
    assert not {name: error for name, error in errors.items() if not error <= FLOAT_TOLERANCE}
    if artifact.graph.is_integer_only:
        assert torch.equal(artifact.run(x), artifact.graph.run(x))


def lowered(
    name: str, size: int, seed: int, classes: int = 10, floats: tuple[str, ...] = ()
) -> tuple[IntegerGraph, torch.Tensor]:
    """A torchvision network with random mixed bits, lowered, and images ``(2, 3, size, size)``."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    network = torchvision.models.get_model(name, weights=None, num_classes=classes)
    x = torch.randn(4, 3, size, size)
    network.train()
    with torch.no_grad():
        network(x)
    network.eval()
    layers = baqe.BitConfig.uniform(network)
    bits = baqe.BitConfig(
        {
            layer: baqe.LayerBits(32, 32) if layer in floats else baqe.LayerBits(rng.randint(2, 8), rng.randint(2, 8))
            for layer in layers
        }
    )
    quantized = baqe.quantize(network, bits, example_input=x)
    baqe.calibrate(quantized, [x])
    return baqe.lower(quantized.eval(), example_input=x[:1]), x[:2]
