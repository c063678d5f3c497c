"""The database of a study: its URL, and Optuna's storage on it."""

from __future__ import annotations

import sqlite3
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import RDBStorage

from lightning_baqe.errors import ConfigError
from lightning_baqe.resources import shortage
from lightning_baqe.runs.recovery import ADVICE, DATABASE
from lightning_baqe.search.patience import ConnectionLost, Patience
from lightning_baqe.search.study_lock import study_lock

_BUSY_S = 20.0  # that SQLite waits in C, where Ctrl-C is not heard, before the wait is told and goes on


class _Database(RDBStorage):
    """Leaves no connection open where it cannot be opened: psycopg warns of those, at any later time."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        try:
            super().__init__(*arguments, **options)
        except BaseException:
            if hasattr(self, "engine"):
                self.engine.dispose()
            raise


def storage_url(run_dir: Path, storage: str | None) -> str:
    """The URL of a study's database: ``storage``, by default SQLite in the run folder."""
    return storage or f"sqlite:///{(run_dir / DATABASE).resolve()}"


def shown(url: str) -> str:
    """A database's URL without its password."""
    return sqlalchemy.engine.make_url(url).render_as_string()


def open_storage(url: str, patience: Patience | None = None) -> RDBStorage:
    """Optuna's storage, for several workers.

    Args:
        url: of the database.
        patience: waits for a database that does not answer; None: then that is an error at once.

    Raises:
        ConfigError: another kind of database, one that cannot be opened, or its driver is not installed.
        StorageError: the patience came to its end.
    """
    if url.startswith("sqlite"):
        options: dict[str, Any] = {"connect_args": {"timeout": _BUSY_S}}
    elif url.startswith("postgresql"):
        # A trial may last longer than a server keeps an idle connection, or runs.
        options = {"pool_pre_ping": True}
    else:
        raise ConfigError(
            f"storage={url!r}, but a search locks its study, and that is for an SQLite file (sqlite:///study.db, one "
            "machine) or PostgreSQL (postgresql://user@host/database): give one of these"
        )

    def opened() -> RDBStorage:
        with ExitStack() as undo:
            # Two processes that create the tables at once would collide, also those of two studies in one database.
            with study_lock(url, "tables"):
                storage = _Database(url, engine_kwargs=options)
                undo.callback(storage.engine.dispose)
            undo.pop_all()
        return storage

    try:
        return opened() if patience is None else patience.repeat(opened)
    except ConnectionLost as error:
        raise ConfigError(
            f"the study's database {shown(url)} does not answer ({error}): see that it runs, or give another storage"
        ) from error
    except (
        sqlite3.DatabaseError,
        sqlalchemy.exc.SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        RuntimeError,
    ) as error:
        reason = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
        advice = shortage(error) or f"give another run_dir or storage, or if it was damaged, {ADVICE}"
        raise ConfigError(f"the study's database {shown(url)} cannot be opened ({reason}): {advice}") from error
