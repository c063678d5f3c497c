"""The records database: all kernels, models and peaks ever measured here, in SQLite, safe with several processes.

A record's key holds all that can change its figure: the device, the versions of the toolchain, the target, the
operator with its shapes, types and epilogue (the spec), its knobs, and the code itself: a digest of the TIR that the
template generates for them. So an edit of a template forgets the kernels whose code it changes, and no others; and what
another machine measured is believed where the same versions generate the same code for the same device. What is in the
database is never measured again.

The database serves a run and never stops it: a damaged one is set aside, one that is locked or cannot be written is
waited for no longer than a second, and then done without for a while. What could not be written is written later, at
the process's end at the latest; what cannot be written then either is told.

| table | key | what else |
| --- | --- | --- |
| devices | id | ``info``: :func:`~lightning_baqe.hardware.identity.device_info` as JSON |
| toolchains | id | ``versions``: of TVM, its FFI and LLVM, as JSON |
| kernels | device, toolchain, target, operator, spec, knobs, code | median and samples, whether exact, or the error |
| models | device, toolchain, plan | median and samples; the plan's digest covers all code and what generated it |
| peaks | device, toolchain, target, dot, chain, code | what one core's arithmetic reaches, GMAC/s |
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import random
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tvm

from lightning_baqe.deploy.calls import Call
from lightning_baqe.deploy.digest import code_digest
from lightning_baqe.errors import BaqeError, ConfigError
from lightning_baqe.files import cache_folder, make_folder
from lightning_baqe.hardware.identity import device_info, device_key, digest, toolchain
from lightning_baqe.hardware.target import CpuTarget
from lightning_baqe.kernels.specs import Spec
from lightning_baqe.measurement.records_tables import KINDS, ORIGIN, prepare

Identity = Callable[[int], Mapping[str, Any]]
_RETRY_S = 30.0
_HEADER = b"SQLite format 3\0"
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_FORMAT)
_Write = tuple[str, Sequence[Any], str]  # kind of record, row, what is done where its key is there
_PATIENCE_S = 0.8  # all that a call waits for together, so that with its own work it takes less than a second
# Between tries at a locked database, drawn anew each time: SQLite's own waits become so long that busy writers starve.
_PAUSES_S = (0.0005, 0.004)
_Found = TypeVar("_Found")


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
        ConfigError: the file is something else, or a newer version wrote it; a path that was given cannot be written.

    Warns:
        UserWarning: the database was damaged and set aside, or cannot be used now.
    """

    def __init__(self, path: Path | str | None = None, identity: Identity = device_info) -> None:
        self.identity = identity
        self.path = Path(path).expanduser() if path is not None else default_records_path()
        self._is_own = path is None
        self._pending: list[_Write] = []
        self._is_ready = self._is_tried_at_exit = False
        self._not_before = 0.0  # when a database that could not be used is waited for again
        self._said: set[str] = set()
        try:
            make_folder(self.path.parent, "records")
            _patiently(self._open, time.monotonic() + _PATIENCE_S)
        except (ConfigError, sqlite3.OperationalError) as error:
            if not self._is_own and not is_busy(error):
                raise _unwritable(self.path, error) from error
            self._do_without(error)

    def _open(self) -> None:
        """Make the tables; a damaged file is set aside first. Waits for nothing."""
        for attempt in range(2):
            try:
                with self._connected() as connection:
                    if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                        connection.execute("PRAGMA journal_mode = WAL")
                with self._connected() as connection, connection:
                    connection.execute("BEGIN IMMEDIATE")
                    prepare(connection, self.path)
                self._is_ready = True
                return
            except sqlite3.DatabaseError as error:
                if attempt or not is_damage(error):
                    raise
                if not self._is_own and not _begins_like_sqlite(self.path):
                    text = f"{self.path} is no SQLite database ({error}): move it away, or give another"
                    raise ConfigError(text) from error
                self._set_aside(error)

    def _set_aside(self, error: Exception) -> None:
        """Rename a damaged database, with what SQLite keeps beside it."""
        number = next(n for n in itertools.count(1) if not _aside(self.path, n).exists())
        for ending in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{ending}", f"{_aside(self.path, number)}{ending}")
        warnings.warn(
            f"the records in {self.path} are damaged ({error}): they were set aside as "
            f"{_aside(self.path, number).name}, and what is measured from now on is kept in a new file",
            UserWarning,
            stacklevel=4,
        )

    def _do_without(self, error: Exception) -> None:
        """Say once why records are not used, and wait for none for a while."""
        self._not_before = time.monotonic() + _RETRY_S
        if str(error) not in self._said:
            self._said.add(str(error))
            warnings.warn(
                f"the records in {self.path} cannot be used now ({error}): what they know is measured again, and what "
                "is measured is written later, if that becomes possible before this process ends",
                UserWarning,
                stacklevel=4,
            )

    @contextmanager
    def _connected(self, timeout_s: float = 0.0) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=timeout_s, isolation_level=None)) as connection:
            yield connection

    def _serve(self, work: Callable[[sqlite3.Connection], _Found], otherwise: _Found) -> _Found:
        """What work finds in the database; otherwise where that cannot be used now."""
        now = time.monotonic()
        deadline, is_new = now + _PATIENCE_S if now >= self._not_before else now, False

        def once() -> _Found:
            if not self._is_ready:
                self._open()
            with self._connected() as connection:
                return work(connection)

        while True:
            try:
                return _patiently(once, deadline)
            except (sqlite3.DatabaseError, ConfigError) as error:
                if isinstance(error, ConfigError) or not is_damage(error) or is_new:
                    self._do_without(error)
                    return otherwise
                self._set_aside(error)
                self._is_ready, is_new = False, True

    def _write_pending(self) -> None:
        """Write what is not written yet, all or nothing, one process after the other."""

        def write(connection: sqlite3.Connection) -> bool:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                for kind, row, conflict in self._pending:
                    KINDS[kind].insert(connection, row, conflict)
            return True

        if not self._pending:
            return
        if self._serve(write, False):
            self._pending.clear()
        elif not self._is_tried_at_exit:
            self._is_tried_at_exit = True
            atexit.register(self._end)

    def flush(self) -> int:
        """Write what could not be written yet, waiting up to a second for it. Returns how many records still are not
        written.
        """
        self._not_before = 0.0
        self._write_pending()
        return sum(kind not in ORIGIN for kind, *_ in self._pending)

    def _end(self) -> None:
        if lost := self.flush():
            warnings.warn(
                f"{lost} records could not be written to {self.path} before the process ended: what they say is "
                "measured again",
                UserWarning,
                stacklevel=2,
            )

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection for queries, whose errors are the caller's."""
        with self._connected(30.0) as connection:
            yield connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection that writes all or nothing, one process after the other; errors are the caller's."""
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
        origin = self._origin(_threads(spec))
        self._keep("kernel", _threads(spec), (*origin, *kernel_text(spec, target), knobs, code, *figures))

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
        row = (*self._origin(threads), plan_digest, latency_us, json.dumps(samples_us), time.time())
        self._keep("model", threads, row)

    def model(self, plan_digest: str, threads: int) -> tuple[float, list[float]] | None:
        """``(latency_us, samples_us)`` of a whole model with this code, None if it was never measured."""
        key = (*self._origin(threads), plan_digest)
        row = self._serve(lambda connection: KINDS["model"].find(connection, key), None)
        found = None if row is None else self._checked("models", _figures, *row[:2])
        return None if found is None or found[0] is None else (found[0], found[1])

    def add_peak(self, target: CpuTarget, dot: str, chain: int, gmacs: float) -> None:
        """Keep what one core's arithmetic reaches in registers, 1e9 multiply-accumulates a second, if it is the most.

        Busy machines and slow clocks only ever lower it.
        """
        if not (math.isfinite(gmacs) and gmacs > 0):
            raise ConfigError(f"a peak is a finite positive number of GMAC/s, got {gmacs}")
        self._keep("peak", 1, (*self._peak_key(target, dot, chain), gmacs, time.time()), "LARGER")

    def peak(self, target: CpuTarget, dot: str, chain: int) -> float | None:
        """The kept peak in GMAC/s, None if it was never measured with the code there is now."""
        key = self._peak_key(target, dot, chain)
        row = self._serve(lambda connection: KINDS["peak"].find(connection, key), None)
        found = None if row is None else self._checked("peaks", _figures, row[0], "[]")
        return None if found is None else found[0]

    def _peak_key(self, target: CpuTarget, dot: str, chain: int) -> tuple[Any, ...]:
        return *self._origin(1), canonical(target.tvm), dot, chain, code_digest()

    def _origin(self, threads: int) -> tuple[str, str]:
        """The ids of the device and the toolchain."""
        return device_key(self.identity(threads)), digest(toolchain())

    def _keep(self, kind: str, threads: int, row: Sequence[Any], conflict: str = "REPLACE") -> None:
        """Write a row, and before it those of the device and the toolchain."""
        for about, key, what in zip(ORIGIN, self._origin(threads), (self.identity(threads), toolchain()), strict=True):
            self._pending.append((about, (key, canonical(what)), "IGNORE"))
        self._pending.append((kind, row, conflict))
        self._write_pending()

    def _checked(self, table: str, read: Callable[..., _Found], *row: Any) -> _Found | None:
        """What a row says; None, with a warning, where it says nothing that can be."""
        try:
            return read(*row)
        except (ValueError, TypeError, RecursionError) as error:  # of JSON, of figures, and ConfigError
            text = f"a row of {table} in {self.path} is damaged and not used ({error})"
            if text not in self._said:
                self._said.add(text)
                warnings.warn(text, UserWarning, stacklevel=3)
            return None

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
        rows: list[Any] = self._serve(lambda connection: connection.execute(query, key).fetchall(), [])
        for code, knobs, *figures in rows:
            record = self._checked("kernels", _kernel_record, knobs, *figures)
            if record is not None and code == (code_key(spec, knobs) or ""):
                yield record


def _kernel_record(knobs: Any, latency_us: Any, samples_us: Any, exact: Any, error: Any) -> KernelRecord:
    """A row's record; ValueError or TypeError where it holds something else."""
    chosen = json.loads(knobs)
    texts = isinstance(chosen, dict) and isinstance(error, str | None)
    if not texts or exact not in (None, 0, 1):
        raise ValueError(f"knobs {knobs!r}, exact {exact!r}, error {error!r}")
    latency, samples = _figures(latency_us, samples_us)
    return KernelRecord(chosen, latency, samples, None if exact is None else bool(exact), error)


def _figures(latency: Any, samples: Any) -> tuple[float | None, list[float]]:
    """A figure and its samples as a row holds them; ValueError or TypeError where they are something else."""
    found = json.loads(samples)
    if not isinstance(found, list) or not all(isinstance(value, int | float) for value in (*found, latency or 1)):
        raise ValueError(f"{latency!r}, {samples!r} are no figures")
    check_latencies(latency, found)
    return latency, found


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


def _patiently(step: Callable[[], _Found], deadline: float) -> _Found:
    """What a step gives; it is tried again where another connection holds the database, until the deadline."""
    while True:
        try:
            return step()
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() >= deadline:
                raise
            time.sleep(random.uniform(*_PAUSES_S))


def is_busy(error: Exception) -> bool:
    """Whether another connection holds the database."""
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF in _BUSY


def is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file itself is not what it should be, rather than in use, out of reach or on a full disk."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    return code in _DAMAGE


def _unwritable(path: Path, error: Exception) -> ConfigError:
    if isinstance(error, ConfigError):
        return error
    return ConfigError(f"records={path} cannot be written ({error}): give another file")


def _aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.damaged-{number}")


def _begins_like_sqlite(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_HEADER)) == _HEADER
