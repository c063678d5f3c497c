"""Where every value of a graph lies: which nodes share a buffer, layouts, halos."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.float_operators import FloatOperator
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.x86.layout import VECTOR, Layout, as_image, storage_dtype, stored_channels

Halos = dict[int, tuple[int, int]]  # by what they hold: rows above and below, columns on the left and right
_PRODUCTS = (ir.Linear, ir.FloatLinear)


@dataclass(frozen=True)
class Slice:
    """A value's place in the buffer of a concatenation, its owner, from channel ``first`` on."""

    owner: str
    first: int


class Values:
    """Layouts of all values of a graph.

    Args:
        graph: whose.

    Attributes:
        direct_readers: of each node.
        layouts: by name of value; filled by :meth:`place`.
        pads: what the halo of each value holds.
        places: of values that lie in a concatenation's buffer.
    """

    def __init__(self, graph: IntegerGraph) -> None:
        self.graph = graph
        self.by_name = {node.name: node for node in graph}
        self.layouts: dict[str, Layout] = {}
        self.pads: dict[str, int] = {}
        self.places: dict[str, Slice] = {}
        self._shared_halos: Mapping[str, Halos] = {}
        self.direct_readers: dict[str, list[ir.Node]] = {node.name: [] for node in graph}
        for node in graph:
            for name in node.inputs:
                self.direct_readers[name].append(node)
        self._alias: dict[str, str] = {}
        for node in graph:
            if isinstance(node, ir.Flatten) and self._needs_no_copy(node):
                self._alias[node.name] = self.root(node.inputs[0])

    def share(self, places: Mapping[str, Slice], shared_halos: Mapping[str, Halos]) -> None:
        """Let values lie in the buffers of concatenations, with halos of ``{concatenation: {padding value: halo}}``;
        see :mod:`lightning_baqe.deploy.in_place`.
        """
        self.places, self._shared_halos = dict(places), shared_halos

    def parts(self, concat: ir.Concat) -> list[Slice] | None:
        """Where its inputs are wanted in its buffer; None if none of them lies there."""
        base = self.places.get(concat.name, Slice(concat.name, 0))
        ends = itertools.accumulate((self.by_name[name].type.shape[0] for name in concat.inputs), initial=base.first)
        wanted = [Slice(base.owner, first) for first in list(ends)[:-1]]
        there = [self.places.get(name) == place for name, place in zip(concat.inputs, wanted, strict=True)]
        return wanted if any(there) else None

    def root(self, name: str) -> str:
        """The value whose layout a name stands for."""
        return self._alias.get(name, name)

    def is_alias(self, node: ir.Node) -> bool:
        """Whether a node shares its input's buffer."""
        return node.name in self._alias

    def is_input(self, name: str) -> bool:
        """Whether the buffer is the network's input as the caller gives it."""
        return isinstance(self.by_name[self.root(name)], ir.Input)

    def is_plain(self, name: str) -> bool:
        """Whether the value lies row-major, as islands have it: one of theirs, or dequantized for them alone."""
        node = self.by_name[self.root(name)]
        if isinstance(node, ir.Dequantize) and node is not self.graph.output:
            readers = self.readers(node.name)
            return bool(readers) and all(isinstance(reader, FloatOperator) for reader in readers)
        return isinstance(node, FloatOperator)

    def readers(self, name: str) -> list[ir.Node]:
        """Readers of a value, through nodes that share its buffer."""
        found: list[ir.Node] = []
        for node in self.direct_readers[name]:
            found.extend(self.readers(node.name) if self.is_alias(node) else [node])
        return found

    def _needs_no_copy(self, node: ir.Flatten) -> bool:
        """Of one pixel, or read only by matrix products, which take an image as it lies, and by the output."""
        before, after = self.by_name[node.inputs[0]].type.shape, node.type.shape
        if len(before) == 1 or before[1:] == (1, 1):
            return True
        assert len(after) == 1
        for reader in self.direct_readers[node.name]:
            ends = reader is self.graph.output and isinstance(reader, ir.Dequantize) and reader.scale.ndim == 0
            flat = isinstance(reader, ir.Flatten) and len(reader.type.shape) == 1 and self._needs_no_copy(reader)
            if not (ends or flat or isinstance(reader, _PRODUCTS)):
                return False
        return True

    def place(self, node: ir.Node) -> Layout:
        """Decide on a value's layout; its readers want it with the halo of the padding that most of it is for."""
        shape = node.type.shape
        if node.name in self.layouts:  # a concatenation is placed with the first value that lies in it
            return self.layouts[node.name]
        if node.name in self.places:
            return self.place_slice(node.name, self.places[node.name], shape[0])
        channels, height, width = as_image(shape)
        readers = self.readers(node.name)
        pads = self._shared_halos.get(node.name, halos(readers))
        packed = isinstance(node, ir.Quantize) and self.is_input(node.inputs[0])
        stored = _stored(channels, readers, packed)
        self._place(node.name, Layout(channels, height, width, stored, (0, 0), self.dtype(node)), pads)
        return self.layouts[node.name]

    def place_slice(self, name: str, place: Slice, channels: int) -> Layout:
        """Put so many channels under a name into a concatenation's buffer."""
        whole = self.place(self.by_name[place.owner])
        self.layouts[name] = whole.part(place.first, channels)
        self.pads[name] = self.pads[place.owner]
        return self.layouts[name]

    def dtype(self, node: ir.Node) -> str:
        """The storage type of a node's value."""
        low, high = node.type.low, node.type.high
        if getattr(node, "requant", 0) is None:
            return "int32"
        return "float32" if low is None or high is None else storage_dtype(low, high)

    def place_input(self, name: str) -> None:
        """Place the network's float input in our layout under a name, for readers that take it as it is."""
        channels, height, width = as_image(self.graph.input_shape)
        readers = [r for r in self.readers(self.graph.nodes[0].name) if not isinstance(r, ir.Quantize | FloatOperator)]
        stored = _stored(channels, readers, True)
        self._place(name, Layout(channels, height, width, stored, (0, 0), "float32"), halos(readers))

    def place_packed(self, copy: str, name: str) -> None:
        """Place a row-major float value in our layout under a name."""
        shape = self.by_name[name].type.shape
        layout = Layout(*as_image(shape), stored_channels(shape[0]), (0, 0), "float32")
        self._place(copy, layout, halos(self.readers(name)))

    def place_copy(self, copy: str, name: str, pad: int) -> None:
        """Place a value's copy under a name, for readers that pad with another number."""
        self._place(copy, self.layouts[name].alone, {pad: halos(self.readers(name))[pad]})

    def _place(self, name: str, layout: Layout, pads: Halos) -> None:
        pad = widest(pads)
        self.layouts[name] = layout if pad is None else replace(layout, halo=pads[pad])
        self.pads[name] = pad or 0


def pad_of(reader: ir.Node) -> int | None:
    """What a node pads its input with; None if it does not."""
    if isinstance(reader, ir.Conv | ir.FloatConv) and any(reader.padding):
        return reader.pad_value if isinstance(reader, ir.Conv) else 0
    return None


def widest(pads: Halos) -> int | None:
    """The padding value of the widest halo; None without one."""
    return max(pads, key=lambda pad: sum(pads[pad]), default=None)


def joined(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The halo that is wide enough for two."""
    return max(one[0], other[0]), max(one[1], other[1])


def halos(readers: list[ir.Node]) -> Halos:
    """The halo for each value that readers pad with."""
    found: Halos = {}
    for reader in readers:
        pad = pad_of(reader)
        if pad is not None and isinstance(reader, ir.Conv | ir.FloatConv):
            top, bottom, left, right = reader.padding
            found[pad] = joined(found.get(pad, (0, 0)), (max(top, bottom), max(left, right)))
    return found


def _stored(channels: int, readers: list[ir.Node], packed: bool) -> int:
    """Channels in memory. A first layer's input has no spare ones: its kernel takes whole rows of a window as a run."""
    dense = all(isinstance(r, ir.Conv | ir.FloatConv) and r.groups == 1 for r in readers)
    return channels if packed and dense and channels < VECTOR else stored_channels(channels)
