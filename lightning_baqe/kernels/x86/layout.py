"""How one image's values lie in memory: height x width x channels, with a halo, in one flat buffer.

Channels are innermost, so that four neighbouring ones are one 32-bit word, and a row of a convolution's window is one
contiguous run of ``kernel_w * channels`` values, a first layer's three channels included. The halo is the padding that
the reader wants: the writer fills it once, and no inner loop ever tests a bound.

A value may lie in a slice of a larger one's buffer: a concatenation's inputs are written where it wants them. Rows and
pixels are then as far apart as the larger one's, and each writer fills the halo of its own channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

VECTOR = 16  # stored channels are a multiple of this, but for a network's input
SLACK = 256  # readers of whole words may read, never use, so many values past the end


@dataclass(frozen=True)
class Layout:
    """One value's storage.

    Args:
        channels, height, width: its logical shape.
        stored: channels in memory, at least ``channels``.
        halo: rows above and below it, columns on its left and right.
        dtype: ``uint8``, ``int8``, ``int32`` or ``float32``.
        shared: stored channels of the buffer that it is a slice of; 0: it has a buffer of its own.
        first: its first channel in that buffer.
    """

    channels: int
    height: int
    width: int
    stored: int
    halo: tuple[int, int]
    dtype: str
    shared: int = 0
    first: int = 0

    @property
    def pitch(self) -> int:
        """Values from one pixel to the next."""
        return self.shared or self.stored

    @property
    def full(self) -> tuple[int, int]:
        """Height and width with the halo."""
        return self.height + 2 * self.halo[0], self.width + 2 * self.halo[1]

    @property
    def row(self) -> int:
        """Values from one row to the next."""
        return self.full[1] * self.pitch

    @property
    def length(self) -> int:
        """Values in the buffer."""
        return self.full[0] * self.row + SLACK

    def origin(self, top: int = 0, left: int = 0) -> int:
        """Index of the value ``top`` rows and ``left`` columns before the first."""
        return (self.halo[0] - top) * self.row + (self.halo[1] - left) * self.pitch + self.first

    def part(self, first: int, channels: int) -> Layout:
        """The layout of so many of its channels, from ``first`` on, in the same buffer."""
        stored = stored_channels(channels)
        return replace(self, channels=channels, stored=stored, shared=self.pitch, first=self.first + first)

    @property
    def alone(self) -> Layout:
        """The same in a buffer of its own."""
        return replace(self, shared=0, first=0)

    def places(self) -> np.ndarray:
        """Index of every value in the buffer, int64, shape ``(channels, height, width)``."""
        channels, rows, columns = np.ogrid[: self.channels, : self.height, : self.width]
        return np.asarray(self.origin() + rows * self.row + columns * self.pitch + channels, np.int64)

    def pack(self, values: np.ndarray, pad: int) -> np.ndarray:
        """A buffer of its own that holds values of shape ``(channels, height, width)``; ``pad`` fills the halo."""
        full = np.full((*self.full, self.stored), pad, self.dtype)
        full[..., self.channels :] = 0
        buffer = np.concatenate([full.ravel(), np.zeros(SLACK, self.dtype)])
        buffer[self.places()] = values
        return buffer

    def unpack(self, buffer: np.ndarray) -> np.ndarray:
        """A buffer's values, shape ``(channels, height, width)``."""
        return np.ascontiguousarray(buffer[self.places()])


def as_image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """``(features,)`` as ``(features, 1, 1)``, ``(channels, length)`` as ``(channels, 1, length)``; images stay."""
    if len(shape) == 2:
        return shape[0], 1, shape[1]
    channels, height, width = shape if len(shape) == 3 else (*shape, 1, 1)
    return channels, height, width


def storage_dtype(low: int, high: int) -> str:
    """The narrowest storage type that holds ``low..high``: a value's range is the graph's, its type is ours."""
    if low >= 0 and high <= 255:
        return "uint8"
    if low >= -128 and high <= 127:
        return "int8"
    return "int32"


def stored_channels(channels: int) -> int:
    """Channels rounded up to whole vectors."""
    return -(-channels // VECTOR) * VECTOR
