"""IDX, the format of MNIST and what followed it: bytes in an array of any number of dimensions.

Two zeros, the type (8: unsigned bytes), the number of dimensions, their sizes as big-endian 32-bit numbers, the bytes.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

from lightning_baqe.errors import DataError
from lightning_baqe.files import read_file, unpack_gzip

_UNSIGNED_BYTE = 8


def read_idx(path: Path, shape: tuple[int | None, ...], most_bytes: int) -> np.ndarray:
    """The array of a file, gzipped or not, as its name says (``.gz``).

    Args:
        path: the file.
        shape: the sizes that are wanted; None: any of 1 or more.
        most_bytes: that it may have, unpacked.

    Returns:
        uint8 array.

    Raises:
        DataError: it is missing, larger, damaged, or an array of another shape or type.
    """
    content = read_file(path, most_bytes)
    if path.suffix == ".gz":
        content = unpack_gzip(content, most_bytes, str(path))
    start = 4 + 4 * len(shape)
    if content[:4] != bytes((0, 0, _UNSIGNED_BYTE, len(shape))) or len(content) < start:
        raise DataError(f"{path} is no IDX file of {len(shape)} dimensions of bytes: take an undamaged copy.")
    sizes = struct.unpack(f">{len(shape)}I", content[4:start])
    if any(size < 1 or wanted not in (None, size) for size, wanted in zip(sizes, shape, strict=True)):
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise DataError(f"{path} holds {' x '.join(map(str, sizes))} bytes, wanted are {wanted}: take another file.")
    if len(content) - start != math.prod(sizes):
        raise DataError(
            f"{path} says that {math.prod(sizes)} bytes follow, and {len(content) - start} do: take an undamaged copy."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)
