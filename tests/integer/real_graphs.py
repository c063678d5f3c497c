"""Hand-made integer graphs whose scales agree with each other, as those of lowered graphs do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from expressions import chain
from torch.nn import functional

from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.dyadic import Dyadic
from lightning_baqe.integer.folding import add_factors
from lightning_baqe.integer.graph import IntegerGraph, evaluate
from lightning_baqe.quantization.pointwise import Expression


class RealMaker:
    """Adds operators one after the other and runs each on random images, for scales that suit what it computes.

    Args:
        shape: of the input.
        seed: of all numbers.
    """

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.images = torch.randn(8, *shape, generator=self.rng)
        self.nodes: list[ir.Node] = []
        self.data: dict[str, torch.Tensor] = {}
        self.bits: dict[str, tuple[int, int]] = {}
        self.add_node(ir.Input(name="image", inputs=(), type=ir.TensorType(shape)))

    def __getitem__(self, name: str) -> Any:
        return next(node for node in self.nodes if node.name == name)

    def add_node(self, node: ir.Node) -> str:
        """Append any node."""
        self.nodes.append(node)
        self.data[node.name] = evaluate(node, [self.data[name] for name in node.inputs], self.images)
        return node.name

    def grid(
        self, real: torch.Tensor, bits: int = 8, relu: bool = False, zero_point: int | None = None
    ) -> ir.TensorType:
        """A grid for real values ``(n, ...)``, its range cut below 0 for a ReLU."""
        top = 2**bits - 1
        low, high = (0.0 if relu else min(float(real.min()), 0.0)), max(float(real.max()), 0.01)
        scale = float(torch.tensor((high - low) / top))
        zero = round(-low / scale) if zero_point is None else zero_point
        return ir.TensorType(tuple(real.shape[1:]), zero if relu else 0, top, scale, zero)

    def real(self, name: str) -> torch.Tensor:
        """The real values that a node holds."""
        kind = self[name].type
        return (
            (self.data[name] - kind.zero_point).double() * kind.scale if kind.is_integer else self.data[name].double()
        )

    def rename(self, op: str) -> str:
        return f"{op}{len(self.nodes)}"

    def quantize(self, source: str = "image", bits: int = 8, signed: bool = False) -> str:
        kind = self.grid(self.data[source], bits)
        if signed:
            kind = replace(kind, low=-(2 ** (bits - 1)), high=2 ** (bits - 1) - 1, zero_point=-3)
        inverse = float(torch.tensor(1.0) / torch.tensor(kind.scale))
        return self.add_node(
            ir.Quantize(name=self.rename("quantize"), inputs=(source,), type=kind, inverse_scale=inverse)
        )

    def dequantize(self, source: str) -> str:
        kind = self[source].type
        return self.add_node(
            ir.Dequantize(
                name=self.rename("dequantize"), inputs=(source,), type=ir.TensorType(kind.shape),
                scale=torch.tensor(kind.scale), zero_point=kind.zero_point,
            )
        )  # fmt: skip

    def _layer(self, source: str, shape: tuple[int, ...], weight_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        top = 2 ** (weight_bits - 1) - 1
        low = -top if weight_bits == 8 else -top - 1
        return (
            torch.randint(low, top + 1, shape, generator=self.rng),
            torch.randint(-2000, 2000, shape[:1], generator=self.rng),
        )

    def conv(
        self,
        source: str,
        out: int,
        kernel: int = 3,
        stride: int = 1,
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: int = 1,
        groups: int = 1,
        weight_bits: int = 8,
        bits: int | None = 8,
        relu: bool = False,
        negative: bool = True,
        zero_point: int | None = None,
    ) -> str:
        """A convolution onto a grid of ``bits``, None: accumulators."""
        read = self[source].type
        weight, bias = self._layer(source, (out, read.shape[0] // groups, kernel, kernel), weight_bits)
        name = self.rename("conv")
        node = ir.Conv(
            name=name, inputs=(source,), type=ir.TensorType((out, 0, 0), -(2**31), 2**31 - 1, 0.0), layer=name,
            weight=weight, weight_bits=weight_bits, activation_bits=8,
            bias=bias - read.zero_point * weight.flatten(1).sum(1), stride=(stride, stride), padding=padding,
            dilation=(dilation, dilation), groups=groups, pad_value=read.zero_point,
            input_range=(read.low, read.high), requant=None,
        )  # fmt: skip
        return self._requantized(node, read, bits, relu, negative, zero_point)

    def linear(self, source: str, out: int, weight_bits: int = 8, bits: int | None = 8, relu: bool = False) -> str:
        """A matrix product."""
        read = self[source].type
        weight, bias = self._layer(source, (out, read.shape[0]), weight_bits)
        name = self.rename("linear")
        node = ir.Linear(
            name=name, inputs=(source,), type=ir.TensorType((out,), -(2**31), 2**31 - 1, 0.0), layer=name,
            weight=weight, weight_bits=weight_bits, activation_bits=8, bias=bias - read.zero_point * weight.sum(1),
            input_range=(read.low, read.high), requant=None,
        )  # fmt: skip
        return self._requantized(node, read, bits, relu, True, None)

    def _requantized(
        self, node: Any, read: ir.TensorType, bits: int | None, relu: bool, negative: bool, zero_point: int | None
    ) -> str:
        acc = node.run(self.data[node.inputs[0]])
        weight_scale = torch.rand(len(node.bias), generator=self.rng, dtype=torch.float64) * 0.02 + 0.001
        signs = torch.where(torch.rand(len(node.bias), generator=self.rng) < 0.4 * negative, -1.0, 1.0)
        scale = weight_scale * signs * read.scale
        self.bits[node.layer] = (node.weight_bits, 8)
        if bits is None:
            kind = replace(node.type, shape=tuple(acc.shape[1:]))
            self.add_node(replace(node, type=kind))
            self.scales = scale
            return str(node.name)
        real = acc * scale.reshape(-1, *[1] * (acc.ndim - 2))
        kind = self.grid(real, bits, relu, zero_point)
        requant = Dyadic.from_real(scale / kind.scale)
        rest = torch.rand(len(scale), generator=self.rng, dtype=torch.float64) - 0.5
        fraction = torch.round(requant.multiplier * rest).to(torch.int64)
        return self.add_node(replace(node, type=kind, requant=requant, fraction=fraction))

    def scaled_output(self, source: str) -> str:
        """Accumulators with the scales of the last layer, by channel."""
        kind = self[source].type
        scale = self.scales.repeat_interleave(kind.shape[0] // len(self.scales)).float()
        return self.add_node(
            ir.Dequantize(
                name=self.rename("dequantize"), inputs=(source,), type=ir.TensorType(kind.shape), scale=scale,
                zero_point=0,
            )
        )  # fmt: skip

    def add(self, a: str, b: str, bits: int = 8, relu: bool = False) -> str:
        kind = self.grid(self.real(a) + self.real(b), bits, relu)
        first, second = self[a].type, self[b].type
        ratios = first.scale / kind.scale, second.scale / kind.scale
        multipliers, shift, offset = add_factors(ratios, (first, second), "add")
        return self.add_node(
            ir.Add(
                name=self.rename("add"), inputs=(a, b), type=kind, multipliers=multipliers, shift=shift, offset=offset
            )
        )  # fmt: skip

    def mul(self, a: str, b: str, bits: int = 8) -> str:
        first, second = self[a].type, self[b].type
        kind = self.grid(self.real(a) * self.real(b), bits)
        return self.add_node(
            ir.Mul(
                name=self.rename("mul"), inputs=(a, b), type=kind,
                requant=Dyadic.from_real(first.scale * second.scale / kind.scale),
                input_zero_points=(first.zero_point, second.zero_point),
            )
        )  # fmt: skip

    def affine(self, source: str, bits: int = 8) -> str:
        read = self[source].type
        gain, shift = torch.randn(2, read.shape[0], generator=self.rng, dtype=torch.float64)
        broadcast = (-1, *[1] * (len(read.shape) - 1))
        kind = self.grid(self.real(source) * gain.reshape(broadcast) + shift.reshape(broadcast), bits)
        requant = Dyadic.from_real(gain * read.scale / kind.scale)
        offset = torch.round(shift / kind.scale * 2.0**requant.shift).to(torch.int64)
        return self.add_node(
            ir.Affine(
                name=self.rename("affine"), inputs=(source,), type=kind, requant=requant, offset=offset,
                input_zero_point=read.zero_point,
            )
        )  # fmt: skip

    def prelu(self, source: str, signs: int = 1, bits: int = 8, by_channel: bool = True) -> str:
        """A PReLU times a factor; ``signs`` -1: of any sign."""
        read = self[source].type
        size = (read.shape[0],) if by_channel else ()
        factors = torch.rand(size, generator=self.rng, dtype=torch.float64) + 0.5
        factors = factors * torch.where(torch.rand(size, generator=self.rng) < 0.5, signs, 1)
        slopes = torch.randn(size, generator=self.rng, dtype=torch.float64) * 0.3
        real, shape = self.real(source), (-1, *[1] * (len(read.shape) - 1))
        kind = self.grid(real * torch.where(real < 0, slopes.reshape(shape), factors.reshape(shape)), bits)
        return self.add_node(
            ir.PRelu(
                name=self.rename("prelu"), inputs=(source,), type=kind, input_zero_point=read.zero_point,
                positive=Dyadic.from_real(factors * read.scale / kind.scale),
                negative=Dyadic.from_real(slopes * read.scale / kind.scale),
            )
        )  # fmt: skip

    def literal(self, *shape: int) -> str:
        """Random numbers on a grid."""
        real = torch.randn(1, *shape, generator=self.rng)
        kind = self.grid(real)
        value = kind.clip(torch.round(real[0] / kind.scale).to(torch.int64))
        return self.add_node(ir.Literal(name=self.rename("literal"), inputs=(), type=kind, value=value))

    def move(self, source: str, index: torch.Tensor) -> str:
        kind = replace(self[source].type, shape=tuple(index.shape))
        return self.add_node(ir.Move(name=self.rename("move"), inputs=(source,), type=kind, index=index))

    def max_windows(self, source: str, rows: Sequence[tuple[int, int]], columns: Sequence[tuple[int, int]]) -> str:
        read = self[source].type
        return self.add_node(
            ir.MaxWindows(
                name=self.rename("max_windows"), inputs=(source,), rows=torch.tensor(rows),
                columns=torch.tensor(columns), type=replace(read, shape=(read.shape[0], len(rows), len(columns))),
            )
        )  # fmt: skip

    def table(
        self, source: str, *functions: tuple[Any, ...], bits: int = 8, shuffled: bool = False, onto: str | None = None
    ) -> str:
        """A table of functions, onto the grid of ``onto`` or one of its own; ``shuffled``, of nothing."""
        read = self[source].type
        real = (torch.arange(read.low, read.high + 1) - read.zero_point).double() * read.scale
        real = Expression(chain(*functions))(real) if functions else real
        kind = self.grid(real.reshape(1, -1), bits) if onto is None else self[onto].type
        table = torch.round(real / kind.scale).to(torch.int64) + kind.zero_point
        if shuffled:
            table = table[torch.randperm(len(table), generator=self.rng)]
        return self.add_node(
            ir.Table(
                name=self.rename("table"), inputs=(source,), type=replace(kind, shape=read.shape),
                table=table.clamp(kind.low, kind.high), input_low=read.low, steps=chain(*functions),
            )
        )  # fmt: skip

    def requantize(self, source: str, kind: ir.TensorType) -> str:
        read = self[source].type
        return self.add_node(
            ir.Requantize(
                name=self.rename("requantize"), inputs=(source,), type=replace(kind, shape=read.shape),
                requant=Dyadic.from_real(read.scale / kind.scale), input_zero_point=read.zero_point,
            )
        )  # fmt: skip

    def clip(self, source: str, low: int, high: int) -> str:
        kind = replace(self[source].type, low=low, high=high)
        return self.add_node(ir.Clip(name=self.rename("clip"), inputs=(source,), type=kind))

    def max_pool(
        self, source: str, kernel: int, stride: int, padding: int = 0, dilation: int = 1, ceil_mode: bool = False
    ) -> str:
        node = ir.MaxPool(
            name=self.rename("max_pool"), inputs=(source,), type=self[source].type, kernel=(kernel,) * 2,
            stride=(stride,) * 2, padding=(padding,) * 2, dilation=(dilation,) * 2, ceil_mode=ceil_mode,
        )  # fmt: skip
        shape = tuple(node.run(self.data[source]).shape[1:])
        return self.add_node(replace(node, type=replace(node.type, shape=shape)))

    def avg_pool(
        self,
        source: str,
        rows: Sequence[tuple[int, int]],
        columns: Sequence[tuple[int, int]],
        divisors: torch.Tensor | None = None,
        bits: int = 8,
    ) -> str:
        """Average pooling over given windows; ``divisors`` None: their sizes."""
        read = self[source].type
        spans = torch.tensor(rows), torch.tensor(columns)
        if divisors is None:
            heights, widths = ((s[:, 1] - s[:, 0]).double() for s in spans)
            divisors = torch.outer(heights, widths).flatten()
        if bool((divisors == divisors.flatten()[0]).all()):
            divisors = divisors.flatten()[0]
        shape = (read.shape[0], len(rows), len(columns))
        name = self.rename("avg_pool")
        if not read.is_integer:
            return self.add_node(
                ir.FloatAvgPool(
                    name=name, inputs=(source,), type=ir.TensorType(shape), rows=spans[0], columns=spans[1],
                    factors=(1 / divisors).float(),
                )
            )  # fmt: skip
        real = (ir.window_sums(self.real(source), *spans).flatten(2) / divisors).reshape(-1, *shape)
        kind = self.grid(real, bits)
        return self.add_node(
            ir.AvgPool(
                name=name, inputs=(source,), type=kind, rows=spans[0], columns=spans[1],
                requant=Dyadic.from_real(read.scale / (kind.scale * divisors.double())),
                input_zero_point=read.zero_point,
            )
        )  # fmt: skip

    def concat(self, *sources: str) -> str:
        kind = self[sources[0]].type
        shape = (sum(self[name].type.shape[0] for name in sources), *kind.shape[1:])
        return self.add_node(ir.Concat(name=self.rename("concat"), inputs=sources, type=replace(kind, shape=shape)))

    def gather(
        self,
        source: str,
        channels: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
    ) -> str:
        read = self[source].type
        picked = [None if index is None else torch.tensor(index) for index in (channels, rows, columns)]
        shape = tuple(
            size if index is None else len(index)
            for size, index in zip(read.shape, picked[: len(read.shape)], strict=True)
        )
        return self.add_node(
            ir.Gather(
                name=self.rename("gather"), inputs=(source,), type=replace(read, shape=shape), channels=picked[0],
                rows=picked[1], columns=picked[2],
            )
        )  # fmt: skip

    def flatten(self, source: str, shape: tuple[int, ...] | None = None) -> str:
        read = self[source].type
        flat = shape or (torch.Size(read.shape).numel(),)
        return self.add_node(ir.Flatten(name=self.rename("flatten"), inputs=(source,), type=replace(read, shape=flat)))

    def float_conv(self, source: str, out: int, relu: bool = False, padding: int = 1) -> str:
        read = self[source].type
        weight = torch.randn(out, read.shape[0], 3, 3, generator=self.rng) * 0.2
        shape = tuple(functional.conv2d(self.data[source], weight, padding=padding).shape[1:])
        name = self.rename("float_conv")
        self.bits[name] = (32, 32)
        return self.add_node(
            ir.FloatConv(
                name=name, inputs=(source,), type=ir.TensorType(shape), layer=name, weight=weight,
                bias=torch.randn(out, generator=self.rng), stride=(1, 1), padding=(padding,) * 4, dilation=(1, 1),
                groups=1, relu=relu,
            )
        )  # fmt: skip

    def float_linear(self, source: str, out: int, relu: bool = False) -> str:
        name = self.rename("float_linear")
        self.bits[name] = (32, 32)
        weight = torch.randn(out, self[source].type.shape[0], generator=self.rng)
        return self.add_node(
            ir.FloatLinear(
                name=name, inputs=(source,), type=ir.TensorType((out,)), layer=name, weight=weight,
                bias=torch.randn(out, generator=self.rng), relu=relu,
            )
        )  # fmt: skip

    def graph(self) -> IntegerGraph:
        """What was added, dequantized at the end if it is integers."""
        last = self.nodes[-1]
        if last.type.is_integer:
            self.dequantize(last.name)
        return IntegerGraph(tuple(self.nodes), self.bits)
