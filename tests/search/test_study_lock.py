"""One after the other: threads, processes that die, and two spellings of one file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest

from lightning_baqe.benchmarks import postgres
from lightning_baqe.errors import ConfigError
from lightning_baqe.search.study_lock import lock_of, study_lock

HOLDER = """
import sys, time
from lightning_baqe.search.study_lock import study_lock
with study_lock(sys.argv[1], "search"):
    print("held", flush=True)
    time.sleep(600)
"""


def check_freed_by_death(storage: str) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, storage], stdout=subprocess.PIPE, text=True)
    entered = threading.Event()

    def enter() -> None:
        with study_lock(storage, "search"):
            entered.set()

    waiting = threading.Thread(target=enter)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        waiting.start()
        time.sleep(0.3)
        assert not entered.is_set()
        if storage.startswith("postgresql"):
            with study_lock(storage, "another study"):  # is not held; in SQLite all studies of a file are
                pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    waiting.join(60)
    assert entered.is_set()


def test_a_file_is_freed_when_its_holder_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_freed_by_death(f"sqlite:///{tmp_path / 'study.db'}")
    monkeypatch.chdir(tmp_path)
    assert study_lock("sqlite:///study.db", "a") is study_lock(f"sqlite:///{tmp_path}/study.db", "a")


@pytest.mark.skipif(postgres.missing() is not None, reason=str(postgres.missing()))
def test_a_database_is_freed_when_its_holder_is_killed() -> None:
    with postgres.server() as server:
        check_freed_by_death(server.url)


@pytest.mark.parametrize("storage", ["memory", "sqlite:///:memory:", "file"])
def test_threads_exclude_each_other_and_a_thread_may_enter_twice(storage: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}" if storage == "file" else storage
    study = optuna.create_study(storage=None if storage == "memory" else url)
    inside: list[int] = []

    def work() -> None:
        for _ in range(20):
            with lock_of(study), lock_of(study):
                inside.append(1)
                assert len(inside) == 1
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []
    with pytest.raises(RuntimeError, match="mine"), lock_of(study):
        raise RuntimeError("mine")
    with lock_of(study):
        pass


def test_errors_say_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is no database URL"):
        study_lock("study.db", "search")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"needs the driver 'psycopg'.*pip install 'lightning-baqe\[postgres\]'"):
        study_lock("postgresql+psycopg://nobody@nowhere/none", "search")
