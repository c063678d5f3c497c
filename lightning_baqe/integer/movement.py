"""Operators that only move elements, composed as index maps and turned into one IR node where a value is read.

Each such operator (views, transpositions, slices, splits, shuffles, padding, nearest upsampling) is executed once, on a
tensor of element numbers. What comes out says where every element comes from, whatever the chain of operators was.

| symbol | meaning | shape |
| --- | --- | --- |
| index | 1 + element number in the base value, 0 for padding, for a batch of two | ``(2, *shape)`` |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

Index = torch.Tensor | tuple[Any, ...]


def start(shape: tuple[int, ...]) -> torch.Tensor:
    """The index map of a value that nothing moved."""
    return (torch.arange(2 * math.prod(shape), dtype=torch.float64) + 1).reshape(2, *shape)


def move(node: fx.Node, source: fx.Node, index: Index, modules: nn.Module, value_of: Callable[[fx.Node], Any]) -> Index:
    """The index map after one movement operator.

    Args:
        node: the operator.
        source: the tensor among its arguments that moves; all others give shapes and numbers.
        index: of ``source``.
        modules: the root of ``call_module`` nodes.
        value_of: what any other node evaluates to for a batch of two.
    """

    def replace(argument: fx.Node) -> Any:
        return index if argument is source else value_of(argument)

    args, kwargs = fx.node.map_arg(node.args, replace), fx.node.map_arg(node.kwargs, replace)
    if node.op == "call_module":
        out = modules.get_submodule(str(node.target))(*args, **kwargs)
    elif node.op == "call_method":
        out = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        assert callable(node.target)
        out = node.target(*args, **kwargs)
    # Views want contiguous tensors, and whoever made this one contiguous did so by an operator of its own.
    return out.contiguous() if isinstance(out, torch.Tensor) else tuple(part.contiguous() for part in out)


@dataclass(frozen=True, eq=False)
class Selection:
    """Channels, rows and columns that a map selects, each an int64 index with -1 for padding, or None for all in order;
    see :class:`lightning_baqe.integer.nodes.Gather`."""

    channels: torch.Tensor | None
    rows: torch.Tensor | None
    columns: torch.Tensor | None

    @property
    def is_identity(self) -> bool:
        return self.channels is None and self.rows is None and self.columns is None

    def padding(self, shape: tuple[int, ...]) -> tuple[int, int, int, int] | None:
        """``(top, bottom, left, right)`` if the selection does nothing but pad a ``shape``, else None."""
        if self.channels is not None or len(shape) != 3:
            return None
        found: list[int] = []
        for index, size in ((self.rows, shape[1]), (self.columns, shape[2])):
            if index is None:
                found += [0, 0]
                continue
            inside = torch.nonzero(index >= 0).flatten()
            before, after = (int(inside[0]), len(index) - 1 - int(inside[-1])) if len(inside) else (0, 0)
            if index[before : len(index) - after].tolist() != list(range(size)):
                return None
            found += [before, after]
        return found[0], found[1], found[2], found[3]


def is_reshape(index: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the map leaves all elements in order."""
    return index.numel() == 2 * math.prod(shape) and torch.equal(index.flatten(), start(shape).flatten())


def select(index: torch.Tensor, shape: tuple[int, ...]) -> Selection | None:
    """The map as a selection, None if it is none or mixes the images of a batch.

    Args:
        index: ``(2, channels, height, width)`` or ``(2, features)``.
        shape: of the base value, of as many dimensions.
    """
    if index.ndim != len(shape) + 1:
        return None
    numbers = index[0].to(torch.int64) - 1
    absent = numbers < 0
    second = torch.where(absent, -1, numbers + math.prod(shape))
    if not torch.equal(second, index[1].to(torch.int64) - 1):
        return None
    coordinates = torch.unravel_index(numbers.clamp(min=0), shape)
    found = []
    for dim, coordinate in enumerate(coordinates):
        along = coordinate.masked_fill(absent, -1).movedim(dim, 0).flatten(1)
        picked = along.amax(1) if along.shape[1] else along.new_zeros(len(along))
        found.append(picked)
    expected_absent = torch.zeros_like(absent)
    for dim, picked in enumerate(found):
        expected_absent |= (picked < 0).reshape([-1 if i == dim else 1 for i in range(absent.ndim)])
    rebuilt = torch.zeros_like(numbers)
    for dim, picked in enumerate(found):
        rebuilt = rebuilt * shape[dim] + picked.clamp(min=0).reshape(
            [-1 if i == dim else 1 for i in range(absent.ndim)]
        )
    rebuilt = rebuilt.masked_fill(expected_absent, -1)
    if not torch.equal(rebuilt, torch.where(absent, -1, numbers)):
        return None
    parts = [None if p.tolist() == list(range(size)) else p for p, size in zip(found, shape, strict=True)]
    return Selection(*[*parts, None, None][:3])
