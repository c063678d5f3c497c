"""A disturbed search is looked at in full: what is lost, doubled, left over or alive is told. One is tried for real."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from lightning_baqe.benchmarks.damage import interruptions
from lightning_baqe.benchmarks.damage.disturbed import PHASES
from lightning_baqe.benchmarks.damage.interruptions import (
    SIGNALS,
    TRIALS,
    Place,
    Result,
    Undisturbed,
    Usual,
    compare,
    main,
    plans,
)

_DONE = {number: ("COMPLETE", {"bits": number, "schedules": {}}) for number in range(TRIALS)}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, _DONE, None),
        (_DONE, _DONE, None),
        ({0: ("RUNNING", {})}, {**_DONE, 9: ("FAIL", {})}, None),
        ({}, {0: _DONE[0]}, "1 complete"),
        (_DONE, {**_DONE, 1: ("COMPLETE", {"bits": 7, "schedules": {}})}, "trial 1 was complete"),
        ({}, {**_DONE, 1: _DONE[0]}, "twice"),
        ({}, {**_DONE, 8: ("FAIL", {}), 9: ("RUNNING", {})}, "[8, 9] were lost"),
    ],
)
def test_what_is_lost_or_doubled_is_told(before: dict, after: dict, said: str | None) -> None:
    result = Result("kill", "here")
    compare(result, before, after)
    if said is None:
        assert result.wrong == []
    else:
        assert said in " ".join(result.wrong)


def test_trials_are_read_from_a_copy(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place.trials() == {}
    (tmp_path / "run").mkdir()
    with closing(sqlite3.connect(tmp_path / "run" / "study.db")) as connection:
        connection.execute("CREATE TABLE trials (trial_id INTEGER, number INTEGER, state TEXT)")
        connection.execute("CREATE TABLE trial_user_attributes (trial_id INTEGER, key TEXT, value_json TEXT)")
        connection.execute("INSERT INTO trials VALUES (5, 0, 'COMPLETE'), (6, 1, 'RUNNING')")
        connection.execute("INSERT INTO trial_user_attributes VALUES (5, 'result', '{\"bits\": 1}')")
        connection.commit()
    assert place.trials() == {0: ("COMPLETE", {"bits": 1}), 1: ("RUNNING", {})}


def test_processes_that_live_on_are_told_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruptions, "ENDED_S", 0.2)
    environment = {**os.environ, interruptions.MARK: str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", "input()"], env=environment, stdin=subprocess.PIPE)
    assert len(Place(tmp_path).alive()) == 1
    process.communicate()
    assert process.returncode == -9
    assert Place(tmp_path).alive() == []


def test_every_phase_has_its_turn(tmp_path: Path) -> None:
    import numpy as np

    usual = Usual(100, {phase: [1.0, 2.0] for phase in PHASES}, 20.0)
    undisturbed = Undisturbed(usual, usual, tmp_path, frozenset())
    for way in (*SIGNALS, "full"):
        assert [plan.phase for _, plan, _ in plans(way, undisturbed, None, np.random.default_rng(0))] == list(PHASES)
    assert [plan.event for _, plan, _ in plans("events", undisturbed, 3, np.random.default_rng(0))] == [0, 49, 99]
    assert len(plans("random", undisturbed, None, np.random.default_rng(0))) == 30


@pytest.mark.slow
def test_one_search_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--ways", "events", "--most", "1", "--jobs", "1"]) == 0
    assert "1 │" in capfd.readouterr().out


@pytest.mark.slow
def test_all() -> None:
    assert main([]) == 0
