"""Files that are read within bounds and replaced in one step."""

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path

import hypothesis.extra.numpy
import numpy as np
import pytest
from hypothesis import given

from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.files import Rows, kept, make_folder, parse_json, read_arrays, read_file, replace_file, unpack_gzip


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pareto.csv"
    path.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, b"new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["pareto.csv"]


def test_a_row_that_was_cut_off_is_none_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "folder" / "rows.jsonl")
    assert rows.read() == []
    rows.append({"a": 1})
    with rows.path.open("a") as file:
        file.write('{"a": {"net')
    assert rows.read() == [{"a": 1}]
    rows.append({"a": 2})
    assert rows.read() == [{"a": 1}, {"a": 2}]
    with rows.path.open("a") as file:
        file.write("{no row}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3, is not whole JSON"):
        rows.read()


def test_rows_are_found_by_their_key_as_json_holds_it(tmp_path: Path) -> None:
    rows, key = Rows(tmp_path / "rows.jsonl"), {"frozen": ("stem",), "by": {3: None}}
    for number in range(2):
        rows.append({"key": key, "number": number})
    rows.append({"key": {**key, "frozen": ()}})
    rows.append({"number": 2})
    assert [row["number"] for row in rows.of(key)] == [0, 1]
    assert rows.of({}) == []


def test_folders_are_made_and_nothing_is_left_in_them(tmp_path: Path) -> None:
    folder = tmp_path / "été = 1" / "deeper"
    assert make_folder(make_folder(folder, "run_dir"), "run_dir") == folder
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none"), Path("/proc")):
        with pytest.raises(ConfigError, match=f"run_dir={path} cannot be made or written .*give another run_dir"):
            make_folder(path, "run_dir")


def test_a_file_is_read_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(DataError, match="file has 5 bytes, files of its kind have at most 4"):
        read_file(path, 4)
    with path.open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="1099511627776 bytes"):
        read_file(path, 1 << 20)
    with pytest.raises(DataError, match="cannot be read"):
        read_file(tmp_path / "nowhere", 1)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match="folder, pipe or device"):
            read_file(other, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands there twice"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "1e999 is larger than any float"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "utf-8"),
        (b'"\\ud800"', "surrogates"),
        ("{}".encode("utf-16"), "utf-8"),
        (b"[1] 2", "Extra data"),
        (b"", "Expecting value"),
        (b"9" * 5000, "digits"),
    ],
)
def test_text_that_is_no_json(text: bytes, said: str) -> None:
    with pytest.raises(DataError, match=f"(?s)^the file is not whole JSON in UTF-8.*{said}"):
        parse_json(text, "the file")


def test_json_with_a_mark_and_constants() -> None:
    assert parse_json(b'\xef\xbb\xbf{"\xc3\xa9": [1.5, "\\ud83d\\ude00"]}', "x") == {"é": [1.5, "\U0001f600"]}
    assert parse_json("[NaN, Infinity]", "x", constants=True)[1] == float("inf")


def test_gzip_within_bounds() -> None:
    assert unpack_gzip(gzip.compress(b"abc"), 3, "x") == b"abc"
    with pytest.raises(DataError, match="more than 1000 bytes"):
        unpack_gzip(gzip.compress(bytes(10**7)), 1000, "x")
    for broken in (b"no gzip", gzip.compress(b"abc")[:-3]):
        with pytest.raises(DataError, match="damaged"):
            unpack_gzip(broken, 1000, "x")


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


@given(
    hypothesis.extra.numpy.arrays(
        hypothesis.extra.numpy.integer_dtypes(endianness="=") | hypothesis.extra.numpy.floating_dtypes(endianness="="),
        hypothesis.extra.numpy.array_shapes(min_dims=0, max_dims=3),
    )
)
def test_arrays_come_back(array: np.ndarray) -> None:
    found = read_arrays(npz(one=array, two=np.asfortranarray(array)), "x")
    assert list(found) == ["one", "two"]
    for copy in found.values():
        assert copy.dtype == array.dtype
        np.testing.assert_array_equal(copy, array)


def test_arrays_that_are_none() -> None:
    good = npz(a=np.arange(4), b=np.zeros(2, np.float32))
    header = good.replace(b"(4,)", b"(9,)")
    assert header != good
    for content in (b"", good[:-30], header, npz(a=np.array([{}], dtype=object)), npz(a=np.array(["text"]))):
        with pytest.raises(DataError, match=r"^x: .* is no whole array"):
            read_arrays(content, "x")
    packed = io.BytesIO()
    np.savez_compressed(packed, a=np.zeros(10**6))
    with pytest.raises(DataError, match="compressed"):
        read_arrays(packed.getvalue(), "x")


class TestKept:
    def test_it_is_made_once(self, tmp_path: Path) -> None:
        path, made = tmp_path / "folder" / "kept.json", []

        def make() -> list[float]:
            made.append(1)
            return [0.1, 2.0]

        signature = {"weights": "abc", "widths": (4, 8)}
        assert kept(path, signature, make) == kept(path, signature, make) == [0.1, 2.0]
        assert made == [1]

    def test_what_was_made_for_something_else_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "kept.json"
        kept(path, {"weights": "abc", "data": 1}, dict)
        with pytest.raises(ConfigError, match="was made for other weights, more than this run has: remove it"):
            kept(path, {"weights": "def", "data": 1, "more": 2}, dict)
        path.write_text("{}")
        with pytest.raises(DataError, match="none of this package's files"):
            kept(path, {}, dict)
        path.write_text('{"signature": {}, "con')
        with pytest.raises(DataError):
            kept(path, {}, dict)

    def test_numbers_that_are_not_finite_are_not_kept(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"kept\.json would hold numbers that are not finite"):
            kept(tmp_path / "kept.json", {}, lambda: [1.0, float("inf")])
        assert not list(tmp_path.iterdir())

    def test_nothing_is_left_where_making_fails(self, tmp_path: Path) -> None:
        def fail() -> None:
            raise ConfigError("nothing is made")

        with pytest.raises(ConfigError, match="nothing is made"):
            kept(tmp_path / "folder" / "kept.json", {}, fail)
        assert not list(tmp_path.iterdir())
