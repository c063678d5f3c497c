"""Concatenations without a copy: which values are written where a concatenation wants them, in a slice of its buffer.

A concatenation rescales nothing, so a value that it reads can lie in it from the start. Its writer puts whole vectors
of channels, the spare ones too, so that slices begin at multiples of
:data:`~lightning_baqe.kernels.x86.layout.VECTOR`; and there is one halo for all, so that all readers must pad with one
number. Where a value cannot lie there, it is copied.

A concatenation may itself lie in a later one; or it is the beginning of a later one (in dense blocks all of them are),
and then nothing is left of it but a way to read the later one's buffer.
"""

from __future__ import annotations

import itertools

from lightning_baqe.deploy.placement import Halos, Slice, Values, halos, joined, widest
from lightning_baqe.deploy.plan_pixels import is_lookup
from lightning_baqe.integer import nodes as ir
from lightning_baqe.kernels.x86.layout import VECTOR, stored_channels

_LOOKED_UP = 64  # bytes that a table takes at once, see :func:`lightning_baqe.kernels.x86.pixels.emit_byte_table`


def find_slices(values: Values, vbmi: bool) -> tuple[dict[str, Slice], dict[str, Halos]]:
    """The slices of a graph's concatenations, the last one first: it is the largest, where several share inputs.

    Args:
        values: of the graph, none placed yet.
        vbmi: tables of bytes are looked up a row at a time.

    Returns:
        ``{value: where it lies}``, and ``{concatenation that owns a buffer: {padding value: halo}}`` of the buffers'
        halos, one entry each at most.
    """
    finder = _Finder(values, vbmi)
    for node in reversed(values.graph.nodes):
        if isinstance(node, ir.Concat):
            finder.share(node)
    owners = {place.owner for place in finder.places.values()}
    return finder.places, {name: pads for name, pads in finder.halos.items() if name in owners}


class _Finder:
    def __init__(self, values: Values, vbmi: bool) -> None:
        self.values, self.vbmi = values, vbmi
        self.places: dict[str, Slice] = {}
        self.halos: dict[str, Halos] = {}

    def share(self, concat: ir.Concat) -> None:
        """Give its inputs places in its buffer, or itself one among its inputs."""
        sizes = [self.values.by_name[name].type.shape[0] for name in concat.inputs]
        if any(size % VECTOR for size in sizes[:-1]):
            return
        firsts = [0, *itertools.accumulate(sizes[:-1])]
        if concat.name not in self.places and self._is_part(concat, firsts):
            return
        base = self.places.get(concat.name, Slice(concat.name, 0))
        for name, first in zip(concat.inputs, firsts, strict=True):
            if name not in self.places and self._suits(self.values.by_name[name], base.owner):
                self.places[name] = Slice(base.owner, base.first + first)

    def _is_part(self, concat: ir.Concat, firsts: list[int]) -> bool:
        """Whether its inputs already lie side by side in another buffer, where it can be read."""
        begin = self.places.get(concat.inputs[0])
        if begin is None:
            return False
        wanted = [Slice(begin.owner, begin.first + first) for first in firsts]
        if [self.places.get(name) for name in concat.inputs] != wanted or not self._suits(concat, begin.owner):
            return False
        self.places[concat.name] = begin
        return True

    def _suits(self, node: ir.Node, owner: str) -> bool:
        values = self.values
        inside = values.is_input(node.name) or values.is_plain(node.name)
        if values.is_alias(node) or inside or isinstance(node, ir.Literal):
            return False
        if isinstance(node, ir.Quantize) and (values.is_input(node.inputs[0]) or values.is_plain(node.inputs[0])):
            return False  # packed from a row-major value, which fills the buffer whole
        if values.dtype(node) != values.dtype(values.by_name[owner]):
            return False
        small = self.vbmi and stored_channels(node.type.shape[0]) < _LOOKED_UP  # for a table of bytes
        if small and any(map(is_lookup, (node, *values.readers(node.name)))):
            return False  # whole rows of a small value are faster, even with a copy
        return self._pads_agree(node, owner)

    def _pads_agree(self, node: ir.Node, owner: str) -> bool:
        """Whether one halo does for a value's readers and the buffer's; widens it as they need it."""
        if owner not in self.halos:
            own = halos(self.values.readers(owner))
            pad = widest(own)
            self.halos[owner] = {} if pad is None else {pad: own[pad]}
        held, wanted = self.halos[owner], halos(self.values.readers(node.name))
        differ = bool(wanted and held) and wanted.keys() != held.keys()
        if differ or len(wanted) > 1:
            return False
        for pad, halo in wanted.items():
            held[pad] = joined(held.get(pad, (0, 0)), halo)
        return True
