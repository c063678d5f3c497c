"""The benchmark of workers in its smallest form: each trouble once, nothing lost, nothing done twice.

SIGKILL is in the tests of who counts as alive.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_baqe.benchmarks import postgres, workers
from lightning_baqe.benchmarks.damage import troubles
from lightning_baqe.benchmarks.damage.record_writers import are_right, write_at_once

SMALL = {"processes": 3, "trials": 12, "pause_s": 0.3, "initial": 12, "stop_s": 1.0}


def check(found: dict[str, Any], happened: int) -> None:
    assert (found["complete"], found["happened"]) == (12, happened)
    assert found["doubled"] == found["lost"] == found["others"] == found["gaps"] == 0
    assert len(found["by_worker"]) == 3


@pytest.mark.parametrize("trouble", ["stop", "hold"])
def test_a_stopped_worker_goes_on(trouble: str, tmp_path: Path) -> None:
    found = workers.run(tmp_path, f"sqlite:///{tmp_path / 'study.db'}", trouble, **SMALL)
    check(found, 1)
    assert found["interrupted"] == 0


@pytest.mark.skipif(troubles.missing() is not None, reason=str(troubles.missing()))
def test_the_clock_is_set_back(tmp_path: Path) -> None:
    found = workers.run(tmp_path, f"sqlite:///{tmp_path / 'study.db'}", "clock", **SMALL)
    check(found, 1)
    assert found["interrupted"] == 0


@pytest.mark.skipif(postgres.missing() is not None, reason=str(postgres.missing()))
def test_the_server_is_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(troubles, "DOWN_S", 0.5)
    with postgres.server() as server:
        check(workers.run(tmp_path, server.url, "restart", server=server, **SMALL), 2)


def test_writers_of_records(tmp_path: Path) -> None:
    found = write_at_once(tmp_path, writers=3, count=10)
    assert found["wanted"] == 30
    assert are_right({**found, "longest call s": 0.0})
    for wrong in ({"lost": 1}, {"doubled": 1}, {"highest peak": 29.0}, {"longest call s": 1.5}):
        assert not are_right({**found, "longest call s": 0.0, **wrong})


def test_the_command_prints_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    small = ["--trials", "4", "--pause", "0.1", "--initial", "4", "--json", str(path)]
    assert workers.main(["--trouble", "none", *small]) == 0
    (row,) = json.loads(path.read_text())["workers"]
    assert row["complete"] == 4
    assert "doubled" in capsys.readouterr().out
    assert not workers._is_right({**row, "lost": 1}, 4)
    assert not workers._is_right({**row, "doubled": 1}, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--storage", "postgresql"], "sqlite, postgres or a database's URL, got 'postgresql'"),
        (["--trouble", "restart"], "--trouble restart is for --storage postgres, got 'sqlite'"),
        (["--trouble", "clock"], "libfaketime is not installed: apt-get install faketime"),
    ],
)
def test_the_command_says_what_it_wants(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(troubles, "_library", lambda: None)
    with pytest.raises(SystemExit):
        workers.main(arguments)
    assert message in capsys.readouterr().err.replace("\n", " ")
