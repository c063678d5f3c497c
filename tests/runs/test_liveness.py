"""Several workers on one study: real processes with SIGKILL, and who counts as alive."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

from lightning_baqe.benchmarks import postgres, workers
from lightning_baqe.errors import ConfigError
from lightning_baqe.runs.liveness import PREFIX, Worker, process_start
from lightning_baqe.runs.study import AGAIN, FLOAT_FIGURES, INTERRUPTED, OWNER, SearchStudy
from lightning_baqe.runs.summary import Trial
from lightning_baqe.scratch import process_table
from lightning_baqe.search import BaqeSampler

ABOUT = {"recipe": "workers", "model": "none", "dataset": "none"}
SPACE = workers.made_up_space()


def check_four_workers(folder: Path, storage: str) -> None:
    found = workers.run(folder, storage, "kill", trials=40, pause_s=0.2, initial=38)
    assert found["complete"] == 40
    assert found["doubled"] == found["lost"] == found["others"] == found["gaps"] == 0
    assert found["happened"]
    assert found["interrupted"] <= 1  # 0: on a busy machine it told its figures just before
    assert sum(found["by_worker"]) <= 40  # the dead one tells nothing
    assert len(found["by_worker"]) == 3
    summary = workers.SearchStudy(folder, storage, ABOUT, name="workers")
    states = [entry.state for entry in summary.summary().trials]
    summary.close()
    assert states.count("complete") == 40
    assert states.count("failed") == found["interrupted"]


def test_four_workers_and_sqlite(tmp_path: Path) -> None:
    check_four_workers(tmp_path, f"sqlite:///{tmp_path / 'study.db'}")


@pytest.mark.skipif(postgres.missing() is not None, reason=str(postgres.missing()))
def test_four_workers_and_postgresql(tmp_path: Path) -> None:
    with postgres.server() as server:
        check_four_workers(tmp_path, server.url)


def open_study(folder: Path, sampler: optuna.samplers.BaseSampler | None = None) -> SearchStudy:
    study = SearchStudy(folder, None, ABOUT)
    space = SPACE.distributions
    study.open(SPACE, sampler or BaqeSampler(0, "paper", space, SPACE.candidates, 20, 50))
    if study.float_result is None:
        study.keep(FLOAT_FIGURES, workers.FLOAT.record())
    return study


@pytest.fixture
def studies(tmp_path: Path) -> Iterator[tuple[SearchStudy, SearchStudy]]:
    """Two workers in one process."""
    found = open_study(tmp_path), open_study(tmp_path)
    yield found
    for study in found:
        study.close()


def entry_of(trial: optuna.Trial, **more: Any) -> Trial:
    return Trial(number=trial.number, **workers.made_up_figures(*SPACE.point(trial.params)), **more)


def test_no_trial_beyond_those_that_are_wanted(studies: tuple[SearchStudy, SearchStudy]) -> None:
    one, two = studies
    first, second = one.ask(2), two.ask(2)
    assert first is not None
    assert second is not None
    assert one.ask(2) is None  # both run
    one.tell(first[0], entry_of(first[0]))
    assert one.ask(2) is None
    two.tell(second[0], entry_of(second[0], error="failed by itself"))
    third = one.ask(2)
    assert third is not None
    points = [trial.params for trial, _ in (first, second, third)]
    assert all(points.count(point) == 1 for point in points)


def test_what_a_dead_worker_had_begun_is_begun_again(studies: tuple[SearchStudy, SearchStudy]) -> None:
    one, two = studies
    assert one.claim_baseline(["w8a8", "w4a4"]) == "w8a8"
    assert two.claim_baseline(["w8a8", "w4a4"]) == "w4a4"
    assert two.claim_baseline(["w8a8", "w4a4"]) is None
    asked = one.ask()
    assert asked is not None
    one.close()
    assert two.claim_baseline(["w8a8", "w4a4"]) == "w8a8"
    again = two.ask()
    assert again is not None
    assert again[0].params == asked[0].params
    assert again[0].user_attrs[AGAIN] == asked[0].number
    (dead,) = [entry for entry in two.summary().trials if entry.state == "failed"]
    assert dead.error == INTERRUPTED
    with pytest.warns(UserWarning, match="was given to another worker"):
        one.tell(asked[0], entry_of(asked[0]))  # it was not dead after all: its figures come too late
    two.tell(again[0], entry_of(again[0]))
    assert two.complete_count == 1
    assert [entry.error for entry in two.trials() if entry.state == "failed"] == [INTERRUPTED]


def test_a_trial_that_is_given_back_keeps_its_number_and_point(studies: tuple[SearchStudy, SearchStudy]) -> None:
    one, two = studies
    asked = one.ask()
    assert asked is not None
    one.give_back(asked[0])
    again = two.ask()
    assert again is not None
    assert (again[0].number, again[0].params) == (asked[0].number, asked[0].params)


def test_samplers_that_repeat_themselves_are_asked_again(tmp_path: Path) -> None:
    class Stubborn(optuna.samplers.RandomSampler):
        """Each point twice."""

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return distribution.choices[(trial.number // 2) % len(distribution.choices)]

    study = open_study(tmp_path, Stubborn(seed=0))
    found = [study.ask() for _ in range(3)]
    points = [asked[0].params for asked in found if asked is not None]
    assert len(points) == 3
    assert all(points.count(point) == 1 for point in points)
    study.close()


def test_other_databases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a search locks its study"):
        SearchStudy(tmp_path, "redis://somewhere", ABOUT)


class TestAlive:
    @pytest.fixture
    def study(self, tmp_path: Path) -> optuna.Study:
        return optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}")

    def test_in_one_process(self, study: optuna.Study) -> None:
        one, two = Worker(study), Worker(study)
        assert two.alive(one.id)
        assert two.alive(two.id)
        assert not two.alive(None)
        assert not two.alive("nobody")
        one.close()
        one.close()
        assert not two.alive(one.id)
        two.close()

    def test_by_the_process(self, study: optuna.Study) -> None:
        worker = Worker(study)
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        started = process_start(process.pid)
        assert started is not None
        record = {"place": process_table(), "pid": process.pid, "started": started, "beat": 0}
        study.set_user_attr(f"{PREFIX}other", record)
        study.set_user_attr(f"{PREFIX}reused", {**record, "started": started - 100})
        assert worker.alive("other")
        assert not worker.alive("reused")  # the id belongs to somebody else now
        process.kill()
        psutil.wait_procs([psutil.Process(process.pid)], timeout=0.5)
        assert not worker.alive("other")  # nobody has waited for it yet: a zombie
        process.communicate()
        assert not worker.alive("other")
        worker.close()

    def test_by_the_process_when_the_clock_is_set_back(
        self, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker = Worker(study)
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
            record = {"place": process_table(), "pid": process.pid, "started": process_start(process.pid), "beat": 0}
            study.set_user_attr(f"{PREFIX}other", record)
            before = psutil.boot_time()
            # As Linux tells it then; psutil adds it to what it knows of a process.
            monkeypatch.setattr("psutil._psplatform.boot_time", lambda: before - 3600)
            assert worker.alive("other")
            process.communicate()
        assert not worker.alive("other")
        worker.close()

    def test_by_beats(self, study: optuna.Study) -> None:
        worker = Worker(study, beat_s=1000, grace=10)
        record = {"place": "another machine", "pid": 1, "started": 0.0}
        for own, beat, alive in ((0, 5, True), (9, 5, True), (0, 6, True), (9, 6, True), (0, 6, True), (1, 6, False),
                                 (0, 7, True), (0, None, False)):  # fmt: skip
            for _ in range(own):
                worker.beat()
            study.set_user_attr(f"{PREFIX}far", {**record, "beat": beat})
            assert worker.alive("far") is alive, (own, beat)
        worker.close()

    def test_it_beats(self, study: optuna.Study) -> None:
        worker = Worker(study, beat_s=0.01)
        while study.user_attrs[f"{PREFIX}{worker.id}"]["beat"] < 3:
            pass
        worker.close()
        assert study.user_attrs[f"{PREFIX}{worker.id}"]["beat"] is None


def test_the_owner_of_a_trial_is_its_worker(studies: tuple[SearchStudy, SearchStudy]) -> None:
    asked = [study.ask() for study in studies]
    assert [found[0].user_attrs[OWNER] for found in asked if found] == [study._worker.id for study in studies]
