"""The database of a study: what keeps it from being opened is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_baqe.benchmarks.damage.disturbed import fill
from lightning_baqe.benchmarks.damage.interruptions import small_disk
from lightning_baqe.errors import ConfigError
from lightning_baqe.runs.study_storage import open_storage


@pytest.mark.parametrize("url", ["mysql://host/study", "redis://host"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"SQLite file .* or PostgreSQL"):
        open_storage(url)


def test_a_damaged_database_says_how_to_recover(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    with pytest.raises(ConfigError, match=r"cannot be opened .*search\.recover=true"):
        open_storage(f"sqlite:///{tmp_path / 'study.db'}")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_is_not_called_damage(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk"):
        fill(tmp_path / "disk" / "filler")
        with pytest.raises(ConfigError, match=r"cannot be opened .*is full: free some space") as caught:
            open_storage(f"sqlite:///{tmp_path / 'disk' / 'study.db'}")
    assert "recover" not in str(caught.value)
