"""Hand-made integer graphs with random numbers, and the check that compiled code equals the interpreter."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.compiler import compile_plan
from lightning_baqe.deploy.conv_template import ConvSpec, knob_space, tiles
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.deploy.target import CpuTarget, can_run
from lightning_baqe.deploy.verify import verify
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.dyadic import Dyadic
from lightning_baqe.integer.graph import IntegerGraph

UINT8, INT8, WIDE = (0, 255), (-128, 127), (-40000, 40000)


class Maker:
    """Adds operators with random constants, one after the other.

    Args:
        channels, size: of the input image, which is quantized to ``activation_bits`` with zero point ``zero_point``.
        seed: of all numbers.
    """

    def __init__(
        self, channels: int, size: int | tuple[int, int], activation_bits: int = 8, zero_point: int = 3, seed: int = 0
    ) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        height, width = (size, size) if isinstance(size, int) else size
        image = ir.TensorType((channels, height, width))
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
                padding=padding, dilation=dilation, groups=groups, pad_value=read.zero_point,
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
        """A residual sum; large multipliers need 64 bits."""
        shift = multiplier.bit_length()
        multipliers = (self.number(1, multiplier), self.number(1, multiplier))
        kind = ir.TensorType(self[a].type.shape, *limits, 1.0, 5)
        name = f"add{len(self.nodes)}"
        return self._add(
            ir.Add(name=name, inputs=(a, b), type=kind, multipliers=multipliers, shift=shift, offset=-multiplier // 3)
        )

    def requantize(self, source: str, limits: tuple[int, int], factor: float = 0.7) -> str:
        kind = ir.TensorType(self[source].type.shape, *limits, 1.0, limits[0] + 2)
        name = f"requantize{len(self.nodes)}"
        requant = Dyadic.from_real(factor)
        return self._add(ir.Requantize(name=name, inputs=(source,), type=kind, requant=requant, input_zero_point=4))

    def clip(self, source: str, limits: tuple[int, int]) -> str:
        kind = ir.TensorType(self[source].type.shape, *limits, 1.0, self[source].type.zero_point)
        return self._add(ir.Clip(name=f"clip{len(self.nodes)}", inputs=(source,), type=kind))

    def max_pool(self, source: str, kernel: int, stride: int, padding: int, ceil_mode: bool = False) -> str:
        read = self[source].type
        node = ir.MaxPool(
            name=f"max_pool{len(self.nodes)}", inputs=(source,), type=read, kernel=(kernel, kernel),
            stride=(stride, stride), padding=(padding, padding), dilation=(1, 1), ceil_mode=ceil_mode,
        )  # fmt: skip
        shape = tuple(node.run(torch.zeros(1, *read.shape, dtype=torch.int64)).shape[1:])
        kind = ir.TensorType(shape, read.low, read.high, read.scale, read.zero_point)
        return self._add(
            ir.MaxPool(
                name=node.name, inputs=node.inputs, type=kind, kernel=node.kernel, stride=node.stride,
                padding=node.padding, dilation=node.dilation, ceil_mode=ceil_mode,
            )
        )  # fmt: skip

    def avg_pool(self, source: str, kernel: int, stride: int, limits: tuple[int, int] = UINT8) -> str:
        channels, height, width = self[source].type.shape
        shape = (channels, (height - kernel) // stride + 1, (width - kernel) // stride + 1)
        return self._add(
            ir.AvgPool(
                name=f"avg_pool{len(self.nodes)}", inputs=(source,), type=ir.TensorType(shape, *limits, 1.0, 7),
                kernel=(kernel, kernel), stride=(stride, stride), requant=Dyadic.from_real(1.3 / kernel**2),
                input_zero_point=2,
            )
        )  # fmt: skip

    def flatten(self, source: str) -> str:
        read = self[source].type
        size = read.shape[0] * read.shape[1] * read.shape[2]
        kind = ir.TensorType((size,), read.low, read.high, read.scale, read.zero_point)
        return self._add(ir.Flatten(name=f"flatten{len(self.nodes)}", inputs=(source,), type=kind))

    def graph(self) -> IntegerGraph:
        """The graph, ended by the dequantized last value."""
        last = self.nodes[-1]
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
    for call in make_plan(graph, target).calls:
        if isinstance(call.spec, ConvSpec) and call.layer is not None:
            space = knob_space(call.spec)
            space["tile"] = ["x".join(map(str, tile)) for tile in tiles(call.spec)]
            found[call.layer] = {name: rng.choice(values) for name, values in space.items()}
    return found


def compiled(
    graph: IntegerGraph,
    target: CpuTarget,
    schedules: Mapping[str, Mapping[str, Any]] | None = None,
    fuse: bool = True,
    threads: int = 1,
) -> Artifact:
    """An artifact without a look into the records."""
    plan = make_plan(graph, target, schedules, threads, fuse=fuse)
    return Artifact(graph, plan, compile_plan(plan, graph.input_shape))


def assert_exact(artifact: Artifact, x: torch.Tensor, also: Sequence[str] = ()) -> None:
    """Every integer node and the output equal the interpreter's, if this CPU runs the code at all."""
    if not can_run(artifact.target.path):
        return
    wrong = verify(artifact, x)
    assert not {name: count for name, count in wrong.items() if count}
    assert set(also) <= set(wrong)
    assert torch.equal(artifact.run(x), artifact.graph.run(x))
