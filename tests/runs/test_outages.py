"""A study whose database goes away in the middle of a step: the step is begun anew, and does nothing twice."""

from __future__ import annotations

import sqlite3
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lightning_baqe.benchmarks import postgres, workers
from lightning_baqe.errors import StorageError
from lightning_baqe.runs.study import AGAIN, FLOAT_FIGURES, INTERRUPTED, OWNER, RESULT, SearchStudy
from lightning_baqe.runs.summary import Baseline, Trial
from lightning_baqe.search import BaqeSampler
from lightning_baqe.search.patience import ConnectionLost

ABOUT = {"recipe": "workers", "model": "none", "dataset": "none"}
SPACE = workers.made_up_space()


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_baqe.search.patience._PAUSE_S", 0.01)


def opened(folder: Path, storage: str | None = None, sampler: optuna.samplers.BaseSampler | None = None) -> SearchStudy:
    study = SearchStudy(folder, storage, ABOUT, name=None if storage is None else "outages")
    study.open(SPACE, sampler or BaqeSampler(0, "paper", SPACE.distributions, SPACE.candidates, 100, 100))
    if study.float_result is None:
        study.keep(FLOAT_FIGURES, workers.FLOAT.record())
    return study


def entry_of(trial: optuna.Trial) -> Trial:
    return Trial(number=trial.number, **workers.made_up_figures(*SPACE.point(trial.params)))


class Losing:
    """Loses the connection at one commit of what was written; that is kept, or it is not."""

    def __init__(self, study: SearchStudy, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        dialect, here = study._storage.engine.dialect, threading.get_ident()
        commit = dialect.do_commit

        def lose(connection: Any) -> None:
            if connection.in_transaction and threading.get_ident() == here:
                self.left -= 1
                if self.left == 0:
                    if keeps:
                        commit(connection)
                    raise ConnectionLost("no reply")
            commit(connection)

        monkeypatch.setattr(dialect, "do_commit", lose)


@pytest.mark.parametrize("sampler", ["baqe", "random"])
@pytest.mark.parametrize("keeps", [True, False])
def test_wherever_the_connection_is_lost_nothing_is_lost_or_doubled(
    keeps: bool, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = opened(tmp_path, sampler=optuna.samplers.RandomSampler(seed=0) if sampler == "random" else None)
    losing, rounds = Losing(study, keeps, monkeypatch), 0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        while losing.left <= 0:
            rounds += 1
            losing.left = rounds  # the first commit of the first round, the second one of the second, and so on
            assert study.claim_baseline([f"baseline {n}" for n in range(rounds)]) == f"baseline {rounds - 1}"
            study.add_baseline(Baseline(name=f"baseline {rounds - 1}", **vars(workers.FLOAT)))
            asked = study.ask()
            assert asked is not None
            study.tell(asked[0], entry_of(asked[0]))
    losing.left = 0
    assert rounds > 15
    assert {str(one.message).partition(" does not answer")[1] for one in told} == {" does not answer"}
    trials = study._in_state()
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(complete) == rounds
    assert max(Counter(str(trial.params) for trial in complete).values()) == 1
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.FAIL}
    queued = {trial.user_attrs.get(AGAIN) for trial in trials}
    for trial in trials:
        if trial.state == TrialState.FAIL:
            assert trial.user_attrs[RESULT]["error"] == INTERRUPTED
            assert (study._point(trial) is None) == (trial.number not in queued)
    assert Counter(entry.name for entry in study.baselines) == {f"baseline {n}": 1 for n in range(rounds)}
    study.close()


def test_a_point_that_was_taken_from_the_queue_and_not_begun_is_not_lost(tmp_path: Path) -> None:
    """Its worker dies between the first and the last thing that it writes of the trial."""
    study = opened(tmp_path)
    point = {name: d.choices[0] for name, d in SPACE.distributions.items()}  # type: ignore[attr-defined]
    study._study.enqueue_trial(point)
    taken = study._study.ask()
    assert taken.params == {}
    again = study.ask()
    assert again is not None
    assert again[0].params == point
    assert again[0].user_attrs[AGAIN] == taken.number
    study.close()


def test_a_point_that_was_proposed_and_not_suggested_is_not_lost(tmp_path: Path) -> None:
    study = opened(tmp_path)
    lost = study._study.ask()
    proposed = study._sampler.infer_relative_search_space(study._study, lost._get_latest_trial())
    point = study._sampler.sample_relative(study._study, lost._get_latest_trial(), proposed)
    again = study.ask()
    assert again is not None
    assert again[0].params == point
    study.close()


def test_what_is_given_back_and_taken_by_another_is_left_to_it(tmp_path: Path) -> None:
    one, two = opened(tmp_path), opened(tmp_path)
    asked = one.ask()
    assert asked is not None
    one.give_back(asked[0])
    taken = two.ask()
    assert taken is not None
    one.give_back(asked[0])  # begun anew, since the reply was lost
    assert two._storage.get_trial(two._id(taken[0])).state == TrialState.RUNNING
    assert taken[0].user_attrs[OWNER] == two._worker.id
    one.close()
    two.close()


def test_a_study_that_another_process_keeps_locked_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_baqe.runs.study_storage._BUSY_S", 0.05)
    study = opened(tmp_path)
    with closing(sqlite3.connect(tmp_path / "study.db", isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        freed = threading.Timer(0.5, other.close)  # somebody stopped it, and lets it go on
        freed.start()
        with pytest.warns(UserWarning, match=r"does not answer \(database is locked\)"):
            asked = study.ask()
        freed.join()
    assert asked is not None
    study.tell(asked[0], entry_of(asked[0]))
    assert study.complete_count == 1
    study.close()


@pytest.fixture
def server() -> Iterator[postgres.Server]:
    if (lacking := postgres.missing()) is not None:
        pytest.skip(lacking)
    with postgres.server() as found:
        yield found


def test_a_server_that_is_restarted(server: postgres.Server, tmp_path: Path) -> None:
    study = opened(tmp_path, server.url)
    asked = study.ask()
    assert asked is not None
    server.restart()  # in the middle of a trial: nobody notices
    study.tell(asked[0], entry_of(asked[0]))
    calls: list[str] = []

    def step() -> int:
        calls.append("begun")
        study.keep("first", len(calls))
        if len(calls) < 3:
            server.restart(("fast", "immediate")[len(calls) - 1])
        study.keep("last", len(calls))  # not without the lock
        return len(calls)

    with pytest.warns(UserWarning, match="does not answer"):
        assert study.alone(step) == 3
    assert (study.kept("first"), study.kept("last")) == (3, 3)

    def end() -> str:
        calls.append("ended")
        if calls.count("ended") == 1:
            server.restart()
            raise LookupError("whatever came of a step whose lock was lost")
        return "done"

    with pytest.warns(UserWarning, match="does not answer"):
        assert study.alone(end) == "done"
    restarting = threading.Thread(target=server.restart, args=("immediate", 1.0))
    restarting.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            asked = study.ask()
            assert asked is not None
            study.tell(asked[0], entry_of(asked[0]))
    restarting.join()
    assert study.complete_count == 21
    study.close()


def test_an_interruption_is_one_though_the_lock_is_lost(server: postgres.Server, tmp_path: Path) -> None:
    study = opened(tmp_path, server.url)

    def step() -> None:
        server.restart()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.alone(step)
    study.close()


def test_a_server_that_stays_away(server: postgres.Server, tmp_path: Path) -> None:
    study = opened(tmp_path, server.url)
    study._patience._limit_s = 0.2
    server.call("pg_ctl", "-D", server.data, "-w", "-m", "fast", "stop")
    with (
        pytest.warns(UserWarning, match="does not answer"),
        pytest.raises(StorageError, match="start the same command again"),
    ):
        _ = study.complete_count
    server.start()
    study.close()
