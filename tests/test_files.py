"""Files that are replaced in one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_baqe.files import replace_file


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
