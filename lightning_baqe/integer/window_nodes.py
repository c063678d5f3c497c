"""Pooling; see :mod:`lightning_baqe.integer.nodes`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from lightning_baqe.integer.base_nodes import Node
from lightning_baqe.integer.dyadic import Dyadic


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool(Node):
    """Max pooling of integers or floats; padding never wins. Args as torch: ``(height, width)`` pairs."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        value = values[0].to(torch.float64) if self.type.is_integer else values[0]
        out = functional.max_pool2d(value, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)
        return out.to(values[0].dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxWindows(Node):
    """Max pooling of integers or floats over any windows within the image, as adaptive pooling has them.

    Args:
        rows, columns: as in :class:`AvgPool`.
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return over_windows(values[0], self.rows, self.columns, torch.amax)


@dataclass(frozen=True, eq=False, kw_only=True)
class AvgPool(Node):
    """Integer average pooling: ``clip(requant(sum(q - input_zero_point)) + zero_point)``, summed over each window.

    A window is what lies within the image; padding adds 0 and is left out. The sum is exact in int32; the windows'
    sizes are part of the dyadic factors.

    Args:
        rows: int64, shape ``(out_height, 2)``, first row of each window and the one after its last.
        columns: int64, shape ``(out_width, 2)``, likewise.
        requant: one factor, or ``(out_height * out_width,)`` where windows count differently.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    requant: Dyadic
    input_zero_point: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        total = window_sums(values[0] - self.input_zero_point, self.rows, self.columns)
        return self.type.clip(self.requant.apply(total.flatten(2), 2).reshape(total.shape))


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatAvgPool(Node):
    """Float32 average pooling, ``sum * factor`` over each window as in :class:`AvgPool`.

    Args:
        rows, columns: as in :class:`AvgPool`.
        factors: float32, shape ``()`` or ``(out_height * out_width,)``.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    factors: torch.Tensor

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        total = window_sums(values[0], self.rows, self.columns)
        return (total.flatten(2) * self.factors).reshape(total.shape)


def window_sums(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Sums over windows; see :func:`over_windows`."""
    return over_windows(values, rows, columns, torch.sum)


def over_windows(
    values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, reduce: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """What ``reduce(values, dim)`` gives for windows of ``(n, channels, height, width)``, of the same type:
    ``(n, channels, out_height, out_width)``.

    ``rows`` and ``columns`` are int64, ``(out_height, 2)`` and ``(out_width, 2)``: first and one past the last of each
    window.
    """
    by_row = torch.stack([reduce(values[:, :, first:end], 2) for first, end in rows.tolist()], 2)
    return torch.stack([reduce(by_row[:, :, :, first:end], 3) for first, end in columns.tolist()], 3)
