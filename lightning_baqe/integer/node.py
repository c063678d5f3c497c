"""What all operators of the integer graph share: the base class, the type of a value, sums over windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class TensorType:
    """The type of one value, without the batch dimension.

    Args:
        shape: ``(channels, height, width)`` or ``(features,)``.
        low, high: inclusive integer range; both None for a float32 value.
        scale, zero_point: the real value is ``scale * (q - zero_point)``; scale 0 where it differs by channel.
    """

    shape: tuple[int, ...]
    low: int | None = None
    high: int | None = None
    scale: float = 1.0
    zero_point: int = 0

    @property
    def is_integer(self) -> bool:
        return self.low is not None


@dataclass(frozen=True, eq=False, kw_only=True)
class Node(ABC):
    """Base of all operators.

    Args:
        name: unique in its graph.
        inputs: names of the nodes whose outputs it reads.
        type: the type of its output.
    """

    kind: ClassVar[str]
    is_float: ClassVar[bool] = False  # does float arithmetic on values inside the network
    name: str
    inputs: tuple[str, ...]
    type: TensorType

    @abstractmethod
    def run(self, *values: torch.Tensor) -> torch.Tensor:
        """Compute the output, shape ``(n, *type.shape)``."""


def per_channel(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Numbers by channel, shape ``()`` or ``(channels,)``, which broadcast to ``like``, ``(n, channels, ...)``."""
    return values if values.ndim == 0 else values.reshape(1, -1, *[1] * (like.ndim - 2))


def window_sums(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Sums over windows.

    Args:
        values: ``(n, channels, height, width)``.
        rows: int64, ``(out_height, 2)``, first and one past the last of each window.
        columns: likewise, ``(out_width, 2)``.

    Returns:
        ``(n, channels, out_height, out_width)``, of the same type.
    """
    by_row = torch.stack([values[:, :, first:end].sum(2) for first, end in rows.tolist()], 2)
    return torch.stack([by_row[:, :, :, first:end].sum(3) for first, end in columns.tolist()], 3)
