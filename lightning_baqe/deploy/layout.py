"""How one image's values lie in memory: height x width x channels, with a halo, in one flat buffer.

Channels are innermost, so that four neighbouring ones are one 32-bit word, and a row of a convolution's window is one
contiguous run of ``kernel_w * channels`` values, a first layer's three channels included. The halo is the padding that
the reader wants: the writer fills it once, and no inner loop ever tests a bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VECTOR = 16  # stored channels are a multiple of this, but for a network's input
SLACK = 256  # readers of whole words may read, never use, so many values past the end


@dataclass(frozen=True)
class Layout:
    """One value's storage.

    Args:
        channels, height, width: its logical shape.
        stored: channels in memory, at least ``channels``.
        halo: rows and columns around it.
        dtype: ``uint8``, ``int8``, ``int32`` or ``float32``.
    """

    channels: int
    height: int
    width: int
    stored: int
    halo: int
    dtype: str

    @property
    def row(self) -> int:
        """Values from one row to the next."""
        return (self.width + 2 * self.halo) * self.stored

    @property
    def length(self) -> int:
        """Values in the buffer."""
        return (self.height + 2 * self.halo) * self.row + SLACK

    def origin(self, top: int = 0, left: int = 0) -> int:
        """Index of the value ``top`` rows and ``left`` columns before the first."""
        return (self.halo - top) * self.row + (self.halo - left) * self.stored

    def unpack(self, buffer: np.ndarray) -> np.ndarray:
        """A buffer's values, shape ``(channels, height, width)``."""
        h, w = self.height + 2 * self.halo, self.width + 2 * self.halo
        full = buffer[: h * w * self.stored].reshape(h, w, self.stored)
        inner = full[self.halo : h - self.halo, self.halo : w - self.halo, : self.channels]
        return np.ascontiguousarray(inner.transpose(2, 0, 1))


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
