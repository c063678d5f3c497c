"""Files that are replaced in one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.files import Rows, make_folder, replace_file


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
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3 is no row .* remove that line"):
        rows.read()


def test_folders_are_made_and_nothing_is_left_in_them(tmp_path: Path) -> None:
    folder = tmp_path / "été = 1" / "deeper"
    assert make_folder(make_folder(folder, "run_dir"), "run_dir") == folder
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none"), Path("/proc")):
        with pytest.raises(ConfigError, match=f"run_dir={path} cannot be made or written .*give another run_dir"):
            make_folder(path, "run_dir")
