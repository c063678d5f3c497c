"""Operators that move elements and compute none; see :mod:`lightning_baqe.integer.nodes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_baqe.errors import ConfigError
from lightning_baqe.integer.base_nodes import Node


@dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Node):
    """Channels of all inputs, one after the other: floats, or integers on one grid (HAWQ-V3 eq. 10, rescaled)."""

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return torch.cat(values, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Gather(Node):
    """Select channels, rows and columns: ``out[c, y, x] = in[channels[c], rows[y], columns[x]]``.

    Slices, splits, channel shuffles, nearest upsampling and padding are all of this kind. An index of -1 stands for the
    real value 0: the zero point of integers.

    Args:
        channels, rows, columns: int64 of the output's sizes, or None for all in order. Values of shape ``(features,)``
            have channels only.
    """

    channels: torch.Tensor | None
    rows: torch.Tensor | None
    columns: torch.Tensor | None

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        absent = self.type.zero_point if self.type.is_integer else 0
        return select_elements(values[0], (self.channels, self.rows, self.columns), absent)


@dataclass(frozen=True, eq=False, kw_only=True)
class Flatten(Node):
    """``(c, h, w)`` to ``(c * h * w,)``, channels outermost as in torch; or ``(c,)`` to ``(c, 1, 1)``."""

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0].reshape(len(values[0]), *self.type.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Move(Node):
    """Any rearrangement: permutations of dimensions, pixel shuffles, other shapes. :class:`Gather` and
    :class:`Flatten` say less and are faster where they do.

    Args:
        index: int64, of the output's shape: the number of an element of the input, in C order of its shape; or -1 for
            the real value 0, the zero point of integers.

    Raises:
        ConfigError: the index is not of the output's shape.
    """

    index: torch.Tensor

    def __post_init__(self) -> None:
        if self.index.dtype != torch.int64 or tuple(self.index.shape) != self.type.shape:
            raise ConfigError(
                f"move {self.name!r}: its index must be int64 of its type's shape {self.type.shape}, got "
                f"{self.index.dtype} of shape {tuple(self.index.shape)}"
            )

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        absent = self.type.zero_point if self.type.is_integer else 0
        found = select_elements(values[0].flatten(1), [self.index.flatten()], absent)
        return found.reshape(len(found), *self.type.shape)


def select_elements(values: torch.Tensor, indices: Sequence[torch.Tensor | None], absent: float) -> torch.Tensor:
    """Elements of ``(n, ...)`` by one index for each further dimension, as :class:`Gather`; -1 gives ``absent``."""
    for dim, index in enumerate(indices, 1):
        if index is not None:
            values, outside = values.index_select(dim, index.clamp(min=0)), index < 0
            if bool(outside.any()):
                values.masked_fill_(outside.reshape([-1 if i == dim else 1 for i in range(values.ndim)]), absent)
    return values
