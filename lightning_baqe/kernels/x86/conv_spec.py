"""What the code of a convolution, or of a matrix product, depends on, knobs apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm.script import tirx as T

from lightning_baqe.kernels.x86.arithmetic import ARITHMETICS, Arithmetic
from lightning_baqe.kernels.x86.layout import Layout


@dataclass(frozen=True)
class WindowSpec:
    """What dense and depthwise convolutions have in common. Numbers such as scales are data, not code.

    Args:
        dot: see :mod:`lightning_baqe.kernels.x86.arithmetic`.
        lanes, registers: of the target.
        source, result: layouts of input and output; the output's channels are stored.
        kernel, stride, dilation: ``(height, width)``.
        top, left: padding before the first row and column.
        epilogue: ``acc`` (int32 accumulators), ``requant``, ``requant_add``, ``float``, ``float_relu``.
        narrow: the requantized value fits 32 bits before it is clipped.
        high: the shift of the requantization is 32 or more.
        threads: that share the tiles.
    """

    dot: str
    lanes: int
    registers: int
    source: Layout
    result: Layout
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    top: int
    left: int
    epilogue: str
    narrow: bool = True
    high: bool = False
    threads: int = 1

    @property
    def arithmetic(self) -> Arithmetic:
        """What ``dot`` names."""
        return ARITHMETICS[self.dot]

    @property
    def requantizes(self) -> bool:
        """Whether results are requantized."""
        return self.epilogue.startswith("requant")

    @property
    def packs_bytes(self) -> bool:
        """Whether results are requantized to unsigned bytes, four vectors at a time."""
        packs = self.requantizes and self.result.dtype == "uint8" and self.arithmetic.packs
        return packs and (self.narrow or self.high or self.epilogue == "requant_add")


@dataclass(frozen=True)
class ConvSpec(WindowSpec):
    """Everything that the code of a dense or grouped convolution, or of a matrix product, depends on.

    Args:
        chain: see :mod:`lightning_baqe.kernels.x86.arithmetic`.
        residual: layout of the other operand of a fused residual sum.
        narrow_add: the residual sum fits 32 bits.
        weight_bits: that storage needs, 4 or 8: the code for 3 bits is that for 4, and measured once. 32 = float.
        groups: of channels; of more than one, a block reads ``span`` channels of each pixel.
    """

    chain: int = field(kw_only=True)
    residual: Layout | None = None
    narrow_add: bool = True
    weight_bits: int = 8
    groups: int = 1

    @property
    def blocks(self) -> int:
        """Register-wide blocks of output channels."""
        return self.result.stored // self.lanes

    @property
    def whole_rows(self) -> bool:
        """Whether a row of the window is one run of input values."""
        neighbours = self.kernel[1] == 1 or not self.source.shared
        return self.dilation[1] == 1 and self.groups == 1 and neighbours

    @property
    def span(self) -> int:
        """Neighbouring input channels that a block reads: those of all groups that it has a channel of."""
        if self.groups == 1:
            return self.source.stored
        inner, outer = self.source.channels // self.groups, self.result.channels // self.groups
        ends = [min(first + self.lanes, self.result.channels) for first in range(0, self.result.channels, self.lanes)]
        return max(-(-end // outer) - b * self.lanes // outer for b, end in enumerate(ends)) * inner

    def first_channel(self, block: Any) -> Any:
        """The first input channel that a block reads; a number, or an expression of one."""
        if self.groups == 1:
            return 0
        inner, outer = self.source.channels // self.groups, self.result.channels // self.groups
        if isinstance(block, int):
            return min(block * self.lanes // outer * inner, self.source.stored - self.span)
        return T.min(T.floordiv(block * self.lanes, outer) * inner, self.source.stored - self.span)

    def segments(self, inner: int = 0) -> int:
        """Contiguous runs of input values under the window; ``inner``: input channels of a tile, 0 for no tiles."""
        height, width = self.kernel
        if inner:
            return self.span // inner * height * width
        return height if self.whole_rows else height * width

    def segment_offset(self, segment: Any, inner: int = 0) -> Any:
        """Where a segment's input values begin, from the first one of the window; ``inner`` as for :meth:`segments`."""
        source, (height, width), (rows, columns) = self.source, self.kernel, self.dilation
        if self.whole_rows and not inner:
            return segment * (rows * source.row)
        tap = T.floormod(segment, height * width) if inner else segment
        offset = T.floordiv(tap, width) * (rows * source.row) + T.floormod(tap, width) * (columns * source.pitch)
        return T.floordiv(segment, height * width) * inner + offset if inner else offset

    def run(self, inner: int = 0) -> int:
        """Values in one run."""
        return inner or self.span * (self.kernel[1] if self.whole_rows else 1)

    def steps(self, packed: bool, inner: int = 0) -> int:
        """Quads of one run, rounded up to whole groups."""
        quads = -(-self.run(inner) // self.arithmetic.quad)
        return -(-quads // self.group(packed)) * self.group(packed)

    def group(self, packed: bool) -> int:
        """Quads that one step of the inner loop takes."""
        return max(self.chain, 2 if packed else 1)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the logical convolution."""
        out = self.result
        inner = self.source.channels // self.groups
        return out.channels * out.height * out.width * inner * self.kernel[0] * self.kernel[1]
