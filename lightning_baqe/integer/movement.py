"""Operators that only move elements, composed as index maps and turned into one IR node where a value is read.

Each such operator (views, transpositions, slices, splits, shuffles, padding, nearest upsampling) is executed once, on a
tensor of element numbers. What comes out says where every element comes from, whatever the chain of operators was.

| symbol | meaning | shape |
| --- | --- | --- |
| index | 1 + element number in the base value, 0 for padding, for a batch of two | ``(2, *shape)``; ``(2 k, ...)`` \
where the network merges the batch with another dimension |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from lightning_baqe.errors import UnsupportedModelError

Index = torch.Tensor | tuple[Any, ...]
# Channels, rows and columns, as in lightning_baqe.integer.nodes.Gather.
Selection = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def start(shape: tuple[int, ...]) -> torch.Tensor:
    """The index map of a value that nothing moved."""
    return (torch.arange(2 * math.prod(shape), dtype=torch.float64) + 1).reshape(2, *shape)


def of_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What a shape for a batch of two is for one image."""
    return shape[1:] if shape[0] == 2 else (shape[0] // 2, *shape[1:])


def stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which an IR node holds a tensor of one image: one dimension or three, elements in the same order."""
    if len(shape) == 2:
        return shape[0], 1, shape[1]
    return shape or (1,) if len(shape) < 3 else (math.prod(shape[:-2]), *shape[-2:])


def from_one(index: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The map for one image, from 0 on and -1 for padding; ``shape`` is the base value's.

    Raises:
        UnsupportedModelError: it mixes the images of a batch.
    """
    first, second = index[0].to(torch.int64) - 1, index[1].to(torch.int64) - 1
    if not torch.equal(torch.where(first < 0, first, first + math.prod(shape)), second):
        raise UnsupportedModelError(
            "it mixes the images of a batch, which no compiled network does; let one dimension alone hold the batch, "
            "and no operator join or add along it"
        )
    return first


def features_first(index: torch.Tensor) -> torch.Tensor:
    """``(2, ..., features)`` as ``(2, features, rows, columns)``: what a matrix product over the last dimension reads
    as a 1x1 convolution.
    """
    if index.ndim > 2 and len(index) % 2 == 0:
        moved = index.reshape(2, -1, *index.shape[-2:])
    else:
        moved = index.reshape(2, 1, -1, index.shape[-1])
    return moved.movedim(-1, 1)


def rows_by_image(index: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The numbers of each image's rows, ``(2, rows)``, of a map ``(..., features)`` whose batch may lie anywhere; None
    where it is the outermost dimension, or rows belong to no single image.
    """
    owners = (index.flatten(0, -2).amax(-1) > math.prod(shape)).to(torch.int64)
    order = owners.argsort(stable=True)
    if len(order) % 2 or int(owners.sum()) * 2 != len(order) or torch.equal(order, torch.arange(len(order))):
        return None
    return order.reshape(2, -1)


def features_last(shape: tuple[int, ...], wanted: tuple[int, ...]) -> torch.Tensor:
    """The index map of a base value ``(features, rows, columns)`` that is read as ``wanted``, for a batch of two, whose
    last dimension are the features.
    """
    return start(shape).movedim(1, -1).reshape(wanted)


def is_bijection(index: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a map has each element of the base value exactly once."""
    return index.numel() == 2 * math.prod(shape) and bool(
        torch.equal(index.flatten().sort()[0], start(shape).flatten())
    )


def spread(index: torch.Tensor, full: torch.Size) -> torch.Tensor:
    """A map, broadcast to the shape ``full`` of a batch of two.

    Args:
        index: of as many dimensions, or ``(2, *shape)`` where ``shape`` broadcasts to what one image has of ``full``,
            as constants have it.
    """
    if len(index) != 2 or (index.ndim == len(full) and full[0] == 2):
        return index.expand(full)
    return torch.cat([image.expand(full[0] // 2, *full[1:]) for image in index])


def in_frame(index: torch.Tensor, leader: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A map, brought into the order of the base value of another one.

    Args:
        index: of any value, broadcast to the shape of ``leader``.
        leader: a bijection from a base value of the shape ``shape``.

    Returns:
        ``(2, *shape)``.
    """
    out = torch.empty_like(index).flatten()
    out[leader.flatten().to(torch.int64) - 1] = index.expand(leader.shape).flatten()
    return out.reshape(2, *shape)


def move(node: fx.Node, source: fx.Node, index: Index, modules: nn.Module, values: Mapping[fx.Node, Any]) -> Index:
    """The index map after one movement operator.

    Args:
        node: the operator.
        source: the tensor among its arguments that moves; all others give shapes and numbers.
        index: of ``source``.
        modules: the root of ``call_module`` nodes.
        values: what any other node evaluates to for a batch of two.
    """
    values = {**values, source: index}
    args, kwargs = fx.node.map_arg(node.args, values.__getitem__), fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        out = modules.get_submodule(str(node.target))(*args, **kwargs)
    elif node.op == "call_method":
        out = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        assert callable(node.target)
        out = node.target(*args, **kwargs)
    # Views want contiguous tensors, and whoever made this one contiguous did so by an operator of its own.
    return out.contiguous() if isinstance(out, torch.Tensor) else tuple(part.contiguous() for part in out)


def is_reshape(index: Index | None, shape: tuple[int, ...]) -> bool:
    """Whether the map, if there is one, leaves all elements in order."""
    if not isinstance(index, torch.Tensor):
        return index is None
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
    found, wanted, outside = [], torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.bool)
    for dim, coordinate in enumerate(torch.unravel_index(numbers.clamp(min=0), shape)):
        along = coordinate.masked_fill(numbers < 0, -1).movedim(dim, 0).unsqueeze(-1).flatten(1)
        places = along.amax(1) if along.shape[1] else along.new_zeros(len(along))
        found.append(places)
        across = places.reshape([-1 if other == dim else 1 for other in range(len(shape))])
        wanted, outside = wanted + across * math.prod(shape[dim + 1 :]), outside | (across < 0)
    both = torch.stack([wanted, wanted + math.prod(shape)]).masked_fill(outside, -1)
    if not torch.equal(both + 1, index.to(torch.int64)):
        return None
    parts = [None if p.tolist() == list(range(size)) else p for p, size in zip(found, shape, strict=True)]
    channels, rows, columns = [*parts, None, None][:3]
    return channels, rows, columns


def padding(index: Index | None, shape: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """``(top, bottom, left, right)`` if the map does nothing but pad an image of a ``shape``, else None."""
    selection = select(index, shape) if isinstance(index, torch.Tensor) and len(shape) == 3 else None
    if selection is None or selection[0] is not None:
        return None
    found: list[int] = []
    for picked, size in zip(selection[1:], shape[1:], strict=True):
        wanted = list(range(size)) if picked is None else picked.tolist()
        inside = [place for place, source in enumerate(wanted) if source >= 0] or [len(wanted) - 1]
        before, after = inside[0], len(wanted) - 1 - inside[-1]
        if wanted[before : len(wanted) - after] != list(range(size)):
            return None
        found += [before, after]
    return found[0], found[1], found[2], found[3]


def dilate(index: torch.Tensor, layer: nn.ConvTranspose2d) -> torch.Tensor:
    """The map of what a convolution of stride 1 with the turned kernel reads to compute a transposed one: zeros between
    the pixels, and as many around them as the kernel reaches; ``(2, channels, height, width)``.
    """
    for dim in (2, 3):
        at = dim - 2
        stride, dilation, kernel = layer.stride[at], layer.dilation[at], layer.kernel_size[at]
        padding, more = layer.padding[at], layer.output_padding[at]
        size = index.shape[dim]
        shape = list(index.shape)
        shape[dim] = (size - 1) * stride + 1
        out = index.new_zeros(shape)
        out.index_copy_(dim, torch.arange(size) * stride, index)
        around = dilation * (kernel - 1) - int(padding)
        ends = [around, around + more]
        index = functional.pad(out, ends if dim == 3 else [0, 0, *ends])
    return index
