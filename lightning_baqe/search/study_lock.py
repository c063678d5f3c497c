"""A lock that all processes which work on one Optuna study share, so that one proposes after the other.

Optuna's storages are safe for several processes, but reading the trials and adding one are two steps: two workers that
read at the same moment propose the same point. Holding this lock over both makes it impossible. It is freed by the
system when its holder dies, by `SIGKILL` too, so that nobody waits for the dead.

| storage | what is locked | reaches |
| --- | --- | --- |
| SQLite file | all studies in it, by a transaction in `<file>.lock`, an empty database | processes of one machine |
| PostgreSQL | the study, by an advisory lock that an open transaction holds | all that use the database |
| any other | nothing outside the process | threads of one process |
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path

import sqlalchemy
from optuna.storages import RDBStorage
from optuna.study import Study
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool

from lightning_baqe.errors import ConfigError

_TRY_S = 0.5  # SQLite waits in C, where Ctrl-C is not heard
_LOCKS: dict[tuple[str, str], StudyLock] = {}
_MAKING = threading.Lock()


class StudyLock:
    """A context manager that holds what `hold` gives; the thread that holds it may enter it again."""

    def __init__(self, hold: Callable[[], AbstractContextManager[None]]) -> None:
        self._hold, self._thread = hold, threading.RLock()
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._thread)
            if not self._entered:
                stack.enter_context(self._hold())
            self._entered.append(stack.pop_all())

    def __exit__(self, *error: object) -> None:
        self._entered.pop().close()


def study_lock(storage: str, study_name: str) -> StudyLock:
    """The lock of a study, the same object for everybody in this process.

    Args:
        storage: URL, as Optuna takes it.
        study_name: of the study.

    Raises:
        ConfigError: the URL cannot be read, or the database's driver is not installed.
    """
    try:
        url = make_url(storage)
    except sqlalchemy.exc.ArgumentError as error:
        raise ConfigError(
            f"storage={storage!r} is no database URL ({error}); wanted is sqlite:///file.db or postgresql://..."
        ) from error
    file = _sqlite_file(url)
    # A file has one lock, however its path is written and whatever studies are in it.
    key = (str(file), "") if file is not None else (url.render_as_string(hide_password=False), study_name)
    with _MAKING:
        if key not in _LOCKS:
            if file is not None:
                _LOCKS[key] = StudyLock(lambda: _hold_file(file.with_name(f"{file.name}.lock")))
            elif url.get_backend_name() == "postgresql":
                engine = _engine(url)
                _LOCKS[key] = StudyLock(lambda: _hold_advisory(engine, study_name))
            else:
                _LOCKS[key] = StudyLock(nullcontext)
        return _LOCKS[key]


def lock_of(study: Study) -> StudyLock:
    """The lock of an open study; see the table above for how far it reaches."""
    # Optuna wraps its databases in a cache and has no public way to them.
    storage = getattr(study._storage, "_backend", study._storage)
    if isinstance(storage, RDBStorage):
        return study_lock(str(storage.url), study.study_name)
    return _IN_MEMORY


def _sqlite_file(url: URL) -> Path | None:
    """The file of an SQLite URL, None for one in memory or another database."""
    database = (url.database or "").removeprefix("file:").partition("?")[0]
    if url.get_backend_name() != "sqlite" or database in ("", ":memory:"):
        return None
    return Path(database).resolve()


@contextmanager
def _hold_file(path: Path) -> Iterator[None]:
    # Not filelock: a process that the holder forks inherits its lock and keeps it when the holder is killed.
    connection = sqlite3.connect(path, timeout=_TRY_S, isolation_level=None, check_same_thread=False)
    with closing(connection):  # ends the transaction
        while not connection.in_transaction:
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                    raise
        yield


def _engine(url: URL) -> sqlalchemy.Engine:
    try:
        return sqlalchemy.create_engine(url, poolclass=NullPool)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"storage={url.render_as_string()} needs the driver {error.name!r}, which is not installed: pip install "
            "'lightning-baqe[postgres]'"
        ) from error


@contextmanager
def _hold_advisory(engine: sqlalchemy.Engine, study_name: str) -> Iterator[None]:
    digest = hashlib.blake2b(f"lightning_baqe study {study_name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "big", signed=True)
    with engine.connect() as connection, connection.begin():
        # A server's limits on idle or long transactions are not meant for one that only holds a lock.
        for limit in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"):
            connection.execute(sqlalchemy.text(f"SET LOCAL {limit} = 0"))
        connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(key)))
        yield


_IN_MEMORY = StudyLock(nullcontext)
