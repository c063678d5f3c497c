"""IDX files: what is written is read, and what is damaged is refused by name."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from small_data import idx

from lightning_baqe.data.idx import read_idx
from lightning_baqe.errors import DataError

MOST = 1 << 20


@given(array=arrays.arrays(np.uint8, arrays.array_shapes(max_side=5)), packed=st.booleans())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, packed: bool) -> None:
    path = tmp_path_factory.mktemp("idx") / ("a.gz" if packed else "a")
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    assert np.array_equal(read_idx(path, (None,) * array.ndim, MOST), array)
    assert np.array_equal(read_idx(path, array.shape, MOST), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no IDX file of 2 dimensions"),
        (idx(np.zeros((2, 3, 4)))[:9], "is no IDX file of 2 dimensions"),
        (idx(np.zeros(6)), "is no IDX file of 2 dimensions"),
        (b"\0\0\x0d\x02" + bytes(8), "is no IDX file of 2 dimensions"),
        (idx(np.zeros((2, 4))), r"holds 2 x 4 bytes, wanted are any x 3"),
        (idx(np.zeros((0, 3))), r"holds 0 x 3 bytes"),
        (idx(np.zeros((2, 3)))[:-1], "says that 6 bytes follow, and 5 do"),
        (idx(np.zeros((2, 3))) + b"0", "says that 6 bytes follow, and 7 do"),
        (b"\0\0\x08\x02\xff\xff\xff\xff\0\0\0\x03", "says that 12884901885 bytes follow, and 0 do"),
    ],
)
def test_what_is_damaged_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path} {message}"):
        read_idx(path, (None, 3), MOST)


def test_sizes_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(bytes(MOST + 1)))
    with pytest.raises(DataError, match="unpacks to more than"):
        read_idx(path, (None, 3), MOST)
