"""A lock that all processes which work on one Optuna study share, so that one proposes after the other.

Optuna's storages are safe for several processes, but reading the trials and adding one are two steps: two workers that
read at the same moment propose the same point. Holding this lock over both makes it impossible. It is freed by the
system when its holder dies, by `SIGKILL` too, so that nobody waits for the dead. A server that is restarted frees it
too, while its holder lives: then leaving it raises `ConnectionLost`, and what was done under it has to be done anew.

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
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType

import sqlalchemy
from optuna.storages import RDBStorage
from optuna.study import Study
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool

from lightning_baqe.errors import ConfigError
from lightning_baqe.interrupts import heed
from lightning_baqe.search.patience import ConnectionLost, watch

_Check = Callable[[], object]  # raises ConnectionLost where the lock was lost
_TRY_S = 0.5  # SQLite waits in C, where Ctrl-C is not heard
_PAUSE_S = 0.1  # between tries at a server's lock
_LOCKS: dict[tuple[str, str], StudyLock] = {}
_MAKING = threading.Lock()


class StudyLock:
    """A context manager that holds what `hold` gives; the thread that holds it may enter it again.

    Raises:
        ConnectionLost: on entering: the database is out of reach; on leaving: the lock was lost meanwhile.
    """

    def __init__(self, hold: Callable[[], AbstractContextManager[_Check]]) -> None:
        self._hold, self._thread = hold, threading.RLock()
        self._entered: list[ExitStack] = []
        self._holder: int | None = None
        self._check: _Check = _never_lost

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._thread)
            if not self._entered:
                self._check = stack.enter_context(self._hold())
                self._holder = threading.get_ident()
                stack.callback(self._forget)
            self._entered.append(stack.pop_all())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack = self._entered.pop()
        if error is None or isinstance(error, Exception):
            stack.close()  # where the lock was lost that is what counts, whatever else came of it
            return
        with suppress(ConnectionLost):  # an interruption stays one
            stack.__exit__(kind, error, trace)

    def _forget(self) -> None:
        self._holder = None

    def check(self) -> None:
        """Raise ConnectionLost where this thread holds the lock, and has lost it meanwhile."""
        if self._holder == threading.get_ident():
            self._check()


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
                _LOCKS[key] = StudyLock(lambda: nullcontext(_never_lost))
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
def _hold_file(path: Path) -> Iterator[_Check]:
    # Not filelock: a process that the holder forks inherits its lock and keeps it when the holder is killed.
    connection = sqlite3.connect(path, timeout=_TRY_S, isolation_level=None, check_same_thread=False)
    with closing(connection):  # ends the transaction
        while not connection.in_transaction:
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                    raise
                heed()
        yield _never_lost


def _engine(url: URL) -> sqlalchemy.Engine:
    try:
        engine = sqlalchemy.create_engine(url, poolclass=NullPool)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"storage={url.render_as_string()} needs the driver {error.name!r}, which is not installed: pip install "
            "'lightning-baqe[postgres]'"
        ) from error
    watch(engine)
    return engine


@contextmanager
def _hold_advisory(engine: sqlalchemy.Engine, study_name: str) -> Iterator[_Check]:
    digest = hashlib.blake2b(f"lightning_baqe study {study_name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "big", signed=True)
    with engine.connect() as connection:

        def check() -> None:
            if connection.invalidated:
                raise ConnectionLost("the connection that held the study's lock is gone")
            connection.execute(sqlalchemy.text("SELECT 1"))

        # A server's limits on idle or long transactions are not meant for one that only holds a lock.
        for limit in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"):
            connection.execute(sqlalchemy.text(f"SET LOCAL {limit} = 0"))
        while not connection.scalar(sqlalchemy.select(sqlalchemy.func.pg_try_advisory_xact_lock(key))):
            heed()
            time.sleep(_PAUSE_S)
        yield check
        check()
        connection.commit()


def _never_lost() -> None:
    """A file's lock ends with its process only."""


_IN_MEMORY = StudyLock(lambda: nullcontext(_never_lost))
