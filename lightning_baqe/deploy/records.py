"""The records database: every kernel and model that was ever measured here, in SQLite, safe with several processes.

A record's key holds all that can change its figure: the code (operator, shapes, types, epilogue, knobs, arithmetic,
target CPU), the versions that generated it and the device's fingerprint. What is in the database is never measured
again.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_baqe.deploy.conv_template import ConvSpec
from lightning_baqe.deploy.device import fingerprint
from lightning_baqe.deploy.kernels import kernel_key
from lightning_baqe.deploy.target import CpuTarget

_SCHEMA = """
CREATE TABLE IF NOT EXISTS kernels (
    device TEXT NOT NULL, mcpu TEXT NOT NULL, spec TEXT NOT NULL, kernel TEXT NOT NULL, knobs TEXT NOT NULL,
    latency_us REAL, samples_us TEXT NOT NULL, exact INTEGER, error TEXT, measured_at REAL NOT NULL,
    PRIMARY KEY (device, mcpu, kernel)
);
CREATE INDEX IF NOT EXISTS kernels_by_spec ON kernels (device, mcpu, spec);
CREATE TABLE IF NOT EXISTS models (
    device TEXT NOT NULL, plan TEXT NOT NULL, latency_us REAL NOT NULL, samples_us TEXT NOT NULL, info TEXT NOT NULL,
    measured_at REAL NOT NULL, PRIMARY KEY (device, plan)
);
"""


def default_records_path() -> Path:
    """``$LIGHTNING_BAQE_CACHE/records.db``, by default ``~/.cache/lightning_baqe/records.db``."""
    base = os.environ.get("LIGHTNING_BAQE_CACHE")
    if base is None:
        base = str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightning_baqe")
    return Path(base) / "records.db"


@dataclass(frozen=True)
class KernelRecord:
    """One measured kernel.

    Args:
        knobs: its knobs.
        latency_us: what knobs are ranked by, the tuner's is the fastest sample; None if it failed.
        samples_us: all samples.
        exact: whether its result was compared with the reference and equal.
        error: why it failed.
    """

    knobs: dict[str, Any]
    latency_us: float | None
    samples_us: list[float]
    exact: bool | None
    error: str | None = None


class Records:
    """The database.

    Args:
        path: of the SQLite file; created if missing.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = Path(path) if path is not None else default_records_path()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(_SCHEMA)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=30)) as connection, connection:
            yield connection

    def add_kernel(self, spec: ConvSpec, target: CpuTarget, record: KernelRecord) -> None:
        """Keep a kernel's measurement; an older one of the same code is replaced."""
        row = (
            fingerprint(spec.threads), target.mcpu, _spec_key(spec), kernel_key(spec, record.knobs),
            json.dumps(record.knobs, sort_keys=True), record.latency_us, json.dumps(record.samples_us),
            None if record.exact is None else int(record.exact), record.error, time.time(),
        )  # fmt: skip
        with self._connection() as connection:
            connection.execute("INSERT OR REPLACE INTO kernels VALUES (?,?,?,?,?,?,?,?,?,?)", row)

    def kernel(self, spec: ConvSpec, target: CpuTarget, knobs: Mapping[str, Any]) -> KernelRecord | None:
        """A kernel's record, None if it was never measured."""
        query = "SELECT knobs, latency_us, samples_us, exact, error FROM kernels WHERE device=? AND mcpu=? AND kernel=?"
        with self._connection() as connection:
            key = (fingerprint(spec.threads), target.mcpu, kernel_key(spec, knobs))
            row = connection.execute(query, key).fetchone()
        return _record(row) if row else None

    def kernels(self, spec: ConvSpec, target: CpuTarget) -> list[KernelRecord]:
        """All records of one convolution, fastest first, failed ones last."""
        query = (
            "SELECT knobs, latency_us, samples_us, exact, error FROM kernels WHERE device=? AND mcpu=? AND spec=? "
            "ORDER BY latency_us IS NULL, latency_us, kernel"
        )
        with self._connection() as connection:
            rows = connection.execute(query, (fingerprint(spec.threads), target.mcpu, _spec_key(spec))).fetchall()
        return [_record(row) for row in rows]

    def best_knobs(self, spec: ConvSpec, target: CpuTarget) -> dict[str, Any] | None:
        """The knobs of the fastest exact record of a convolution, None if there is none."""
        for record in self.kernels(spec, target):
            if record.error is None and record.exact is not False:
                return record.knobs
        return None

    def add_model(self, plan_digest: str, threads: int, samples_us: list[float], latency_us: float, info: Any) -> None:
        """Keep a whole model's latency."""
        row = (fingerprint(threads), plan_digest, latency_us, json.dumps(samples_us), json.dumps(info), time.time())
        with self._connection() as connection:
            connection.execute("INSERT OR REPLACE INTO models VALUES (?,?,?,?,?,?)", row)

    def model(self, plan_digest: str, threads: int) -> tuple[float, list[float]] | None:
        """``(latency_us, samples_us)`` of a whole model with this code, None if it was never measured."""
        query = "SELECT latency_us, samples_us FROM models WHERE device=? AND plan=?"
        with self._connection() as connection:
            row = connection.execute(query, (fingerprint(threads), plan_digest)).fetchone()
        return (row[0], json.loads(row[1])) if row else None


def _spec_key(spec: ConvSpec) -> str:
    return json.dumps(asdict(spec), sort_keys=True)


def _record(row: tuple[Any, ...]) -> KernelRecord:
    knobs, latency_us, samples_us, exact, error = row
    checked = None if exact is None else bool(exact)
    return KernelRecord(json.loads(knobs), latency_us, json.loads(samples_us), checked, error)
