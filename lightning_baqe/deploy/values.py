"""Where every value of a graph lies: which nodes share a buffer, layouts, halos."""

from __future__ import annotations

from lightning_baqe.deploy.layout import VECTOR, Layout, storage_dtype, stored_channels
from lightning_baqe.errors import BuildError
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.graph import IntegerGraph

_PRODUCTS = (ir.Linear, ir.FloatLinear)


class Values:
    """Layouts of all values of a graph.

    Args:
        graph: whose.

    Attributes:
        layouts: by name of value; filled by :meth:`place`.
        pads: what the halo of each value holds.
    """

    def __init__(self, graph: IntegerGraph) -> None:
        self.graph = graph
        self.by_name = {node.name: node for node in graph}
        self.layouts: dict[str, Layout] = {}
        self.pads: dict[str, int] = {}
        self._direct: dict[str, list[ir.Node]] = {node.name: [] for node in graph}
        for node in graph:
            for name in node.inputs:
                self._direct[name].append(node)
        self._alias: dict[str, str] = {}
        for node in graph:
            if isinstance(node, ir.Flatten) and self._needs_no_copy(node):
                self._alias[node.name] = self.root(node.inputs[0])

    def root(self, name: str) -> str:
        """The value whose buffer a name stands for."""
        return self._alias.get(name, name)

    def is_alias(self, node: ir.Node) -> bool:
        """Whether a node shares its input's buffer."""
        return node.name in self._alias

    def is_input(self, name: str) -> bool:
        """Whether the buffer is the network's input as the caller gives it."""
        return isinstance(self.by_name[self.root(name)], ir.Input)

    def direct_readers(self, name: str) -> list[ir.Node]:
        """Readers of a node."""
        return self._direct[name]

    def readers(self, name: str) -> list[ir.Node]:
        """Readers of a value, through nodes that share its buffer."""
        found: list[ir.Node] = []
        for node in self._direct[name]:
            found.extend(self.readers(node.name) if self.is_alias(node) else [node])
        return found

    def _needs_no_copy(self, node: ir.Flatten) -> bool:
        """Of one pixel, or read only by matrix products, which take an image as it lies, and by the output."""
        before, after = self.by_name[node.inputs[0]].type.shape, node.type.shape
        if len(before) == 1 or before[1:] == (1, 1):
            return True
        assert len(after) == 1
        for reader in self._direct[node.name]:
            ends = reader is self.graph.output and isinstance(reader, ir.Dequantize) and reader.scale.ndim == 0
            flat = isinstance(reader, ir.Flatten) and len(reader.type.shape) == 1 and self._needs_no_copy(reader)
            if not (ends or flat or isinstance(reader, _PRODUCTS)):
                return False
        return True

    def place(self, node: ir.Node) -> Layout:
        """Decide on a value's layout; its readers want it with the halo of the padding that most of it is for."""
        shape = node.type.shape
        channels, height, width = shape if len(shape) == 3 else (shape[0], 1, 1)
        low, high = node.type.low, node.type.high
        dtype = "float32" if low is None or high is None else storage_dtype(low, high)
        if getattr(node, "requant", 0) is None:
            dtype = "int32"
        readers = self.readers(node.name)
        pads = halos(readers)
        packed = isinstance(node, ir.Quantize) and self.is_input(node.inputs[0])
        self._place(node.name, Layout(channels, height, width, _stored(channels, readers, packed), 0, dtype), pads)
        return self.layouts[node.name]

    def place_input(self) -> str:
        """The name of the network's float input in our layout, for readers that take it as it is."""
        first = self.graph.nodes[0]
        name = f"{first.name}.packed"
        if name not in self.layouts:
            channels, height, width = self.image_shape()
            readers = [r for r in self.readers(first.name) if not isinstance(r, ir.Quantize)]
            stored = _stored(channels, readers, True)
            self._place(name, Layout(channels, height, width, stored, 0, "float32"), halos(readers))
        return name

    def image_shape(self) -> tuple[int, int, int]:
        """The network's input shape.

        Raises:
            BuildError: it is no image.
        """
        shape = self.graph.input_shape
        if len(shape) != 3:
            raise BuildError(f"networks take images (channels, height, width), got an input of shape {shape}")
        return shape[0], shape[1], shape[2]

    def place_copy(self, name: str, pad: int) -> str:
        """The name of a value's copy for readers that pad with another number."""
        copy = f"{name}.padded{pad}"
        layout = self.layouts[name]
        plain = Layout(layout.channels, layout.height, layout.width, layout.stored, 0, layout.dtype)
        self._place(copy, plain, {pad: halos(self.readers(name))[pad]})
        return copy

    def _place(self, name: str, layout: Layout, pads: dict[int, int]) -> None:
        pad, halo = max(pads.items(), key=lambda item: item[1], default=(0, 0))
        self.layouts[name] = Layout(layout.channels, layout.height, layout.width, layout.stored, halo, layout.dtype)
        self.pads[name] = pad


def pad_of(reader: ir.Node) -> int | None:
    """What a node pads its input with; None if it does not."""
    if isinstance(reader, ir.Conv | ir.FloatConv) and any(reader.padding):
        return reader.pad_value if isinstance(reader, ir.Conv) else 0
    return None


def halos(readers: list[ir.Node]) -> dict[int, int]:
    """The halo's width for each value that readers pad with."""
    found: dict[int, int] = {}
    for reader in readers:
        pad = pad_of(reader)
        if pad is not None and isinstance(reader, ir.Conv | ir.FloatConv):
            found[pad] = max(found.get(pad, 0), *reader.padding)
    return found


def _stored(channels: int, readers: list[ir.Node], packed: bool) -> int:
    """Channels in memory. A first layer's input has no spare ones: its kernel takes whole rows of a window as a run."""
    dense = all(isinstance(r, ir.Conv | ir.FloatConv) and r.groups == 1 for r in readers)
    return channels if packed and dense and channels < VECTOR else stored_channels(channels)
