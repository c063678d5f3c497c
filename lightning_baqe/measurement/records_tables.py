"""The tables of the records database: what they hold, how rows are kept and found, how they are made."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_baqe.errors import ConfigError

VERSION = 2
_TEXT, _REAL = "TEXT NOT NULL", "REAL NOT NULL"
ORIGIN = {"device": f"{_TEXT} REFERENCES devices", "toolchain": f"{_TEXT} REFERENCES toolchains"}


@dataclass(frozen=True)
class Kind:
    """A kind of record.

    Args:
        table: where it is kept.
        key, figures: ``{column: its SQL type}``.
    """

    table: str
    key: Mapping[str, str]
    figures: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns in order."""
        return (*self.key, *self.figures)

    def insert(self, connection: sqlite3.Connection, row: Sequence[Any], conflict: str = "REPLACE") -> None:
        """Keep a row; ``conflict`` is what is done where its key is there already: IGNORE, REPLACE, or LARGER, which
        replaces figures whose first one is less.
        """
        if conflict == "LARGER":
            known = self.find(connection, row[: len(self.key)])
            if known is not None and isinstance(known[0], int | float) and known[0] >= row[len(self.key)]:
                return
            conflict = "REPLACE"
        marks = ", ".join("?" * len(row))
        connection.execute(f"INSERT OR {conflict} INTO {self.table} VALUES ({marks})", row)

    def find(self, connection: sqlite3.Connection, key: Sequence[Any]) -> tuple[Any, ...] | None:
        """The figures of a key, None if there are none."""
        where = " AND ".join(f"{name} = ?" for name in self.key)
        query = f"SELECT {', '.join(self.figures)} FROM {self.table} WHERE {where}"
        found: tuple[Any, ...] | None = connection.execute(query, key).fetchone()
        return found


KINDS = {
    "device": Kind("devices", {"id": _TEXT}, {"info": _TEXT}),
    "toolchain": Kind("toolchains", {"id": _TEXT}, {"versions": _TEXT}),
    "kernel": Kind(
        "kernels",
        {**ORIGIN, "target": _TEXT, "operator": _TEXT, "spec": _TEXT, "knobs": _TEXT, "code": _TEXT},
        {"latency_us": "REAL", "samples_us": _TEXT, "exact": "INTEGER", "error": "TEXT", "measured_at": _REAL},
    ),
    "model": Kind(
        "models", {**ORIGIN, "plan": _TEXT}, {"latency_us": _REAL, "samples_us": _TEXT, "measured_at": _REAL}
    ),
    "peak": Kind(
        "peaks",
        {**ORIGIN, "target": _TEXT, "dot": _TEXT, "chain": "INTEGER NOT NULL", "code": _TEXT},
        {"gmacs": _REAL, "measured_at": _REAL},
    ),
}


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Create the tables, or set those of version 1 aside."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if version == VERSION:
        if lacking := sorted({kind.table for kind in KINDS.values()} - tables):
            raise sqlite3.DatabaseError(f"it lacks the tables {', '.join(lacking)}")
        return
    if version > VERSION:
        raise ConfigError(
            f"{path} has version {version} of the records, this package reads {VERSION}: update the package, or give "
            "another database (LIGHTNING_BAQE_CACHE is the folder of the default one)"
        )
    if tables and not {"kernels", "models"} <= tables:
        raise ConfigError(f"{path} is a database of something else, with the tables {sorted(tables)}: give another")
    if tables:
        _rename_old(connection, path)
    for kind in KINDS.values():
        columns = ", ".join(f"{name} {meaning}" for name, meaning in {**kind.key, **kind.figures}.items())
        connection.execute(f"CREATE TABLE {kind.table} ({columns}, PRIMARY KEY ({', '.join(kind.key)}))")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _rename_old(connection: sqlite3.Connection, path: Path) -> None:
    """Rename the tables of version 1: their keys do not say which code was measured, nor in words on which device."""
    counts = []
    connection.execute("DROP INDEX IF EXISTS kernels_by_spec")
    for name in ("kernels", "models"):
        counts.append(connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0])
        connection.execute(f"ALTER TABLE {name} RENAME TO {name}_v1")
    if any(counts):
        warnings.warn(
            f"{path} was written by an older version; its {counts[0]} kernels and {counts[1]} models do not say which "
            "code they measured and are not used any more (kept in the tables kernels_v1 and models_v1)",
            stacklevel=2,
        )
