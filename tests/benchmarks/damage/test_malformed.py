"""Spoiled files of every format are refused by our errors; the whole table is `-m slow`."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_baqe.benchmarks.damage.formats import FORMATS
from lightning_baqe.benchmarks.damage.malformed import main, rows_of
from lightning_baqe.benchmarks.damage.watched import RIGHT, outcome_of
from lightning_baqe.errors import DataError


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_few_of_each(name: str) -> None:
    rows = rows_of(name, 12, seed=0)
    assert len(rows) == 12
    assert [row for row in rows if row[1] not in RIGHT] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FORMATS))
def test_all(name: str) -> None:
    rows = rows_of(name, None, seed=1)
    assert [row for row in rows if row[1] not in RIGHT] == []


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--formats", "rows", "--most", "3"]) == 0
    assert "3 spoiled files" in capsys.readouterr().out


def test_each_outcome_is_told(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise DataError("no")

    def fail(folder: Path) -> None:
        raise ValueError("no")

    def take(folder: Path) -> None:
        raise MemoryError

    for read, wanted in ((refuse, "refused"), (fail, "traceback"), (take, "hang"), (lambda folder: None, "read")):
        assert outcome_of(read, tmp_path)[0] == wanted
