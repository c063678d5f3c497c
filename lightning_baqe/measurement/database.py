"""The records database: all kernels, models and peaks ever measured here, in SQLite, safe with several processes.

A record's key holds all that can change its figure: the device, the versions of the toolchain, the target, the
operator with its shapes, types and epilogue (the spec), its knobs, and the code itself: a digest of the TIR that the
template generates for them. So an edit of a template forgets the kernels whose code it changes, and no others; and what
another machine measured is believed where the same versions generate the same code for the same device. What is in the
database is never measured again.

| table | key | what else |
| --- | --- | --- |
| devices | id | ``info``: :func:`~lightning_baqe.hardware.identity.device_info` as JSON |
| toolchains | id | ``versions``: of TVM, its FFI and LLVM, as JSON |
| kernels | device, toolchain, target, operator, spec, knobs, code | median and samples, whether exact, or the error |
| models | device, toolchain, plan | median and samples; the plan's digest covers all code and what generated it |
| peaks | device, toolchain, target, dot, chain, code | what one core's arithmetic reaches, GMAC/s |
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from lightning_baqe.deploy.calls import Call
from lightning_baqe.deploy.digest import code_digest
from lightning_baqe.errors import BaqeError, ConfigError
from lightning_baqe.files import cache_folder, make_folder
from lightning_baqe.hardware.identity import device_info, device_key, digest, toolchain
from lightning_baqe.hardware.target import CpuTarget
from lightning_baqe.kernels.specs import Spec

Identity = Callable[[int], Mapping[str, Any]]
VERSION = 2
_TEXT, _REAL = "TEXT NOT NULL", "REAL NOT NULL"
_ORIGIN = {"device": f"{_TEXT} REFERENCES devices", "toolchain": f"{_TEXT} REFERENCES toolchains"}


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
        """Keep a row; ``conflict`` is what SQLite does where its key is there already."""
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
        {**_ORIGIN, "target": _TEXT, "operator": _TEXT, "spec": _TEXT, "knobs": _TEXT, "code": _TEXT},
        {"latency_us": "REAL", "samples_us": _TEXT, "exact": "INTEGER", "error": "TEXT", "measured_at": _REAL},
    ),
    "model": Kind(
        "models", {**_ORIGIN, "plan": _TEXT}, {"latency_us": _REAL, "samples_us": _TEXT, "measured_at": _REAL}
    ),
    "peak": Kind(
        "peaks",
        {**_ORIGIN, "target": _TEXT, "dot": _TEXT, "chain": "INTEGER NOT NULL", "code": _TEXT},
        {"gmacs": _REAL, "measured_at": _REAL},
    ),
}


def default_records_path() -> Path:
    """``$LIGHTNING_BAQE_CACHE/records.db``, by default ``~/.cache/lightning_baqe/records.db``."""
    return cache_folder() / "records.db"


@dataclass(frozen=True)
class KernelRecord:
    """One measured kernel.

    Args:
        latency_us: what knobs are ranked by, the tuner's is the fastest sample; None if it failed.
        samples_us: all samples.
        exact: whether its result was compared with the reference and equal.
        error: why it failed.

    Raises:
        ConfigError: a figure that is no latency, or neither a latency nor an error.
    """

    knobs: dict[str, Any]
    latency_us: float | None
    samples_us: list[float]
    exact: bool | None
    error: str | None = None

    @property
    def usable(self) -> bool:
        """Whether it has a latency, and its result was not found wrong."""
        return self.error is None and self.latency_us is not None and self.exact is not False

    def __post_init__(self) -> None:
        check_latencies(self.latency_us, self.samples_us)
        if self.latency_us is None and self.error is None:
            raise ConfigError("a record has a latency or says why not; got neither a latency nor an error")


def check_latencies(latency_us: float | None, samples_us: list[float]) -> None:
    """Check that figures are latencies; ConfigError where one is not finite or not positive."""
    for figure in ([] if latency_us is None else [latency_us]) + samples_us:
        if not (math.isfinite(figure) and figure > 0):
            raise ConfigError(f"a latency is a finite positive number of microseconds, got {figure}")


class Records:
    """The database.

    Args:
        path: of the SQLite file; created if missing.
        identity: threads of a measurement to what the device is, whose figures are kept and looked up; by default this
            machine.

    Raises:
        ConfigError: the file cannot be written, is no records database, or a newer version wrote it.
    """

    def __init__(self, path: Path | str | None = None, identity: Identity = device_info) -> None:
        self.identity = identity
        self.path = Path(path).expanduser() if path is not None else default_records_path()
        make_folder(self.path.parent, "records")
        try:
            with self.reading() as connection:
                if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                    connection.execute("PRAGMA journal_mode = WAL")
            with self.transaction() as connection:
                _prepare(connection, self.path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                    raise ConfigError(f"records={self.path} cannot be written ({error}): give another file") from error
                raise  # locked, full: not about what the file is
            raise ConfigError(f"{self.path} is no SQLite database ({error}): move it away, or give another") from error

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection for queries."""
        with closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as connection:
            yield connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection that writes all or nothing, one process after the other."""
        with self.reading() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    def add_kernel(self, spec: Spec, target: CpuTarget, record: KernelRecord) -> None:
        """Keep a kernel's measurement; an older one of the same code is replaced. If the spec has threads, they belong
        to the device.
        """
        knobs = canonical(record.knobs)
        code = code_key(spec, knobs) or ""  # knobs that the template refuses have no code; their failure is kept
        exact = None if record.exact is None else int(record.exact)
        figures = (record.latency_us, json.dumps(record.samples_us), exact, record.error, time.time())
        with self._adding(_threads(spec)) as (connection, origin):
            KINDS["kernel"].insert(connection, (*origin, *kernel_text(spec, target), knobs, code, *figures))

    def kernel(self, spec: Spec, target: CpuTarget, knobs: Mapping[str, Any]) -> KernelRecord | None:
        """The record of a kernel as it would be compiled now, None if it was never measured."""
        wanted = canonical(knobs)
        return next(self._current(spec, target, "knobs = ?", (wanted,)), None)

    def kernels(self, spec: Spec, target: CpuTarget) -> list[KernelRecord]:
        """All records of one operator as it would be compiled now, fastest first, failed ones last."""
        return list(self._current(spec, target))

    def best_knobs(self, spec: Spec, target: CpuTarget) -> dict[str, Any] | None:
        """The knobs of the fastest usable record of an operator, None if there is none."""
        return next((record.knobs for record in self._current(spec, target) if record.usable), None)

    def add_model(self, plan_digest: str, threads: int, samples_us: list[float], latency_us: float) -> None:
        """Keep a whole model's latency."""
        check_latencies(latency_us, samples_us)
        with self._adding(threads) as (connection, origin):
            row = (*origin, plan_digest, latency_us, json.dumps(samples_us), time.time())
            KINDS["model"].insert(connection, row)

    def model(self, plan_digest: str, threads: int) -> tuple[float, list[float]] | None:
        """``(latency_us, samples_us)`` of a whole model with this code, None if it was never measured."""
        with self.reading() as connection:
            row = KINDS["model"].find(connection, (*self._origin(threads), plan_digest))
        return (row[0], json.loads(row[1])) if row else None

    def add_peak(self, target: CpuTarget, dot: str, chain: int, gmacs: float) -> None:
        """Keep what one core's arithmetic reaches in registers, 1e9 multiply-accumulates a second, if it is the most.

        Busy machines and slow clocks only ever lower it.
        """
        if not (math.isfinite(gmacs) and gmacs > 0):
            raise ConfigError(f"a peak is a finite positive number of GMAC/s, got {gmacs}")
        with self._adding(1) as (connection, _):
            key = self._peak_key(target, dot, chain)
            known = KINDS["peak"].find(connection, key)
            if known is None or gmacs > known[0]:
                KINDS["peak"].insert(connection, (*key, gmacs, time.time() if known is None else known[1]))

    def peak(self, target: CpuTarget, dot: str, chain: int) -> float | None:
        """The kept peak in GMAC/s, None if it was never measured with the code there is now."""
        with self.reading() as connection:
            row = KINDS["peak"].find(connection, self._peak_key(target, dot, chain))
        return row[0] if row else None

    def _peak_key(self, target: CpuTarget, dot: str, chain: int) -> tuple[Any, ...]:
        return *self._origin(1), canonical(target.tvm), dot, chain, code_digest()

    def _origin(self, threads: int) -> tuple[str, str]:
        """The ids of the device and the toolchain."""
        return device_key(self.identity(threads)), digest(toolchain())

    @contextmanager
    def _adding(self, threads: int) -> Iterator[tuple[sqlite3.Connection, tuple[str, str]]]:
        """A connection that writes, and the device and the toolchain of what is added, which are now kept."""
        origin = self._origin(threads)
        with self.transaction() as connection:
            for kind, key, what in zip(_ORIGIN, origin, (self.identity(threads), toolchain()), strict=True):
                KINDS[kind].insert(connection, (key, canonical(what)), "IGNORE")
            yield connection, origin

    def _current(
        self, spec: Spec, target: CpuTarget, condition: str = "1", values: tuple[Any, ...] = ()
    ) -> Iterator[KernelRecord]:
        """Records whose code is what the template generates now."""
        query = (
            "SELECT code, knobs, latency_us, samples_us, exact, error FROM kernels "
            f"WHERE device=? AND toolchain=? AND target=? AND operator=? AND spec=? AND {condition} "
            "ORDER BY latency_us IS NULL, latency_us, knobs"
        )
        key = (*self._origin(_threads(spec)), *kernel_text(spec, target), *values)
        with self.reading() as connection:
            rows = connection.execute(query, key).fetchall()
        for code, knobs, latency_us, samples_us, exact, error in rows:
            if code == (code_key(spec, knobs) or ""):
                checked = None if exact is None else bool(exact)
                yield KernelRecord(json.loads(knobs), latency_us, json.loads(samples_us), checked, error)


@functools.lru_cache(maxsize=16384)
def code_key(spec: Spec, knobs: str) -> str | None:
    """Digest of the TIR that the template generates now for a spec and knobs (as :func:`canonical` writes them).

    None where the template does not know such knobs: those that were renamed since, or that somebody made up.
    """
    try:
        function = Call(("kernel",), None, spec, json.loads(knobs), ()).function()
    except (BaqeError, KeyError, ValueError, TypeError):
        return None
    return hashlib.sha256(tvm.ir.save_json(function).encode()).hexdigest()[:32]


def kernel_text(spec: Spec, target: CpuTarget) -> tuple[str, str, str]:
    """Target, operator and spec as the database holds them.

    Fields at their default are left out, so that a spec which gains a field with a default keeps its records.
    """
    return canonical(target.tvm), type(spec).__name__, canonical(_stated(spec))


def _stated(value: Any) -> Any:
    """A dataclass as its fields that are not at their default, and likewise those in it."""
    if isinstance(value, tuple):
        return [_stated(part) for part in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
    return {f.name: _stated(part) for f, part in fields if part != f.default}


def canonical(value: Mapping[str, Any]) -> str:
    """A mapping as JSON, the same text for equal mappings; ValueError where it holds a number that is not finite."""
    return json.dumps(dict(value), sort_keys=True, allow_nan=False)


def _threads(spec: Spec) -> int:
    return int(getattr(spec, "threads", 1))  # kernels without that field are never parallel


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Create the tables, or set those of version 1 aside."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == VERSION:
        return
    if version > VERSION:
        raise ConfigError(
            f"{path} has version {version} of the records, this package reads {VERSION}: update the package, or give "
            "another database (LIGHTNING_BAQE_CACHE is the folder of the default one)"
        )
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and not {"kernels", "models"} <= tables:
        raise ConfigError(f"{path} is a database of something else, with the tables {sorted(tables)}: give another")
    if tables:
        _set_aside(connection, path)
    for kind in KINDS.values():
        columns = ", ".join(f"{name} {meaning}" for name, meaning in {**kind.key, **kind.figures}.items())
        connection.execute(f"CREATE TABLE {kind.table} ({columns}, PRIMARY KEY ({', '.join(kind.key)}))")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _set_aside(connection: sqlite3.Connection, path: Path) -> None:
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
