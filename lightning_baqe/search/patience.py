"""How a worker gets over a database that goes away: a server that is restarted, a file that somebody keeps locked.

A connection that dies takes with it what was not committed, and a lock that it held. Nobody knows whether the last
commit went through. So a step is begun anew as a whole, once the database answers, and steps are written such that
this does no harm: they look first at what is there. Ctrl-C waits for the end of a step: a transaction that it leaves
open keeps the database locked, for this very process, too.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy
from sqlalchemy.engine import Engine, ExceptionContext

from lightning_baqe.errors import StorageError
from lightning_baqe.interrupts import postponed

LIMIT_S = 300.0
_PAUSE_S = 1.0  # between tries
_LONG_S = 60.0  # a try of that length was answered at first
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_ENDED = ("57P", "08")  # SQLSTATE: operator intervention (shutdown, crash, starting up), connection exception
_Found = TypeVar("_Found")


class ConnectionLost(StorageError):
    """The database went away, or was never reached: whatever was begun has to be begun anew."""


class Patience:
    """Begins steps anew while a database is away.

    Args:
        database: its name in messages; without a password.
        limit_s: seconds without an answer after which waiting is given up.
    """

    def __init__(self, database: str, limit_s: float = LIMIT_S) -> None:
        self._database, self._limit_s = database, limit_s
        self._outages = 0
        self._inside = threading.local()

    def repeat(self, step: Callable[[], _Found]) -> _Found:
        """What a step gives; it is called again where it raises :class:`ConnectionLost`. Steps within it are not
        repeated by themselves.

        Raises:
            StorageError: the database did not answer for ``limit_s`` seconds, or the wait was interrupted before.

        Warns:
            UserWarning: the database is waited for; once an outage.
        """
        if getattr(self._inside, "a_step", False):
            return step()
        self._inside.a_step = True
        try:
            return self._repeat(step)
        finally:
            self._inside.a_step = False

    def _repeat(self, step: Callable[[], _Found]) -> _Found:
        since: float | None = None
        while True:
            begun = time.monotonic()
            try:
                with postponed():
                    return step()
            except ConnectionLost as error:
                now = time.monotonic()
                if since is None or now - begun > _LONG_S:
                    since = now
                    self._tell(error)
                if now - since >= self._limit_s:
                    raise StorageError(
                        f"{self._database} has not answered for {now - since:.0f} s ({error}): see that it runs, then "
                        "start the same command again; what was finished is kept"
                    ) from error
            try:
                time.sleep(_PAUSE_S)
            except KeyboardInterrupt:
                self._limit_s = 0.0  # whoever ends the run does not wait again for its end
                raise

    def _tell(self, error: ConnectionLost) -> None:
        self._outages += 1
        again = f", outage {self._outages}" if self._outages > 1 else ""  # so that Python shows it again
        warnings.warn(
            f"{self._database} does not answer{again} ({error}): waiting for it, up to {self._limit_s:.0f} s",
            UserWarning,
            stacklevel=2,
        )


def watch(engine: Engine, still_alone: Callable[[], object] | None = None) -> None:
    """Have an engine raise :class:`ConnectionLost` where its database goes away.

    Args:
        engine: of PostgreSQL or SQLite.
        still_alone: called before every transaction, raises :class:`ConnectionLost` where a lock was lost under which
            the transaction was to happen. A connection that answered before this call and dies later commits nothing,
            so that nothing is written without the lock when the server is restarted.
    """
    sqlalchemy.event.listen(engine, "handle_error", _lost)
    if still_alone is not None:

        def check(*connection: Any) -> None:
            still_alone()

        sqlalchemy.event.listen(engine, "checkout", check)


def _lost(context: ExceptionContext) -> ConnectionLost | None:
    """What SQLAlchemy raises instead of its own error; None: its own."""
    original, wrapped = context.original_exception, context.sqlalchemy_exception
    if not isinstance(original, Exception):
        return None  # Ctrl-C ends the connection, too, and is not to be waited for
    if isinstance(original, sqlite3.Error):
        gone = getattr(original, "sqlite_errorcode", 0) & 0xFF in _BUSY
    else:
        refused = context.connection is None and isinstance(wrapped, sqlalchemy.exc.OperationalError)
        # A server's last words come before the driver sees that the connection is closed.
        ended = str(getattr(original, "sqlstate", None) or "").startswith(_ENDED)
        gone = refused or ended or context.is_disconnect
        context.is_disconnect = context.is_disconnect or ended  # then SQLAlchemy takes no such connection again
    if not gone or context.is_pre_ping:  # then the pool tries a new connection itself
        return None
    return ConnectionLost(" ".join(str(original).split()) or type(original).__name__)
