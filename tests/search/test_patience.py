"""Steps that are begun anew while a database is away, and what counts as away."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy

from lightning_baqe.benchmarks import postgres
from lightning_baqe.errors import StorageError
from lightning_baqe.search.patience import ConnectionLost, Patience, watch


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_baqe.search.patience._PAUSE_S", 0.0)


class Away:
    """Answers after so many tries."""

    def __init__(self, tries: int) -> None:
        self.tries, self.calls = tries, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.tries:
            raise ConnectionLost("nobody is there")
        return "found"


def test_a_step_is_begun_anew_and_the_wait_is_told_once() -> None:
    patience = Patience("the database")
    with pytest.warns(UserWarning, match=r"the database does not answer \(nobody is there\): waiting") as told:
        assert patience.repeat(Away(3)) == "found"
    assert len(told) == 1
    with pytest.warns(UserWarning, match="does not answer, outage 2"):
        patience.repeat(Away(1))
    assert patience.repeat(Away(0)) == "found"


def test_the_outer_step_is_repeated_as_a_whole() -> None:
    patience, inner, outer = Patience("the database"), Away(1), []

    def step() -> str:
        outer.append(inner.calls)
        return patience.repeat(inner)

    with pytest.warns(UserWarning, match="does not answer"):
        assert patience.repeat(step) == "found"
    assert outer == [0, 1]


def test_waiting_has_an_end() -> None:
    with (
        pytest.warns(UserWarning, match="does not answer"),
        pytest.raises(StorageError, match=r"has not answered.*start the same command again") as caught,
    ):
        Patience("the database", limit_s=0.05).repeat(Away(10**9))
    assert not isinstance(caught.value, ConnectionLost)


def test_other_errors_pass() -> None:
    def step() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Patience("the database").repeat(step)


def test_who_interrupts_the_wait_does_not_wait_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    patience, away = Patience("the database"), Away(10**9)
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.warns(UserWarning, match="does not answer"), pytest.raises(KeyboardInterrupt):
        patience.repeat(away)
    with pytest.warns(UserWarning, match="does not answer"), pytest.raises(StorageError, match="has not answered"):
        patience.repeat(away)
    assert away.calls == 2


def test_a_file_that_somebody_keeps_locked_is_away(tmp_path: Path) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'file.db'}", connect_args={"timeout": 0.01})
    watch(engine)

    def write() -> int:
        with engine.begin() as connection:
            return connection.execute(sqlalchemy.text("UPDATE numbers SET x = x + 1")).rowcount

    with closing(sqlite3.connect(tmp_path / "file.db", isolation_level=None)) as other:
        other.execute("CREATE TABLE numbers (x)")
        other.execute("INSERT INTO numbers VALUES (1)")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ConnectionLost, match="database is locked"):
            write()
    assert write() == 1
    with pytest.raises(sqlalchemy.exc.OperationalError, match="no such table"), engine.begin() as connection:
        connection.execute(sqlalchemy.text("SELECT * FROM letters"))
    engine.dispose()


def test_nothing_is_written_without_the_lock(tmp_path: Path) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'file.db'}")
    is_held = True

    def check() -> None:
        if not is_held:
            raise ConnectionLost("the lock is gone")

    watch(engine, check)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE numbers (x)"))
    is_held = False
    with pytest.raises(ConnectionLost, match="the lock is gone"), engine.begin() as connection:
        connection.execute(sqlalchemy.text("INSERT INTO numbers VALUES (1)"))
    is_held = True
    with engine.begin() as connection:
        assert connection.execute(sqlalchemy.text("SELECT count(*) FROM numbers")).scalar() == 0
    engine.dispose()


def test_ctrl_c_in_a_statement_is_no_outage() -> None:
    class Cursor(sqlite3.Cursor):
        def execute(self, statement: str, *arguments: object) -> Cursor:
            if "interrupted" in statement:
                raise KeyboardInterrupt
            super().execute(statement, *arguments)
            return self

    class Connection(sqlite3.Connection):
        def cursor(self, *arguments: object, **named: object) -> sqlite3.Cursor:
            return super().cursor(Cursor)

    engine = sqlalchemy.create_engine("sqlite://", creator=lambda: sqlite3.connect(":memory:", factory=Connection))
    watch(engine)
    with engine.connect() as connection, pytest.raises(KeyboardInterrupt):
        connection.exec_driver_sql("SELECT 'interrupted'")


@pytest.mark.skipif(postgres.missing() is not None, reason=str(postgres.missing()))
def test_a_connection_that_the_server_ends_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres.server() as server:
        ending, ended = (sqlalchemy.create_engine(server.url) for _ in range(2))
        watch(ended)
        # The driver may raise the server's last words before it sees that the connection is closed.
        monkeypatch.setattr(ended.dialect, "is_disconnect", lambda *_: False)
        for _ in range(2):
            with ended.connect() as connection, ending.connect() as other:
                pid = connection.scalar(sqlalchemy.text("SELECT pg_backend_pid()"))
                other.execute(sqlalchemy.text(f"SELECT pg_terminate_backend({pid}, 5000)"))
                with pytest.raises(ConnectionLost, match="terminating connection"):
                    connection.execute(sqlalchemy.text("SELECT 1"))
        with ended.connect() as connection, pytest.raises(sqlalchemy.exc.ProgrammingError, match="does not exist"):
            connection.execute(sqlalchemy.text("SELECT * FROM letters"))
        ending.dispose()
        ended.dispose()
